"""One step in the making: what a plan takes of each request, who is admitted, and who gives way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pellucid.contract.plan import (
    WAIT_BEHIND_HEAD,
    NewRequest,
    PlanEntry,
    RequestSampling,
    StepKind,
    StepPlan,
    WaitingReasons,
)
from pellucid.errors import InvariantError
from pellucid.scheduling.account import BatchAccount
from pellucid.scheduling.block_manager import BlockManager
from pellucid.scheduling.config import DraftConfig, SchedulerConfig
from pellucid.scheduling.queues import Queues
from pellucid.scheduling.request import Request, RequestStatus, queue_key
from pellucid.scheduling.speculative import PromptLookup
from pellucid.scheduling.wait import (
    WAIT_BUDGET_SHORT,
    WAIT_BUDGET_SPENT,
    WAIT_MAX_NUM_SEQS,
    WAIT_NO_BLOCKS,
    WAIT_ONE_PROMPT,
    WAIT_PREEMPTING,
    WAIT_SHARED_PROMPT,
)


class Step:
    """A plan in the making: the passes that policies are made of."""

    def __init__(
        self,
        config: SchedulerConfig,
        queues: Queues,
        blocks: BlockManager,
        account: BatchAccount,
        drafts: DraftConfig | None,
    ) -> None:
        """`drafts`: None when this plan holds none."""
        self._config, self._queues, self._blocks, self._account, self._drafts = config, queues, blocks, account, drafts
        self._budget_left = config.max_num_batched_tokens
        self._entries: dict[str, PlanEntry] = {}
        self.requests: dict[str, Request] = {}  # those of the entries
        self._prefills: set[str] = set()
        self._new_requests: list[NewRequest] = []
        self._preempted: list[str] = []
        self._head_reason = WAIT_BEHIND_HEAD

    @property
    def is_empty(self) -> bool:
        return not self._entries

    @property
    def running(self) -> list[Request]:
        return list(self._queues.running)

    def continue_running(self, requests: Iterable[Request]) -> None:
        """Take running requests in turn. One that lacks a block makes room by preempting, if need be itself."""
        for request in requests:
            num_tokens = self._chunk(request)
            is_taken = request.request_id in self._entries or request.status is not RequestStatus.RUNNING
            if num_tokens <= 0 or is_taken or self._is_at_its_end(request):
                continue
            drafts = self._propose(request, num_tokens) if self._drafts else ()
            num_tokens += len(drafts)
            new_block_ids = self._make_room(request, request.next_start + num_tokens)
            if new_block_ids is not None:
                self._take(request, num_tokens, new_block_ids, drafts=drafts)

    def admit_waiting(self, whole_prompts: bool, one_prompt: bool = False) -> None:
        """Admit from the head of the queue; the first that cannot come in keeps those behind it waiting."""
        while self._queues.num_waiting:
            request = self._queues.head
            is_enough = one_prompt and bool(self._new_requests)
            reason = WAIT_ONE_PROMPT if is_enough else self._why_not(request, whole_prompts)
            if reason is not None:
                self._head_reason = reason
                return
            self._admit(request)

    def plan(self, step_id: int, finished: tuple[str, ...]) -> StepPlan:
        """The finished plan."""
        return StepPlan(
            step_id=step_id,
            kind=self._kind(),
            entries=tuple(self._entries.values()),
            new_requests=tuple(self._new_requests),
            preempted=tuple(self._preempted),
            finished=finished,
            waiting=WaitingReasons(self._queues.waiting_ids, self._head_reason),
        )

    def _kind(self) -> StepKind:
        if not self._entries:
            return "none"
        if not self._prefills:
            return "decode"
        return "prefill" if len(self._prefills) == len(self._entries) else "mixed"

    def _is_at_its_end(self, request: Request) -> bool:
        """True when a plan in flight samples the last token that the request can have: nothing can be computed behind it."""
        more = request.num_placeholders
        if not more:
            return False
        fits = self._blocks.blocks_for(request.num_tokens + more) <= self._blocks.num_blocks
        return not fits or self._config.is_at_full_length(request, more)

    def _chunk(self, request: Request) -> int:
        """How many of a request's pending tokens this step can take."""
        num_tokens = min(request.num_pending_tokens, self._budget_left)
        if self._config.max_prefill_chunk is not None and request.is_prefill:
            return min(num_tokens, self._config.max_prefill_chunk)
        return num_tokens

    def _propose(self, request: Request, num_tokens: int) -> Sequence[int]:
        """Drafts behind the newest token of a request, as far as they take nothing that another one could need now."""
        config, num_running = self._drafts, self._queues.num_running
        if config is None or num_tokens > 1 or request.is_prefill or request.num_placeholders:
            return ()
        spare_blocks = max(0, self._blocks.num_free_blocks - num_running)
        most = min(
            config.num_tokens,
            self._budget_left - num_running,
            request.core.max_tokens - request.num_output_tokens - 1,
            self._config.max_model_len - request.num_tokens - 1,
            (len(request.block_table) + spare_blocks) * self._blocks.block_size - request.num_tokens,
        )
        if most < 1:
            return ()
        if request.prompt_lookup is None:
            request.prompt_lookup = PromptLookup(config.shortest, config.longest)
        return request.prompt_lookup.propose(request.token_ids, most)

    def _take(
        self,
        request: Request,
        num_tokens: int,
        new_block_ids: Sequence[int],
        num_cached_tokens: int = 0,
        drafts: Sequence[int] = (),
    ) -> None:
        request_id, start, num_pending = request.request_id, request.next_start, request.num_pending_tokens
        samples = num_tokens - len(drafts) == num_pending
        if num_pending > 1 or request.is_prefill:
            self._prefills.add(request_id)
        self.requests[request_id] = request
        self._entries[request_id] = PlanEntry(
            request_id, start, num_tokens, samples, tuple(new_block_ids), num_cached_tokens, tuple(drafts)
        )
        request.num_scheduled_tokens += num_tokens
        if samples and self._config.async_scheduling:
            request.num_placeholders += 1
        self._budget_left -= num_tokens

    def _make_room(self, request: Request, num_tokens: int) -> Sequence[int] | None:
        """Blocks for a running request; preempts the least important, newest requests until they are there."""
        if num_tokens <= len(request.block_table) * self._blocks.block_size:
            return ()
        while (new_block_ids := self._blocks.allocate(request, num_tokens)) is None:
            victim = max(self._queues.running, key=queue_key)
            if self._queues.num_running == 1:
                raise InvariantError(f"{victim} runs alone and lacks blocks: {self._blocks.stats()}")
            self._preempt(victim)
            if victim is request:
                return None
        return new_block_ids

    def _preempt(self, victim: Request) -> None:
        entry = self._entries.pop(victim.request_id, None)
        if entry is not None:
            del self.requests[victim.request_id]
            self._budget_left += entry.num_tokens
            self._prefills.discard(victim.request_id)
        self._queues.preempt(victim)
        self._preempted.append(victim.request_id)
        self._head_reason = WAIT_PREEMPTING.format(preempted=len(self._preempted))

    def _why_not(self, request: Request, whole_prompts: bool) -> str | None:
        """The reason why the head of the queue cannot be admitted now, or None. Cheap questions first."""
        config, blocks = self._config, self._blocks
        if self._preempted:
            return self._head_reason
        if self._queues.num_running >= config.max_num_seqs:
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
        return self._account.why_not(request, self._queues.running)

    def _waits_for_first_choice(self, request: Request) -> bool:
        """True while a choice of the same request computes the prompt that this one can share afterwards."""
        if request.group_id is None:
            return False
        choices = [other for other in self._queues.running if other.group_id == request.group_id]
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
                block_ids=tuple(request.block_table[:num_shared]),
                sampling=RequestSampling(
                    request.sampling_params,
                    request.core.seed,
                    request.core.choice_index,
                    request.core.bad_words_token_ids,
                    request.core.eos_token_ids,
                ),
                hidden_states=request.core.hidden_states,
                capture=request.core.capture,
                steering=request.core.steering,
            )
        )
        self._queues.admit(request)
        num_cached = request.num_computed_tokens if self._blocks.enable_prefix_caching else 0
        self._take(request, self._chunk(request), new_block_ids, num_cached_tokens=num_cached)
