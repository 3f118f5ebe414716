"""What runs next. A pure state machine: no torch, no clock, no I/O.

`schedule()` makes a plan, somebody executes it, `apply()` books the result. One arithmetic serves prefill, chunk,
decode, resumption and prefix hits: a step lets `num_computed_tokens` catch up with `num_tokens` under a token budget.
`schedule()` may be called again before the plan before was applied: it then takes only tokens that are already known.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pellucid.engine.block_manager import BlockManager
from pellucid.engine.policies import POLICIES
from pellucid.engine.request import EngineCoreRequest, Request, RequestStatus
from pellucid.errors import ConfigError, InvalidRequestError, InvariantError
from pellucid.plan import ModelRunnerOutput, NewRequest, PlanEntry, StepKind, StepPlan

StopCheck = Callable[[str, int], "str | None"]

# Why a waiting request waits: the closed set of reasons, with their numbers.
WAIT_NO_BLOCKS = "no free blocks: needs {needs}, {free} free"
WAIT_MAX_NUM_SEQS = "max_num_seqs {limit} reached"
WAIT_BUDGET_SPENT = "token budget of {budget} spent"
WAIT_BUDGET_SHORT = "token budget of {budget}: needs {needs}, {left} left"
WAIT_SHARED_PROMPT = "waits for the shared prompt of its first choice"
WAIT_PREEMPTING = "blocks are short: {preempted} preempted in this step"
WAIT_BEHIND_HEAD = "head of the queue waits"
WAIT_REASONS = (
    WAIT_NO_BLOCKS,
    WAIT_MAX_NUM_SEQS,
    WAIT_BUDGET_SPENT,
    WAIT_BUDGET_SHORT,
    WAIT_SHARED_PROMPT,
    WAIT_PREEMPTING,
    WAIT_BEHIND_HEAD,
)


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step.

    `max_num_seqs`: requests running at once. `max_num_batched_tokens`: tokens computed in one step. `max_model_len`:
    prompt + outputs of one request. `max_prefill_chunk`: most tokens of one prompt in one step (policy `mixed` only;
    None: the budget).

    Raises:
        ConfigError: a limit is below 1, or the policy is not known or does not cut prompts.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    policy: Literal["mixed", "prefill_first"] = "mixed"
    max_prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy {self.policy!r} is not known; policies: {', '.join(sorted(POLICIES))}")
        if self.policy == "prefill_first" and self.max_prefill_chunk is not None:
            raise ConfigError(f"max_prefill_chunk {self.max_prefill_chunk}: prefill_first computes whole prompts")


@dataclass(frozen=True)
class TokenEvent:
    """News of one request from one step: a token, an ending, or both."""

    request_id: str
    token_id: int | None = None
    finish_status: RequestStatus | None = None
    stop_reason: int | str | None = None
    error: str | None = None


class RequestScheduler:
    """Queues, admission, preemption and the bookkeeping of results.

    Order: lower `priority` first, then first come first served. Iteration yields running requests, then waiting ones
    in the order in which they will be admitted.
    """

    def __init__(self, config: SchedulerConfig, block_manager: BlockManager) -> None:
        self.config = config
        self.block_manager = block_manager
        self._requests: dict[str, Request] = {}  # all records, finished ones until they are forgotten
        self._waiting: list[Request] = []  # sorted by queue_key
        self._running: list[Request] = []  # in order of admission
        self._finished: list[str] = []  # ended since the last plan
        self._in_flight: dict[int, dict[str, Request]] = {}  # step id -> living requests of a plan not yet applied
        self._num_arrivals = 0
        self._next_step_id = 0

    # ---- questions -------------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_unfinished(self) -> bool:
        """True while any request waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Waiting requests in queue order."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Request, ...]:
        """Running requests in order of admission."""
        return tuple(self._running)

    def __iter__(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    def get(self, request_id: str) -> Request | None:
        """The record of a request, finished or not; None when unknown or forgotten."""
        return self._requests.get(request_id)

    def check_invariants(self) -> None:
        """Check blocks and queues against each other.

        Raises:
            InvariantError: see `BlockManager.check_invariants`; or a request stands in the wrong queue.
        """
        self.block_manager.check_invariants(self)
        queued = {RequestStatus.WAITING, RequestStatus.PREEMPTED}
        for request in self._running:
            if request.status is not RequestStatus.RUNNING:
                raise InvariantError(f"{request} stands among the running requests")
        for request in self._waiting:
            if request.status not in queued or request.next_start:
                raise InvariantError(f"{request} stands among the waiting requests")
        num_living = sum(1 for request in self._requests.values() if not request.is_finished)
        if num_living != len({request.request_id for request in self}) or num_living != len(list(self)):
            raise InvariantError(f"{num_living} requests live but the queues hold {[r.request_id for r in self]}")

    # ---- commands --------------------------------------------------------------------------------------------------

    def add(self, core: EngineCoreRequest) -> Request:
        """Queue a request.

        Raises:
            InvalidRequestError: it could never run; the text has the values and the limits.
        """
        self._refuse_impossible(core)
        request = Request(core, sequence=self._num_arrivals)
        self._num_arrivals += 1
        self._requests[core.request_id] = request
        insort(self._waiting, request, key=_queue_key)
        return request

    def cancel(self, request_id: str) -> bool:
        """End a request as aborted; its blocks are free at once. True also when it had ended; False when unknown."""
        self.finish(request_id, RequestStatus.FINISHED_ABORTED)
        return request_id in self._requests

    def finish(
        self,
        request_id: str,
        status: RequestStatus,
        stop_reason: int | str | None = None,
        error: str | None = None,
    ) -> bool:
        """End a request from outside. True when it ended by this call; False when it had ended or is unknown.

        Raises:
            InvariantError: `status` is not an ending, or not one that the request can come to from where it stands.
        """
        if not status.is_finished:
            raise InvariantError(f"request {request_id!r} cannot finish as {status.value}")
        request = self._requests.get(request_id)
        if request is None or request.is_finished:
            return False
        self._end(request, status, stop_reason, error)
        return True

    def forget(self, request_id: str) -> bool:
        """Drop the record of an ended request. False when unknown.

        Raises:
            InvariantError: it has not ended.
        """
        request = self._requests.get(request_id)
        if request is None:
            return False
        if not request.is_finished:
            raise InvariantError(f"{request} cannot be forgotten before it ends")
        del self._requests[request_id]
        return True

    # ---- a step ----------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """The next step; of kind `none` when nothing can run. Executors drop `finished`, then take `new_requests`."""
        step = _Step(self)
        POLICIES[self.config.policy](step)
        plan = step.plan(self._next_step_id, tuple(self._finished))
        self._next_step_id += 1
        self._finished.clear()
        if plan.entries:
            self._in_flight[plan.step_id] = {
                entry.request_id: self._requests[entry.request_id] for entry in plan.entries
            }
        return plan

    def apply(self, plan: StepPlan, output: ModelRunnerOutput, stop_check: StopCheck | None = None) -> list[TokenEvent]:
        """Book what a plan computed. Requests that ended or were preempted since are passed over.

        `stop_check(request_id, token_id)` is called for each token that does not end its request as eos or stop id, and
        returns the stop string that the text now has, or None; what it returns within `min_tokens` is ignored.

        Raises:
            InvariantError: the plan was applied before or is not from here.
        """
        if plan.entries and plan.step_id not in self._in_flight:
            raise InvariantError(f"step {plan.step_id} is not in flight; in flight: {sorted(self._in_flight)}")
        requests = self._in_flight.pop(plan.step_id, {})
        events = []
        for entry in plan.entries:
            request = requests.get(entry.request_id)
            if request is not None and not request.is_finished:
                event = self._apply_entry(request, entry, output, stop_check)
                if event is not None:
                    events.append(event)
        return events

    # ---- results ---------------------------------------------------------------------------------------------------

    def _apply_entry(
        self, request: Request, entry: PlanEntry, output: ModelRunnerOutput, stop_check: StopCheck | None
    ) -> TokenEvent | None:
        error = output.errors.get(request.request_id)
        token_id = output.sampled_token_ids.get(request.request_id)
        if error is None and entry.samples and token_id is None:
            error = f"step {entry.start} + {entry.num_tokens} tokens gave no sampled token"
        if error is not None:
            self._end(request, RequestStatus.FINISHED_ERROR, error=error)
            return TokenEvent(request.request_id, None, RequestStatus.FINISHED_ERROR, error=error)
        request.num_scheduled_tokens -= entry.num_tokens
        request.num_computed_tokens += entry.num_tokens
        self.block_manager.cache_full_blocks(request, request.num_computed_tokens)
        if not entry.samples or token_id is None:
            return None
        request.append_output(token_id)
        return self._event_of_token(request, token_id, stop_check)

    def _event_of_token(self, request: Request, token_id: int, stop_check: StopCheck | None) -> TokenEvent:
        status, stop_reason = self._stop_of_token(request, token_id, stop_check)
        error = None
        if status is None and self._is_at_full_length(request):
            status = RequestStatus.FINISHED_LENGTH
        if status is None:
            error = self._outgrown(request)
            status = RequestStatus.FINISHED_ERROR if error else None
        if status is not None:
            self._end(request, status, stop_reason, error)
        return TokenEvent(request.request_id, token_id, status, stop_reason, error)

    @staticmethod
    def _stop_of_token(
        request: Request, token_id: int, stop_check: StopCheck | None
    ) -> tuple[RequestStatus | None, int | str | None]:
        """eos, then stop ids, then stop strings; none of them within `min_tokens`."""
        params = request.sampling_params
        may_stop = request.num_output_tokens > params.min_tokens
        if may_stop and not params.ignore_eos and token_id in request.core.eos_token_ids:
            return RequestStatus.FINISHED_STOPPED, None
        if may_stop and token_id in params.stop_token_ids:
            return RequestStatus.FINISHED_STOPPED, token_id
        stop_string = stop_check(request.request_id, token_id) if stop_check else None
        if may_stop and stop_string is not None:
            return RequestStatus.FINISHED_STOPPED, stop_string
        return None, None

    def _is_at_full_length(self, request: Request) -> bool:
        full = request.num_output_tokens >= request.core.max_tokens
        return full or request.num_tokens >= self.config.max_model_len

    def _outgrown(self, request: Request) -> str | None:
        """Why the request can never run again, if so: its next step would need more blocks than exist."""
        manager = self.block_manager
        needs = manager.blocks_for(request.num_tokens)
        if needs <= manager.num_blocks:
            return None
        return (
            f"the request has grown to {request.num_tokens} tokens, which need {needs} blocks of {manager.block_size}; "
            f"{manager.num_blocks} exist"
        )

    def _end(
        self,
        request: Request,
        status: RequestStatus,
        stop_reason: int | str | None = None,
        error: str | None = None,
    ) -> None:
        """The one way out: each request passes here exactly once."""
        queue = self._running if request.status is RequestStatus.RUNNING else self._waiting
        request.transition(status)
        _remove(queue, request, is_sorted=queue is self._waiting)
        self._release(request, discard=status is RequestStatus.FINISHED_ERROR)
        request.stop_reason, request.error = stop_reason, error
        self._finished.append(request.request_id)

    def _release(self, request: Request, discard: bool = False) -> None:
        """Take a request's blocks away and whatever plans in flight compute for it."""
        self.block_manager.free(request, discard=discard)
        request.num_scheduled_tokens = 0
        for requests in self._in_flight.values():
            requests.pop(request.request_id, None)

    # ---- queues ----------------------------------------------------------------------------------------------------

    def _preempt(self, request: Request) -> None:
        """Blocks away, outputs kept, back to the front of its priority's queue."""
        request.transition(RequestStatus.PREEMPTED)
        _remove(self._running, request, is_sorted=False)
        self._release(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        insort(self._waiting, request, key=_queue_key)  # it came before all that were never admitted

    def _admit(self, request: Request) -> None:
        request.transition(RequestStatus.RUNNING)
        self._waiting.pop(0)
        self._running.append(request)

    def _refuse_impossible(self, core: EngineCoreRequest) -> None:
        num_prompt, limits, manager = len(core.prompt_token_ids), self.config, self.block_manager
        if core.request_id in self._requests:
            raise InvalidRequestError(f"request id {core.request_id!r} is in use", param="request_id")
        if num_prompt == 0:
            raise InvalidRequestError("the prompt is empty; it needs at least 1 token", param="prompt")
        if core.max_tokens < 1:
            raise InvalidRequestError(f"max_tokens is {core.max_tokens}; it must be at least 1", param="max_tokens")
        if num_prompt + 1 > limits.max_model_len:
            raise InvalidRequestError(
                f"prompt has {num_prompt} tokens and needs room for 1 more; max_model_len is {limits.max_model_len}",
                param="prompt",
            )
        needs = manager.blocks_for(num_prompt + 1)
        if needs > manager.num_blocks:
            raise InvalidRequestError(
                f"prompt of {num_prompt} tokens + 1 needs {needs} blocks of {manager.block_size} tokens; "
                f"{manager.num_blocks} exist",
                param="prompt",
            )
        if limits.policy == "prefill_first" and num_prompt > limits.max_num_batched_tokens:
            raise InvalidRequestError(
                f"prompt has {num_prompt} tokens; policy prefill_first computes whole prompts and "
                f"max_num_batched_tokens is {limits.max_num_batched_tokens}",
                param="prompt",
            )


class _Step:
    """A plan in the making: the passes that policies are made of (`policies.StepPasses`)."""

    def __init__(self, scheduler: RequestScheduler) -> None:
        self._scheduler = scheduler
        self._config = scheduler.config
        self._blocks = scheduler.block_manager
        self._budget_left = self._config.max_num_batched_tokens
        self._entries: dict[str, PlanEntry] = {}
        self._prefills: set[str] = set()
        self._new_requests: list[NewRequest] = []
        self._preempted: list[str] = []
        self._head_reason = WAIT_BEHIND_HEAD

    @property
    def is_empty(self) -> bool:
        return not self._entries

    @property
    def running(self) -> list[Request]:
        return list(self._scheduler.running)

    def continue_running(self, requests: Iterable[Request]) -> None:
        """Take running requests in turn. One that lacks a block makes room by preempting, if need be itself."""
        for request in requests:
            num_tokens = self._chunk(request)
            is_taken = request.request_id in self._entries or request.status is not RequestStatus.RUNNING
            if is_taken or num_tokens == 0:
                continue
            new_block_ids = self._make_room(request, request.next_start + num_tokens)
            if new_block_ids is not None:
                self._take(request, num_tokens, new_block_ids)

    def admit_waiting(self, whole_prompts: bool) -> None:
        """Admit from the head of the queue; the first that cannot come in keeps those behind it waiting."""
        while self._scheduler.num_waiting:
            request = self._scheduler._waiting[0]
            reason = self._why_not(request, whole_prompts)
            if reason is not None:
                self._head_reason = reason
                return
            self._admit(request)

    def plan(self, step_id: int, finished: tuple[str, ...]) -> StepPlan:
        """The finished plan."""
        ids = [request.request_id for request in self._scheduler.waiting]
        waiting = dict.fromkeys(ids, WAIT_BEHIND_HEAD)
        if ids:
            waiting[ids[0]] = self._head_reason
        return StepPlan(
            step_id=step_id,
            kind=self._kind(),
            entries=tuple(self._entries.values()),
            new_requests=tuple(self._new_requests),
            preempted=tuple(self._preempted),
            finished=finished,
            waiting=waiting,
        )

    def _kind(self) -> StepKind:
        if not self._entries:
            return "none"
        if not self._prefills:
            return "decode"
        return "prefill" if len(self._prefills) == len(self._entries) else "mixed"

    def _chunk(self, request: Request) -> int:
        """How many of a request's pending tokens this step can take."""
        num_tokens = min(request.num_pending_tokens, self._budget_left)
        if request.is_prefill and self._config.max_prefill_chunk is not None:
            return min(num_tokens, self._config.max_prefill_chunk)
        return num_tokens

    def _take(self, request: Request, num_tokens: int, new_block_ids: list[int], num_cached_tokens: int = 0) -> None:
        start = request.next_start
        samples = start + num_tokens == request.num_tokens
        if request.is_prefill:
            self._prefills.add(request.request_id)
        self._entries[request.request_id] = PlanEntry(
            request.request_id, start, num_tokens, samples, tuple(new_block_ids), num_cached_tokens
        )
        request.num_scheduled_tokens += num_tokens
        self._budget_left -= num_tokens

    def _make_room(self, request: Request, num_tokens: int) -> list[int] | None:
        """Blocks for a running request; preempts the least important, newest requests until they are there."""
        while (new_block_ids := self._blocks.allocate(request, num_tokens)) is None:
            victim = max(self._scheduler.running, key=_queue_key)
            if self._scheduler.num_running == 1:
                raise InvariantError(f"{victim} runs alone and lacks blocks: {self._blocks.stats()}")
            self._preempt(victim)
            if victim is request:
                return None
        return new_block_ids

    def _preempt(self, victim: Request) -> None:
        entry = self._entries.pop(victim.request_id, None)
        if entry is not None:
            self._budget_left += entry.num_tokens
            self._prefills.discard(victim.request_id)
        self._scheduler._preempt(victim)
        self._preempted.append(victim.request_id)
        self._head_reason = WAIT_PREEMPTING.format(preempted=len(self._preempted))

    def _why_not(self, request: Request, whole_prompts: bool) -> str | None:
        """The reason why the head of the queue cannot be admitted now, or None. Cheap questions first."""
        config, blocks = self._config, self._blocks
        if self._preempted:
            return self._head_reason
        if self._scheduler.num_running >= config.max_num_seqs:
            return WAIT_MAX_NUM_SEQS.format(limit=config.max_num_seqs)
        if self._budget_left == 0:
            return WAIT_BUDGET_SPENT.format(budget=config.max_num_batched_tokens)
        if self._waits_for_first_choice(request):
            return WAIT_SHARED_PROMPT
        if whole_prompts:
            needs = min(request.num_tokens - blocks.lookup(request)[1], config.max_num_batched_tokens)
            if needs > self._budget_left:
                budget = config.max_num_batched_tokens
                return WAIT_BUDGET_SHORT.format(budget=budget, needs=needs, left=self._budget_left)
        needs = blocks.num_blocks_needed(request, request.num_tokens)
        if needs > blocks.num_free_blocks:
            return WAIT_NO_BLOCKS.format(needs=needs, free=blocks.num_free_blocks)
        return None

    def _waits_for_first_choice(self, request: Request) -> bool:
        """True while a choice of the same request computes the prompt that this one can share afterwards."""
        if request.group_id is None:
            return False
        choices = [other for other in self._scheduler.running if other.group_id == request.group_id]
        return bool(choices) and all(other.num_computed_tokens < other.num_prompt_tokens for other in choices)

    def _admit(self, request: Request) -> None:
        """Give the request blocks for all its known tokens, so that a prompt once begun is never short of them."""
        new_block_ids = self._blocks.allocate(request, request.num_tokens)
        if new_block_ids is None:
            raise InvariantError(f"{request} fits and yet gets no blocks: {self._blocks.stats()}")
        num_shared = len(request.block_table) - len(new_block_ids)
        self._new_requests.append(
            NewRequest(
                request_id=request.request_id,
                prompt_token_ids=request.prompt_token_ids,
                output_token_ids=tuple(request.output_token_ids),
                sampling_params=request.sampling_params,
                seed=request.core.seed,
                choice_index=request.core.choice_index,
                block_ids=tuple(request.block_table[:num_shared]),
                bad_words_token_ids=request.core.bad_words_token_ids,
                eos_token_ids=request.core.eos_token_ids,
            )
        )
        self._scheduler._admit(request)
        num_cached = request.num_computed_tokens if self._blocks.enable_prefix_caching else 0
        self._take(request, self._chunk(request), new_block_ids, num_cached)


def _queue_key(request: Request) -> tuple[int, int]:
    return request.queue_key


def _remove(queue: list[Request], request: Request, is_sorted: bool) -> None:
    index = bisect_left(queue, request.queue_key, key=_queue_key) if is_sorted else queue.index(request)
    if queue[index] is not request:
        raise InvariantError(f"{request} is not in its queue")
    del queue[index]
