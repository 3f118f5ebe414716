"""Random and exhaustive worlds: whatever comes in whatever order, the promises of the scheduler hold.

`World` asserts after every call that each request ends at most once, that blocks and queues agree, that admission is
first come first served within a priority, and that no token attends to a cell that is not its own prefix. `check_end`
asserts that each ended exactly once, with the tokens and the ending it has alone, and that no block leaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations, product
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from utils.scheduler_world import EOS, World, make_request

from pellucid.errors import InvalidRequestError
from pellucid.scheduling.config import DraftConfig, SchedulerConfig
from pellucid.scheduling.request import EngineCoreRequest

MAX_MODEL_LEN = 14


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, groups, cancellations, failures and steps, also two steps in flight, in tiny worlds."""

    @initialize(
        policy=st.sampled_from(["mixed", "prefill_first"]),
        num_blocks=st.integers(2, 9),
        block_size=st.integers(1, 4),
        caching=st.booleans(),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(1, 12),
        chunk=st.none() | st.integers(1, 4),
        ahead=st.booleans(),
        drafts=st.none() | st.builds(DraftConfig, st.integers(1, 3), st.just(1), st.integers(1, 2), st.integers(1, 4)),
    )
    def build(
        self,
        policy: str,
        num_blocks: int,
        block_size: int,
        caching: bool,
        max_num_seqs: int,
        budget: int,
        chunk: int | None,
        ahead: bool,
        drafts: DraftConfig | None,
    ) -> None:
        config = SchedulerConfig(
            max_num_seqs,
            budget,
            MAX_MODEL_LEN,
            policy,  # type: ignore[arg-type]
            chunk if policy == "mixed" else None,
            async_scheduling=ahead,
            drafts=drafts,
        )
        self.world = World(config, num_blocks, block_size, caching)
        self.num_added = 0

    def submit(self, core: EngineCoreRequest) -> None:
        try:
            self.world.add(core)
        except InvalidRequestError:
            assert core.request_id not in self.world.cores

    @rule(
        length=st.integers(1, MAX_MODEL_LEN),
        beginning=st.sampled_from([1, 2]),
        max_tokens=st.integers(1, 8),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        salt=st.sampled_from([None, None, "s"]),
        min_tokens=st.sampled_from([0, 0, 2]),
        stop_token_ids=st.sampled_from([[], [3]]),
        prompt_logprobs=st.sampled_from([None, None, None, 1]),
        spread=st.booleans(),
    )
    def add(
        self,
        length: int,
        beginning: int,
        max_tokens: int,
        n: int,
        priority: int,
        salt: str | None,
        min_tokens: int,
        stop_token_ids: list[int],
        prompt_logprobs: int | None,
        spread: bool,
    ) -> None:
        """`spread`: choices of one request get different priorities, which no caller does but nothing forbids."""
        self.num_added += 1
        for index in range(n):
            self.submit(
                make_request(
                    f"{self.num_added}-{index}",
                    (beginning,) * length,
                    max_tokens,
                    eos=(EOS,),
                    group_id=str(self.num_added) if n > 1 else None,
                    choice_index=index,
                    priority=priority - index if spread else priority,
                    cache_salt=salt,
                    seed=self.num_added % 3,
                    min_tokens=min(min_tokens, max_tokens),
                    stop_token_ids=stop_token_ids,
                    prompt_logprobs=prompt_logprobs,
                )
            )

    @precondition(lambda self: self.world.cores)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.cancel(data.draw(st.sampled_from(sorted(self.world.cores))))

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @precondition(lambda self: self.world.scheduler.has_unfinished)
    @rule(data=st.data())
    def step_with_a_failure(self, data: st.DataObject) -> None:
        plan = self.world.schedule()
        ids = [entry.request_id for entry in plan.entries]
        self.world.finish(plan, fail=frozenset({data.draw(st.sampled_from(ids))} if ids else ()))

    @precondition(lambda self: self.world.scheduler.has_unfinished)
    @rule(data=st.data())
    def step_with_a_cancellation_in_flight(self, data: st.DataObject) -> None:
        plan = self.world.schedule()
        self.world.finish(plan, cancel=data.draw(st.sampled_from(sorted(self.world.cores))))

    @rule()
    def two_steps_in_flight(self) -> None:
        plans = [self.world.schedule(), self.world.schedule()]
        for plan in plans:
            self.world.finish(plan)

    @rule()
    def reset_prefix_cache(self) -> None:
        was_idle = self.world.blocks.num_used_blocks == 0
        assert self.world.blocks.reset_prefix_cache() == was_idle

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            total = sum(len(core.prompt_token_ids) + core.max_tokens for core in self.world.cores.values())
            self.world.drain(max_steps=10 * total)
            self.world.check_end()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=400, stateful_step_count=40, deadline=None, derandomize=True)


