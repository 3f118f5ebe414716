"""`LLMEngine`: the step loop. One thread owns it; it knows nothing of who calls it or how."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from pellucid.api.outputs import EngineCoreOutput, RequestOutput
from pellucid.api.request_options import NO_OPTIONS, RequestOptions, check_options
from pellucid.api.sampling_params import SamplingParams
from pellucid.config import EngineConfig
from pellucid.contract.executor import Executor, Verification
from pellucid.contract.plan import ModelRunnerOutput, StepPlan
from pellucid.engine.admission import Admitted, Prompt, RequestChecker
from pellucid.engine.metrics import EngineMetrics, EngineStats
from pellucid.engine.output import OutputProcessor, RequestState
from pellucid.errors import EXITS, EngineDeadError, InvalidRequestError, NativeError, PellucidError, reason_of
from pellucid.executor.worker import PlanWorker, Task
from pellucid.owners import Owner, SoleOwner, owned
from pellucid.sampling.rng import draw_seed
from pellucid.scheduling.block_manager import BlockManager
from pellucid.scheduling.config import DraftConfig, SchedulerConfig
from pellucid.scheduling.request import EngineCoreRequest, RequestStatus
from pellucid.scheduling.scheduler import RequestScheduler, TokenEvent
from pellucid.scheduling.wait import WAIT_BEHIND_HEAD_LABEL, wait_label
from pellucid.text.tokenizer import Tokenizer
from pellucid.trace.records import Place, StepRecord, Trace

if TYPE_CHECKING:
    from pellucid.trace.lines import Line, Resolved
    from pellucid.trace.recorder import Recorder

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOutputs:
    """What a step brought: news of every request that moved, and the requests that ended, whole."""

    chunks: list[EngineCoreOutput] = field(default_factory=list)
    finished: list[RequestOutput] = field(default_factory=list)

    def without(self, request_id: str) -> StepOutputs:
        """The same but for what is news of one request."""
        chunks = [chunk for chunk in self.chunks if chunk.request_id != request_id]
        return StepOutputs(chunks, [output for output in self.finished if output.request_id != request_id])


@dataclass(frozen=True)
class _Executed:
    output: ModelRunnerOutput
    seconds: float
    failed: bool = False  # nothing was computed


@dataclass(frozen=True)
class _Step:
    """A step between planning and booking."""

    plan: StepPlan
    task: Task[StepPlan, _Executed]
    running: list[str]  # ids, as it was planned
    schedule_seconds: float
    is_first: bool  # after the engine had nothing to do


@dataclass
class Failure:
    """Why an engine cannot go on; None while it can. Any thread may say so, and the owner's next call finds it."""

    error: PellucidError | None = None


