"""What runs next. A pure state machine: no torch, no clock, no I/O.

`schedule()` makes a plan, somebody executes it, `apply()` books the result. One arithmetic serves prefill, chunk,
decode, resumption, prefix hits and draft verification: a step lets `num_computed_tokens` catch up with `num_tokens` under
a token budget. `schedule()` may be called again before the plan before was applied. It then takes only tokens that are
already known or, with `async_scheduling`, also the one that the plan in flight samples, whose place it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from typing import NamedTuple

from pellucid.api.outputs import TokenLogprobs
from pellucid.contract.plan import AcceptedDraft, ModelRunnerOutput, PlanEntry, StepPlan
from pellucid.errors import InvalidRequestError, InvariantError
from pellucid.scheduling.block_manager import BlockManager
from pellucid.scheduling.config import SchedulerConfig
from pellucid.scheduling.passes import Step
from pellucid.scheduling.policies import limits_of, policy_of
from pellucid.scheduling.queues import Queues
from pellucid.scheduling.request import EngineCoreRequest, Request, RequestStatus

StopCheck = Callable[[str, int], "str | None"]


class TokenEvent(NamedTuple):
    """News of one request from one step: a token, an ending, or both. A step brings several where drafts were accepted."""

    request_id: str
    token_id: int | None = None
    finish_status: RequestStatus | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    logprobs: TokenLogprobs | None = None


class RequestScheduler:
    """Admission, plans and the bookkeeping of results.

    Raises:
        ConfigError: the policy is not known, or cannot honour another setting.

    Order: lower `priority` first, then first come first served. Iteration yields running requests, then waiting ones
    in the order in which they will be admitted.
    """

    def __init__(self, config: SchedulerConfig, block_manager: BlockManager) -> None:
        self.config = config
        self.policy = policy_of(config)
        self.block_manager = block_manager
        self.account = self.policy.account(config, block_manager)
        self.limits = limits_of(
            config,
            max_model_len=config.max_model_len,
            num_blocks=block_manager.num_blocks,
            block_size=block_manager.block_size,
        )
        self._queues = Queues(block_manager, self.policy.newest_first)
        self._requests: dict[str, Request] = {}  # all records, finished ones until they are forgotten
        self._finished: list[str] = []  # ended since the last plan
        self._num_arrivals = 0
        self._next_step_id = 0

    # ---- questions -------------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return self._queues.num_waiting

    @property
    def num_running(self) -> int:
        return self._queues.num_running

    @property
    def has_unfinished(self) -> bool:
        """True while any request waits or runs."""
        return bool(self._queues.num_waiting or self._queues.num_running)

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Waiting requests in queue order."""
        return self._queues.waiting

    @property
    def running(self) -> tuple[Request, ...]:
        """Running requests in the policy's order."""
        return self._queues.running

    @property
    def next_step_id(self) -> int:
        """The number of the plan that `schedule` makes next."""
        return self._next_step_id

    @property
    def head(self) -> Request:
        """The waiting request that comes in next. There must be one."""
        return self._queues.head

    @property
    def waiting_ids(self) -> tuple[str, ...]:
        """Ids of the waiting requests in queue order."""
        return self._queues.waiting_ids

    @property
    def drafts_now(self) -> bool:
        """True when the next plan may hold drafts: they follow tokens that must be known."""
        drafts = self.config.drafts
        return drafts is not None and self._queues.num_running <= drafts.max_num_seqs

    def __iter__(self) -> Iterator[Request]:
        return iter(self._queues)

    def get(self, request_id: str) -> Request | None:
        """The record of a request, finished or not; None when unknown or forgotten."""
        return self._requests.get(request_id)

    def check_invariants(self) -> None:
        """Check blocks and queues against each other.

        Raises:
            InvariantError: see `BlockManager.check_invariants`; or a request stands in the wrong queue.
        """
        self.block_manager.check_invariants(self)
        self._queues.check_invariants(sum(1 for request in self._requests.values() if not request.is_finished))
        self.account.check_invariants(self.running)

    # ---- commands --------------------------------------------------------------------------------------------------

    def add(self, core: EngineCoreRequest) -> Request:
        """Queue a request.

        Raises:
            InvalidRequestError: it could never run; the text has the values and the limits.
        """
        if core.request_id in self._requests:
            raise InvalidRequestError("request_id", f"{core.request_id!r} is in use")
        self.limits.refuse_impossible(len(core.prompt_token_ids), core.max_tokens)
        request = Request(core, sequence=self._num_arrivals)
        self._num_arrivals += 1
        self._requests[core.request_id] = request
        self._queues.add(request)
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
        """The next step; of kind `none` when nothing can run. Executors drop `finished`, then take `new_requests`.

        Raises:
            InvariantError: the policy plans step by step, and a plan before was not applied.
        """
        in_flight = self._queues.steps_in_flight
        if self.policy.one_shape and in_flight:
            raise InvariantError(f"{self.config.policy} plans step by step; in flight: {in_flight}")
        drafts = self.config.drafts if self.drafts_now else None
        step = Step(self.config, self._queues, self.block_manager, self.account, drafts)
        self.policy.take(step)
        plan = step.plan(self._next_step_id, tuple(self._finished))
        admitted = self._requests[plan.new_requests[0].request_id] if plan.new_requests else None
        self.account.advance(admitted, decodes=plan.kind == "decode")
        self._next_step_id += 1
        self._finished.clear()
        if plan.entries:
            self._queues.launch(plan.step_id, step.requests)
        return plan

    def apply(self, plan: StepPlan, output: ModelRunnerOutput, stop_check: StopCheck | None = None) -> list[TokenEvent]:
        """Book what a plan computed. Requests that ended or were preempted since are passed over.

        `stop_check(request_id, token_id)` is called for each token that does not end its request as eos or stop id, and
        returns the stop string that the text now has, or None; what it returns within `min_tokens` is ignored.

        Raises:
            InvariantError: the plan was applied before or is not from here.
        """
        requests = self._queues.land(plan.step_id) if plan.entries else {}
        events: list[TokenEvent] = []
        for entry in plan.entries:
            request = requests.get(entry.request_id)
            if request is not None:
                self._apply_entry(request, entry, output, stop_check, events)
        return events

    def tell_again(self, plan: StepPlan) -> None:
        """The executor may not have heard of a plan's endings, for it failed: the next plan tells them again."""
        self._finished += [name for name in plan.finished if (old := self.get(name)) is None or old.is_finished]

    def living(self, plan: StepPlan) -> Set[str]:
        """The requests of a plan in flight that have neither ended nor been preempted since."""
        return self._queues.living(plan.step_id)

    # ---- results ---------------------------------------------------------------------------------------------------

    def _apply_entry(
        self,
        request: Request,
        entry: PlanEntry,
        output: ModelRunnerOutput,
        stop_check: StopCheck | None,
        events: list[TokenEvent],
    ) -> None:
        request_id = entry.request_id
        token_id = output.sampled_token_ids.get(request_id)
        error = output.errors.get(request_id)
        if error is None and entry.samples and token_id is None:
            error = f"step {entry.start} + {entry.num_tokens} tokens gave no sampled token"
        drafts = output.accepted_drafts.get(request_id, ()) if entry.draft_token_ids else ()
        if error is None or drafts:
            request.num_scheduled_tokens -= entry.num_tokens
            self._book_computed(request, entry.num_tokens - len(entry.draft_token_ids))
        for draft in drafts:
            if self._apply_draft(request, draft, stop_check, events):
                return
        if error is not None:
            self._end(request, RequestStatus.FINISHED_ERROR, error=error)
            events.append(TokenEvent(request_id, None, RequestStatus.FINISHED_ERROR, error=error))
        elif entry.samples and token_id is not None:
            if self.config.async_scheduling:
                request.num_placeholders -= 1
            request.append_output(token_id)
            events.append(self._event_of_token(request, token_id, output.logprobs.get(request_id), stop_check))

    def _apply_draft(
        self, request: Request, draft: AcceptedDraft, stop_check: StopCheck | None, events: list[TokenEvent]
    ) -> bool:
        """An accepted draft is an output whose K/V are computed already. True when it ends its request."""
        request.append_output(draft.token_id)
        events.append(self._event_of_token(request, draft.token_id, draft.logprobs, stop_check))
        if request.is_finished:
            return True
        self._book_computed(request, 1)
        return False

    def _book_computed(self, request: Request, num_tokens: int) -> None:
        before, size = request.num_computed_tokens, self.block_manager.block_size
        request.num_computed_tokens = before + num_tokens
        if before // size != (before + num_tokens) // size:
            self.block_manager.cache_full_blocks(request, before + num_tokens)

    def _event_of_token(
        self, request: Request, token_id: int, logprobs: TokenLogprobs | None, stop_check: StopCheck | None
    ) -> TokenEvent:
        status, stop_reason = self._stop_of_token(request, token_id, stop_check)
        error = None
        if status is None and self.config.is_at_full_length(request):
            status = RequestStatus.FINISHED_LENGTH
        if status is None:
            error = self._outgrown(request)
            status = RequestStatus.FINISHED_ERROR if error else None
        if status is not None:
            self._end(request, status, stop_reason, error)
        return TokenEvent(request.request_id, token_id, status, stop_reason, error, logprobs)

    @staticmethod
    def _stop_of_token(
        request: Request, token_id: int, stop_check: StopCheck | None
    ) -> tuple[RequestStatus | None, int | str | None]:
        """eos, then stop ids, then stop strings; none of them within `min_tokens`, but the eos of a structure that is complete."""
        core = request.core
        params = core.sampling_params
        may_stop = len(request.output_token_ids) > params.min_tokens
        if (
            (may_stop or params.structured_outputs is not None)
            and not params.ignore_eos
            and token_id in core.eos_token_ids
        ):
            return RequestStatus.FINISHED_STOPPED, None
        if may_stop and token_id in params.stop_token_ids:
            return RequestStatus.FINISHED_STOPPED, token_id
        stop_string = stop_check(request.request_id, token_id) if stop_check else None
        if may_stop and stop_string is not None:
            return RequestStatus.FINISHED_STOPPED, stop_string
        return None, None

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
        self._queues.end(request, status)
        request.stop_reason, request.error = stop_reason, error
        self._finished.append(request.request_id)