# ---- all small worlds -----------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c")
CASES = {
    "strangers": (
        make_request("a", (1, 1, 1), max_tokens=4, eos=()),
        make_request("b", (2, 2, 2, 2), max_tokens=3, eos=()),
        make_request("c", (3,), max_tokens=6, eos=()),
    ),
    "one prompt, two choices and an important stranger": (
        make_request("a", (1, 1, 1, 1, 1), max_tokens=3, group_id="g", choice_index=0, seed=2),
        make_request("b", (1, 1, 1, 1, 1), max_tokens=3, group_id="g", choice_index=1, seed=2),
        make_request("c", (1, 1), max_tokens=5, priority=-1, seed=1),
    ),
}


def arrival_orders() -> Iterator[list[tuple[str, ...]]]:
    """For each step who arrives before it: all orders of three arrivals, spread over steps 0, 1 and 3 in all ways."""
    for order in permutations(NAMES):
        for times in ((0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 3), (0, 3, 3)):
            yield [
                tuple(name for name, time in zip(order, times, strict=True) if time == step)
                for step in range(max(times) + 1)
            ]


def run_small_world(world: World, arrivals: list[tuple[str, ...]], cancels: dict[str, int], case: str) -> int:
    """Run one world to its end: arrivals, then the cancellations that are due, then a step."""
    cores = {core.request_id: core for core in CASES[case]}
    num_steps = 0
    for step in range(max(len(arrivals), 1 + max(cancels.values(), default=0))):
        for name in arrivals[step] if step < len(arrivals) else ():
            world.add(cores[name])
        for name, time in cancels.items():
            if time == step and name in world.cores:
                world.cancel(name)
        world.step()
        num_steps += 1
    num_steps += world.drain(max_steps=60)
    world.check_end()
    return num_steps


WAYS: dict[str, dict[str, object]] = {
    "step by step": {},
    "ahead": {"async_scheduling": True},
    "drafts": {"drafts": DraftConfig(2, 1, 2, max_num_seqs=3)},
    "ahead, with drafts for one alone": {"async_scheduling": True, "drafts": DraftConfig(2, 1, 2, max_num_seqs=1)},
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("policy", ["mixed", "prefill_first"])
def test_three_requests_in_four_blocks_when_all_orders_are_tried_then_each_ends_once(
    policy: str, caching: bool, case: str, way: str
) -> None:
    """Each of 30 orders of arrival, with each request cancelled never or before step 1, 2 or 4."""
    options: dict[str, Any] = {"policy": policy, **WAYS[way]}
    config = SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=5, max_model_len=20, **options)
    num_worlds, num_preemptions, num_accepted = 0, 0, 0
    for arrivals in arrival_orders():
        for times in product((None, 1, 2, 4), repeat=3):
            cancels = {name: time for name, time in zip(NAMES, times, strict=True) if time is not None}
            world = World(config, num_blocks=4, block_size=2, caching=caching)
            run_small_world(world, arrivals, cancels, case)
            num_worlds += 1
            num_preemptions += sum(record.num_preemptions for record in world.records.values())
            num_accepted += world.num_accepted
    assert num_worlds == 30 * 64
    assert num_preemptions > 0, "the worlds are too large to test anything"
    assert (num_accepted > 0) == (config.drafts is not None)