class LLMEngine:
    """Requests in, outputs out, one step at a time: schedule, execute, apply, process, record.

    It belongs to the thread that calls it first; a call from another one raises `WrongThreadError`, which names both. Behind an
    `EngineClient`, which then is its `owner`, calls of any thread wait for their turn. `sink` is told what each step brought.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        tokenizer: Tokenizer | None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        check_every_step: bool = False,
        trace_sink: Callable[[Line], None] | None = None,
    ) -> None:
        """`trace_sink` is given the lines of the trace in place of a file."""
        self.config, self.executor, self.tokenizer = config, executor, tokenizer
        facts = executor.facts
        self.max_model_len, self.vocab_size, self.eos_token_ids = (
            facts.max_model_len,
            facts.vocab_size,
            facts.eos_token_ids,
        )
        self.checker = RequestChecker.of(config, facts, executor.kv_cache, tokenizer)
        self.block_manager = BlockManager(
            executor.kv_cache.num_blocks,
            executor.kv_cache.block_size,
            config.enable_prefix_caching,
            facts.contract.digest,
        )
        scheduler_config = SchedulerConfig(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            self.max_model_len,
            config.policy,  # type: ignore[arg-type]  # one of them: EngineConfig has checked it
            async_scheduling=config.async_scheduling,
            drafts=_drafts(config),
            max_batch_tkv_limit=config.max_batch_tkv_limit,
        )
        self.scheduler = RequestScheduler(scheduler_config, self.block_manager)
        self.metrics = EngineMetrics()
        self.output = OutputProcessor(tokenizer, self.metrics.observe_gap, facts.hidden_size)
        self.trace = Trace()
        self._clock, self._check_every_step = clock, check_every_step
        self._numbers = itertools.count()
        self._choice_ids: dict[str, list[str]] = {}
        self._ended_outside: list[TokenEvent] = []
        self._without_text: dict[str, str] = {}  # choices whose text could not be made in this step, and why
        self._in_flight: deque[_Step] = deque()
        self._is_idle = True
        self._execute = partial(_execute, executor, clock)
        self._worker = PlanWorker(self._execute) if config.async_scheduling else None
        self._closed = False
        self.failure = Failure()
        self.verification: Verification | None = None  # of the packed model, beside the steps
        self._turn = 0
        self.owner: Owner = SoleOwner("this LLMEngine")
        self.sink: Callable[[StepOutputs], None] | None = None
        self._recorder = self._make_recorder(trace_sink, clock)

    # ---- commands -------------------------------------------------------------------------------------------------

    @owned
    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        options: RequestOptions = NO_OPTIONS,
        stream: bool = True,
        prompt_text: str | None = None,
    ) -> str:
        """Queues a request and gives its id. Without `stream` nobody reads its chunks: it has none, and its text is made when
        it ends. `prompt_text` is what a caller made a prompt of token ids from; the output names it.

        Raises:
            InvalidRequestError: naming the field, the value and the limit; nothing was queued.
            EngineDeadError: the engine was closed, or has failed.
        """
        self._refuse_when_dead()
        params = SamplingParams() if params is None else params
        number = next(self._numbers)
        request_id = f"req-{number}" if request_id is None else request_id
        check_options(request_id, options)
        if request_id in self._choice_ids:
            raise InvalidRequestError("request_id", f"{request_id!r} is in use")
        text, token_ids = self.checker.tokenise(prompt)
        admitted = self.checker.check(token_ids, params, options)
        if self._recorder is not None:
            self._recorder.check(params)
        names = admitted.capture
        seed = params.seed if params.seed is not None else draw_seed(self.config.seed, number)
        grammar = self.checker.grammar(params)
        self.checker.check_first_token(params, grammar, admitted.bad_words_token_ids)
        cores = self._choices(request_id, tuple(token_ids), params, seed, options, admitted)
        hidden = options.hidden_states
        choices = [self.output.new_choice(i, params, seed, token_ids, hidden, names) for i in range(params.n)]
        added: list[str] = []
        try:
            for core in cores:
                self.scheduler.add(core)
                added.append(core.request_id)
        except BaseException:
            for choice_id in added:
                self.scheduler.cancel(choice_id)
                self.scheduler.forget(choice_id)
            raise
        text = prompt_text if text is None else text
        state = RequestState(request_id, text, token_ids, params, choices, cores[0].arrival_time, stream, grammar)
        self._choice_ids[request_id] = added
        self.output.add(state, added)
        if self._recorder is not None:
            self._recorder.submitted(self._place, request_id, token_ids, params, seed, options, names)
        return request_id

    @owned
    def cancel(self, request_id: str) -> bool:
        """Ends a request as aborted; its blocks are free at once. True while it is known, False otherwise."""
        choice_ids = self._choice_ids.get(request_id)
        if choice_ids is None:
            return False
        aborted = RequestStatus.FINISHED_ABORTED
        ended = [TokenEvent(name, None, aborted) for name in choice_ids if self.scheduler.finish(name, aborted)]
        self._ended_outside += ended
        if ended and self._recorder is not None:
            self._recorder.cancelled(self._place, request_id)
        return True

    @owned
    def reset_prefix_cache(self) -> bool:
        """Forgets all cached blocks; False while requests hold blocks."""
        is_reset = self.block_manager.reset_prefix_cache()
        if is_reset and self._recorder is not None:
            self._recorder.was_reset(self._place)
        return is_reset

    @owned
    def take_ended(self) -> StepOutputs:
        """The outputs of requests that were cancelled since the last step, without a step."""
        outputs = self._process([], self._clock())
        if not self.scheduler.has_unfinished:
            self.scheduler.check_invariants()
        return outputs

    @owned
    def stats(self) -> EngineStats:
        """The state of now, and all that was counted since the start."""
        counted, scheduler = self.metrics, self.scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            waiting_by_reason=self._waiting_by_reason(),
            kv_cache=self.block_manager.stats(),
            num_preemptions=counted.num_preemptions,
            prompt_tokens=counted.prompt_tokens,
            generation_tokens=counted.generation_tokens,
            prefix_queries=counted.prefix_queries,
            prefix_hits=counted.prefix_hits,
            finished=dict(counted.finished),
            num_steps=counted.num_steps,
            num_cached_blocks=self.block_manager.num_cached_blocks,
            trace_has_failed=self._recorder is not None and self._recorder.has_failed,
            histograms={name: histogram.stats() for name, histogram in counted.histograms.items()},
        )

    def _waiting_by_reason(self) -> dict[str, int]:
        """The head of the queue waits for the reason of the last plan, the others for the head."""
        if not self.scheduler.num_waiting:
            return {}
        reasons = self.trace.last.waiting_reasons if self.trace.last is not None else {}
        counts = {WAIT_BEHIND_HEAD_LABEL: self.scheduler.num_waiting - 1}
        label = wait_label(reasons.get(self.scheduler.head.request_id))
        counts[label] = counts.get(label, 0) + 1
        return {label: count for label, count in counts.items() if count}

    @property
    def has_unfinished(self) -> bool:
        """True while a step could bring something. A step in flight for requests that have all ended does not; the empty one
        with which a padded batch ends does: its record."""
        return self.scheduler.has_unfinished or bool(self._ended_outside) or self.scheduler.account.is_open

    @property
    def turn(self) -> int:
        """How many calls of `step` there were that had something to do. It says where, between two of them, a command came."""
        return self._turn

    @property
    def can_step(self) -> bool:
        """True while `step` has something to do: a request to serve, or a step in flight to book."""
        return bool(self._in_flight) or self.scheduler.has_unfinished or self.scheduler.account.is_open

    @owned
    def close(self) -> None:
        """Frees the executor and the trace; harmless when called again."""
        if not self._closed:
            self._closed = True
            if self.verification is not None:
                self.verification.stop()
            if self._worker is not None:
                self._worker.close()
            self.executor.close()
            if self._recorder is not None:
                self._recorder.close(self._place)

    def _make_recorder(self, sink: Callable[[Line], None] | None, clock: Callable[[], float]) -> Recorder | None:
        """What writes the trace, where there is one."""
        if sink is None and self.config.trace_path is None:
            return None
        from pellucid.trace.recorder import Recorder, header_of  # not imported for nothing

        return Recorder(self.config, lambda: header_of(self.config, self.executor.facts, self._resolved()), sink, clock)

    def _resolved(self) -> Resolved:
        from pellucid.trace.lines import Resolved

        facts = self.executor.facts
        return Resolved(
            max_model_len=self.max_model_len,
            num_blocks=self.executor.kv_cache.num_blocks,
            block_size=self.executor.kv_cache.block_size,
            num_threads=facts.num_threads,
            isa=facts.contract.isa,
        )

    @property
    def _place(self) -> Place:
        return Place(self.turn, self.scheduler.next_step_id)

    def _refuse_when_dead(self) -> None:
        if self._closed:
            raise EngineDeadError("the engine is closed")
        if self.failure.error is not None:
            raise EngineDeadError(f"the engine failed: {self.failure.error}") from self.failure.error

    # ---- the step -------------------------------------------------------------------------------------------------

    @owned
    def step(self) -> StepOutputs:
        """Brings the results of one step; with nothing to do it returns at once.

        With `async_scheduling` the step after it is planned and handed over before the results of this one are waited for,
        so that the core goes on while they are processed and read.

        Raises:
            EngineDeadError: the engine was closed, or has failed.
        """
        self._refuse_when_dead()
        if not self.can_step:
            return self.take_ended()
        self._turn += 1
        if not self._in_flight:
            self._launch()
        if self._worker is not None and self._in_flight and not self.scheduler.drafts_now:
            self._launch()
        outputs = self._land() if self._in_flight else self._process([], self._clock())
        if self._check_every_step or not self.scheduler.has_unfinished:
            self.scheduler.check_invariants()
        return outputs

    def _launch(self) -> None:
        """Plans a step and has it executed, at once or by the worker. A step that has nothing to execute is not in flight."""
        began = self._clock()
        plan = self.scheduler.schedule()
        if not (plan.entries or plan.finished or plan.preempted):
            return
        planned = self._clock()
        running = [request.request_id for request in self.scheduler.running]
        self._book_admissions(plan, planned)
        task = self._put(plan)
        step = _Step(plan, task, running, planned - began, is_first=self._is_idle)
        self._is_idle = self._is_idle and not plan.entries
        self._in_flight.append(step)

    def _put(self, plan: StepPlan) -> Task[StepPlan, _Executed]:
        if self._worker is not None:
            return self._worker.put(plan)
        task: Task[StepPlan, _Executed] = Task(plan)
        task.run(self._execute)
        return task

    def _land(self) -> StepOutputs:
        """Books the oldest step in flight."""
        self._in_flight[0].task.wait()  # an interrupt leaves it in flight
        step = self._in_flight.popleft()
        executed = step.task.result()
        result, began = executed.output, self._clock()
        if executed.failed:
            self.scheduler.tell_again(step.plan)
        if result.prompt_logprobs or result.hidden_rows or result.captured:
            self._take_rows(result, self.scheduler.living(step.plan))
        stop_check = self._stop_check if self.output.watches_stops else None
        events = self.scheduler.apply(step.plan, result, stop_check)
        outputs = self._process(events, began)
        if step.plan.entries:
            self._book_step(step.plan, events)
        if step.plan.entries or self.scheduler.account.counts_empty_steps:
            record = self._record(step, executed, events, self._clock() - began)
            self.trace.record(record)
            if self._recorder is not None:
                self._recorder.stepped(self.turn, record, step.plan, result, events)
        self._is_idle = not self.scheduler.has_unfinished
        return outputs

    def _take_rows(self, result: ModelRunnerOutput, living: Set[str]) -> None:
        """Books what a step brought beside tokens. What cannot be booked ends its request, as an error of the executor would."""
        states, positions = result.hidden_rows, result.hidden_states_positions or {}
        rows: dict[str, None] = dict.fromkeys((*result.prompt_logprobs, *states, *result.captured))
        for choice_id in rows.keys() & living:
            try:
                if choice_id in result.prompt_logprobs:
                    self.output.add_prompt_logprobs(choice_id, *result.prompt_logprobs[choice_id])
                if choice_id in states:
                    self.output.add_hidden_states(choice_id, positions[choice_id], states[choice_id])
                if choice_id in result.captured:
                    self.output.add_captured(choice_id, result.captured[choice_id])
            except EXITS:
                raise
            except BaseException as error:
                result.errors.setdefault(choice_id, self._broken(choice_id, error))

    def _stop_check(self, choice_id: str, token_id: int) -> str | None:
        """`OutputProcessor.stop_check`; a choice whose text cannot be made is ended when its token is booked."""
        try:
            return self.output.stop_check(choice_id, token_id)
        except EXITS:
            raise
        except BaseException as error:
            self._without_text[choice_id] = self._broken(choice_id, error)
            return None

    def _broken(self, choice_id: str, error: BaseException) -> str:
        _log.warning("the output of request %r cannot be made; it ends with an error", choice_id, exc_info=error)
        return reason_of(error)

    def _process(self, events: list[TokenEvent], now: float) -> StepOutputs:
        """Makes outputs of events. An event whose output cannot be made becomes, in `events` too, the end of its request."""
        streams: dict[str, RequestState] = {}
        finished: list[RequestState] = []
        outside, self._ended_outside = self._ended_outside, []
        for event in outside:
            self._process_event(event, now, streams, finished)
        if events:
            events[:] = [made for event in events if (made := self._process_event(event, now, streams, finished))]
        chunks = [chunk for state in streams.values() for chunk in self.output.take_chunks(state)]
        for state in finished:
            del self._choice_ids[state.request_id]
        outputs = [state.to_output() for state in finished]
        for output in outputs:
            self.metrics.count_finished(output)
        brought = StepOutputs(chunks, outputs)
        if self.sink is not None:
            self.sink(brought)
        return brought

    def _process_event(
        self, event: TokenEvent, now: float, streams: dict[str, RequestState], finished: list[RequestState]
    ) -> TokenEvent | None:
        """The event as it was booked; None behind the end that an error made of one before it in the same step."""
        if not self.output.follows(event.request_id):
            return None
        state = self.output.state_of(event.request_id)
        try:
            self.output.add_token(event, now)
            reason = self._without_text.pop(event.request_id, None) if self._without_text else None
        except EXITS:
            raise
        except BaseException as error:
            reason = self._broken(event.request_id, error)
        event = event if reason is None else self._without_work(event, reason)
        if event.finish_status is not None:
            try:
                self._finish(state, event, event.finish_status, now)
            except EXITS:
                raise
            except BaseException as error:
                event = self._without_work(event, self._broken(event.request_id, error))
                self._finish(state, event, RequestStatus.FINISHED_ERROR, now)
            if state.finished:
                finished.append(state)
        if state.stream:
            streams[state.request_id] = state
        return event

    def _without_work(self, event: TokenEvent, reason: str) -> TokenEvent:
        """The event as the end of its request, of which nothing more is made."""
        self.output.drop_work(event.request_id)
        self.scheduler.finish(event.request_id, RequestStatus.FINISHED_ERROR, error=reason)
        return event._replace(finish_status=RequestStatus.FINISHED_ERROR, stop_reason=None, error=reason)

    def _finish(self, state: RequestState, event: TokenEvent, status: RequestStatus, now: float) -> None:
        request = self.scheduler.get(event.request_id)
        if request is not None:
            state.num_preemptions += request.num_preemptions
            self.scheduler.forget(event.request_id)
        self.output.finish(event, status, now)

    def _book_step(self, plan: StepPlan, events: Sequence[TokenEvent]) -> None:
        self.metrics.count_step(plan.num_tokens, sum([1 for event in events if event.token_id is not None]))
        if plan.preempted:
            self.metrics.num_preemptions += len(plan.preempted)
        if plan.new_requests:
            cached = {entry.request_id: entry.num_cached_tokens for entry in plan.entries}
            caching = self.config.enable_prefix_caching
            for new in plan.new_requests:
                if not new.output_token_ids:
                    self.metrics.count_admission(len(new.prompt_token_ids), cached.get(new.request_id, 0), caching)

    def _book_admissions(self, plan: StepPlan, now: float) -> None:
        for new in plan.new_requests:
            state = self.output.state_of(new.request_id)
            state.scheduled_at = now if state.scheduled_at is None else state.scheduled_at
            self.output.set_status(new.request_id, RequestStatus.RUNNING)
        if plan.new_requests:
            for entry in plan.entries:
                if entry.num_cached_tokens:
                    state = self.output.state_of(entry.request_id)
                    state.num_cached_tokens = max(state.num_cached_tokens, entry.num_cached_tokens)
        for request_id in plan.preempted:
            self.output.set_status(request_id, RequestStatus.PREEMPTED)

    def _record(
        self, step: _Step, executed: _Executed, events: Sequence[TokenEvent], output_seconds: float
    ) -> StepRecord:
        plan, output = step.plan, executed.output
        finished = [event.request_id for event in events if event.finish_status is not None]
        account = self.scheduler.account
        return StepRecord(
            step=plan.step_id,
            kind=plan.kind,
            tkv=account.tkv,
            waiting=list(plan.waiting),
            running=[request_id for request_id in step.running if request_id not in finished],
            request_outputs=list(dict.fromkeys([event.request_id for event in events if event.token_id is not None])),
            finished_requests=finished,
            n_reserved_blocks=account.n_reserved_blocks,
            n_used_blocks=account.n_used_blocks,
            n_free_blocks=account.n_free_blocks,
            n_prefix_hits=sum([1 for entry in plan.entries if entry.num_cached_tokens]) if plan.new_requests else 0,
            tokens={entry.request_id: entry.num_tokens for entry in plan.entries},
            preempted=list(plan.preempted),
            schedule_seconds=step.schedule_seconds,
            execute_seconds=executed.seconds,
            sample_seconds=output.sample_seconds,
            output_seconds=output_seconds,
            idle_seconds=0.0 if step.is_first else output.idle_seconds,
            n_draft_tokens=plan.num_draft_tokens,
            n_accepted_tokens=sum(map(len, output.accepted_drafts.values())),
            waiting_reasons=plan.waiting,
        )

    # ---- the choices of a request ---------------------------------------------------------------------------------

    def _choices(
        self,
        request_id: str,
        token_ids: tuple[int, ...],
        params: SamplingParams,
        seed: int,
        options: RequestOptions,
        admitted: Admitted,
    ) -> list[EngineCoreRequest]:
        max_tokens = self.checker.max_tokens(len(token_ids), params)
        now, many = self._clock(), params.n > 1
        return [
            EngineCoreRequest(
                request_id=f"{request_id}/{index}" if many else request_id,
                prompt_token_ids=token_ids,
                sampling_params=params,
                seed=seed,
                max_tokens=max_tokens,
                choice_index=index,
                group_id=request_id if many else None,
                priority=options.priority,
                cache_salt=options.cache_salt,
                arrival_time=now,
                eos_token_ids=self.eos_token_ids,
                bad_words_token_ids=admitted.bad_words_token_ids,
                hidden_states=options.hidden_states,
                capture=admitted.capture,
                steering=options.steering,
            )
            for index in range(params.n)
        ]


def _execute(executor: Executor, clock: Callable[[], float], plan: StepPlan) -> _Executed:
    """Runs a plan. What is wrong with one request the executor says in its output. An error that it raises is nobody's in
    particular: the requests of the plan end with the reason, and the engine lives on."""
    began, failed = clock(), False
    try:
        output = executor.execute(plan)
    except Exception as error:
        _log.error(
            "step %d failed as a whole; it cannot be told for which request, so all %d of it end with an error",
            plan.step_id,
            len(plan.entries),
            exc_info=error,
        )
        reason = str(error) if isinstance(error, NativeError) else f"the step failed: {type(error).__name__}: {error}"
        output, failed = ModelRunnerOutput({}, errors={entry.request_id: reason for entry in plan.entries}), True
    return _Executed(output, clock() - began, failed)


def _drafts(config: EngineConfig) -> DraftConfig | None:
    if config.speculative_method is None:
        return None
    return DraftConfig(
        config.num_speculative_tokens,
        config.prompt_lookup_min,
        config.prompt_lookup_max,
        config.speculative_max_num_seqs,
    )
