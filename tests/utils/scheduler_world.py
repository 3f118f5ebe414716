"""A world for the scheduler: a fake executor with a fake KV memory, and books that must balance after every step.

The executor knows of requests only what plans tell it. It writes into each KV cell a digest of the whole prefix that
the cell stands for and compares, before it computes a token, every cell that the token would attend to. So a block that
is shared too early, reused too soon or shared with the wrong request shows as a wrong digest.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from pellucid.api.sampling_params import SamplingParams
from pellucid.contract.plan import AcceptedDraft, ModelRunnerOutput, NewRequest, PlanEntry, StepPlan
from pellucid.scheduling.block_manager import BlockManager
from pellucid.scheduling.config import SchedulerConfig
from pellucid.scheduling.request import EngineCoreRequest, Request, RequestStatus
from pellucid.scheduling.scheduler import RequestScheduler, TokenEvent

EOS = 0
VOCABULARY = 7
FAILED = -1  # stands where a failed step has no token


def make_request(
    request_id: str,
    prompt: tuple[int, ...] | int,
    max_tokens: int = 4,
    eos: tuple[int, ...] = (),
    group_id: str | None = None,
    choice_index: int = 0,
    priority: int = 0,
    cache_salt: str | None = None,
    adapter: str | None = None,
    seed: int = 0,
    **sampling: object,
) -> EngineCoreRequest:
    """A request; a prompt given as a number is 0, 1, 2, ... of that length."""
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=tuple(range(prompt)) if isinstance(prompt, int) else prompt,
        sampling_params=SamplingParams(max_tokens=max_tokens, **sampling),  # type: ignore[arg-type]
        seed=seed,
        max_tokens=max_tokens,
        eos_token_ids=eos,
        group_id=group_id,
        choice_index=choice_index,
        priority=priority,
        cache_salt=cache_salt,
        adapter=adapter,
    )


def running_request(request_id: str, prompt: tuple[int, ...] | int, **options: object) -> Request:
    """A request as it stands after admission, for tests of the block manager alone."""
    request = Request(make_request(request_id, prompt, **options))  # type: ignore[arg-type]
    request.transition(RequestStatus.RUNNING)
    return request


def next_token(tokens: list[int], seed: int, choice_index: int) -> int:
    """The fake model: a function of all tokens so far and of the request's own randomness. Now and then it says its last
    token again, so that drafts come true."""
    value = 17 * seed + 5 * choice_index + 3
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return tokens[-1] if value % 3 == 0 else value % VOCABULARY


def prefix_digests(tokens: list[int]) -> list[int]:
    """For each position, a digest of the tokens up to and including it."""
    digests, value = [], 1
    for token in tokens:
        value = hash((value, token))
        digests.append(value)
    return digests


def expected_outcome(
    core: EngineCoreRequest, max_model_len: int, num_slots: int
) -> tuple[list[int], RequestStatus, int | None]:
    """Outputs, ending and stop reason of a request that runs alone, by the rules and without a scheduler."""
    tokens, outputs, params = list(core.prompt_token_ids), [], core.sampling_params
    while True:
        token = next_token(tokens, core.seed, core.choice_index)
        tokens.append(token)
        outputs.append(token)
        if len(outputs) > params.min_tokens:
            if token in core.eos_token_ids and not params.ignore_eos:
                return outputs, RequestStatus.FINISHED_STOPPED, None
            if token in params.stop_token_ids:
                return outputs, RequestStatus.FINISHED_STOPPED, token
        if len(outputs) >= core.max_tokens or len(tokens) >= max_model_len:
            return outputs, RequestStatus.FINISHED_LENGTH, None
        if len(tokens) > num_slots:
            return outputs, RequestStatus.FINISHED_ERROR, None


@dataclass
class _Known:
    """What the executor knows of a request."""

    new: NewRequest
    tokens: list[int]
    blocks: list[int]


class FakeExecutor:
    """Computes digests instead of attention."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.cells: list[int | None] = [None] * (num_blocks * block_size)
        self.known: dict[str, _Known] = {}

    def execute(self, plan: StepPlan, fail: frozenset[str] = frozenset()) -> ModelRunnerOutput:
        for request_id in (*plan.finished, *plan.preempted):
            self.known.pop(request_id, None)
        for new in plan.new_requests:
            assert new.request_id not in self.known
            tokens = [*new.prompt_token_ids, *new.output_token_ids]
            self.known[new.request_id] = _Known(new, tokens, list(new.block_ids))
        for entry in plan.entries:
            self.known[entry.request_id].blocks += entry.new_block_ids
        for entry in plan.entries:
            self._check_prefix(entry)
        for entry in plan.entries:
            self._write(entry)
        errors: dict[str, str] = {}
        sampled: dict[str, int] = {}
        accepted: dict[str, list[AcceptedDraft]] = {}
        for entry in plan.entries:
            if entry.request_id in fail:
                errors[entry.request_id] = "logits are not finite"
                self.known[entry.request_id].tokens.append(FAILED)  # plans in flight go on with something
            elif entry.samples:
                *drafts, sampled[entry.request_id] = self._sample(entry)
                if drafts:
                    accepted[entry.request_id] = [AcceptedDraft(token) for token in drafts]
        return ModelRunnerOutput(sampled_token_ids=sampled, errors=errors, accepted_drafts=accepted)

    def _slots(self, known: _Known, start: int, end: int) -> list[int]:
        size = self.block_size
        return [known.blocks[position // size] * size + position % size for position in range(start, end)]

    def _check_prefix(self, entry: PlanEntry) -> None:
        known = self.known[entry.request_id]
        expected = prefix_digests(known.tokens[: entry.start])
        assert [self.cells[slot] for slot in self._slots(known, 0, entry.start)] == expected

    def _write(self, entry: PlanEntry) -> None:
        known = self.known[entry.request_id]
        end = entry.start + entry.num_tokens
        tokens = known.tokens[: end - len(entry.draft_token_ids)] + list(entry.draft_token_ids)
        assert end == len(tokens)
        for slot, digest in zip(
            self._slots(known, entry.start, end), prefix_digests(tokens)[entry.start :], strict=True
        ):
            num_owners = sum(slot // self.block_size in other.blocks for other in self.known.values())
            assert num_owners == 1 or self.cells[slot] == digest, "a shared block is overwritten with something else"
            self.cells[slot] = digest

    def _sample(self, entry: PlanEntry) -> list[int]:
        """The accepted drafts and the token behind them."""
        known, sampled = self.known[entry.request_id], []
        for draft in (*entry.draft_token_ids, None):
            sampled.append(next_token(known.tokens, known.new.sampling.seed, known.new.sampling.choice_index))
            known.tokens.append(sampled[-1])
            if sampled[-1] != draft:
                break
        return sampled


@dataclass
class World:
    """Scheduler + fake executor + everything that is promised about them, asserted as it happens."""

    config: SchedulerConfig
    num_blocks: int
    block_size: int
    caching: bool
    cores: dict[str, EngineCoreRequest] = field(default_factory=dict)
    records: dict[str, Request] = field(default_factory=dict)
    endings: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    disturbed: set[str] = field(default_factory=set)  # cancelled or failed: their outcome is not the model's alone

    def __post_init__(self) -> None:
        self.blocks = BlockManager(self.num_blocks, self.block_size, self.caching)
        self.scheduler = RequestScheduler(self.config, self.blocks)
        self.executor = FakeExecutor(self.num_blocks, self.block_size)
        self.announced: Counter[str] = Counter()
        self.in_flight: deque[StepPlan] = deque()
        self.num_accepted = 0

    def add(self, core: EngineCoreRequest) -> Request:
        request = self.scheduler.add(core)
        self.cores[core.request_id], self.records[core.request_id] = core, request
        self.tokens[core.request_id] = []
        return request

    def cancel(self, request_id: str) -> None:
        was_living = not self.records[request_id].is_finished
        assert self.scheduler.cancel(request_id)
        if was_living:
            self.endings[request_id] += 1
            self.disturbed.add(request_id)
        self.check()

    def schedule(self) -> StepPlan:
        never_admitted = {r.request_id for r in self.scheduler.waiting if r.status is RequestStatus.WAITING}
        plan = self.scheduler.schedule()
        self.announced.update(plan.finished)
        self._check_plan(plan)
        self._check_order(plan, never_admitted)
        self.check()
        self.in_flight.append(plan)
        return plan

    def finish(self, plan: StepPlan, fail: frozenset[str] = frozenset(), cancel: str | None = None) -> list[TokenEvent]:
        """Execute and apply a plan, after those before it; `cancel` names a request that is cancelled in between."""
        while self.in_flight[0] is not plan:
            self.finish(self.in_flight[0])
        self.in_flight.popleft()
        output = self.executor.execute(plan, fail)
        self.num_accepted += sum(map(len, output.accepted_drafts.values()))
        if cancel is not None:
            self.cancel(cancel)
        living = set(self.scheduler.living(plan))
        events = self.scheduler.apply(plan, output)
        for event in events:
            assert not self.endings[event.request_id], "an event after the end"
            if event.token_id is not None:
                self.tokens[event.request_id].append(event.token_id)
            if event.finish_status is not None:
                self.endings[event.request_id] += 1
        self.disturbed |= fail & set(output.errors) & living
        self.check()
        return events

    def step(self) -> StepPlan:
        """A step as the engine takes it: with `async_scheduling` the one after it is planned before its results are there."""
        if not self.in_flight:
            self.schedule()
        if self.config.async_scheduling and not self.scheduler.drafts_now:
            self.schedule()
        plan = self.in_flight[0]
        self.finish(plan)
        return plan

    def drain(self, max_steps: int) -> int:
        """Run until all has ended; returns the number of steps."""
        num_steps, num_idle = 0, 0
        while self.scheduler.has_unfinished:
            assert num_steps < max_steps, f"livelock: {list(self.scheduler)}"
            plan = self.step()
            num_idle = num_idle + 1 if plan.kind == "none" and not self.in_flight else 0
            # A plan made ahead cannot know that the one in flight makes room.
            assert num_idle <= self.config.async_scheduling, "nothing runs although requests wait"
            num_steps += 1
        return num_steps

    def check(self) -> None:
        self.scheduler.check_invariants()
        assert self.scheduler.num_running <= self.config.max_num_seqs
        for request_id, request in self.records.items():
            assert self.endings[request_id] == int(request.is_finished)

    def check_end(self) -> None:
        """All ended once, said so once, said what they say alone, and nothing leaks."""
        while self.in_flight:
            self.finish(self.in_flight[0])
        self.announced.update(self.scheduler.schedule().finished)
        stats = self.blocks.stats()
        assert stats["used_blocks"] == 0
        assert stats["free_blocks"] == self.num_blocks
        if not self.caching:
            assert stats["prefix_hits"] == stats["prefix_misses"] == stats["prefix_saved_tokens"] == 0
        for request_id, core in self.cores.items():
            record = self.records[request_id]
            assert self.endings[request_id] == self.announced[request_id] == 1
            assert record.output_token_ids == self.tokens[request_id]
            outputs, status, stop_reason = expected_outcome(
                core, self.config.max_model_len, self.num_blocks * self.block_size
            )
            if request_id in self.disturbed:
                assert record.output_token_ids == outputs[: record.num_output_tokens]
            else:
                assert (record.output_token_ids, record.status, record.stop_reason) == (outputs, status, stop_reason)
            assert self.scheduler.forget(request_id)

    def _check_plan(self, plan: StepPlan) -> None:
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        assert (plan.kind == "none") == (not plan.entries)
        assert set(plan.waiting) == {r.request_id for r in self.scheduler.waiting}
        assert not (plan.preempted and plan.new_requests)
        assert len({entry.request_id for entry in plan.entries}) == len(plan.entries)
        for entry in plan.entries:
            request = self.records[entry.request_id]
            assert entry.num_tokens > 0
            known = request.num_tokens + request.num_placeholders
            known -= int(entry.samples and self.config.async_scheduling)  # the token that this entry brings
            assert entry.samples == (entry.start + entry.num_tokens - len(entry.draft_token_ids) == known)
        if self.scheduler.policy.whole_prompts:
            whole = {r.request_id for r in plan.new_requests if not r.output_token_ids}
            assert all(entry.samples for entry in plan.entries if entry.request_id in whole)

    def _check_order(self, plan: StepPlan, never_admitted: set[str]) -> None:
        """Whoever was admitted for the first time was more important, or came earlier, than all who still wait."""
        admitted = [self.records[new.request_id] for new in plan.new_requests if new.request_id in never_admitted]
        for request in admitted:
            assert all(request.queue_key < other.queue_key for other in self.scheduler.waiting)
