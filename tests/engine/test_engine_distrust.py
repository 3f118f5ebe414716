"""What a failed request leaves in the prefix cache: nothing that it computed, and all that it shared."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from utils.neighbours import NAN_TOKEN, Asked, World, build_model, prompt_of
from utils.scheduler_world import running_request

from pellucid.api.outputs import RequestOutput
from pellucid.api.sampling_params import SamplingParams
from pellucid.scheduling.block_manager import BlockManager
from pellucid.scheduling.request import Request


def compute(manager: BlockManager, request: Request, num_tokens: int | None = None) -> None:
    """Allocate and compute the first tokens of a request, or all."""
    num_tokens = request.num_tokens if num_tokens is None else num_tokens
    assert manager.allocate(request, num_tokens) is not None
    request.num_computed_tokens = num_tokens
    manager.cache_full_blocks(request, num_tokens)


def fail(manager: BlockManager, request: Request) -> None:
    manager.free(request, discard=True)


def hits(manager: BlockManager, length: int) -> int:
    """Tokens that a stranger with a prompt of this length finds."""
    return manager.lookup(running_request("stranger", length))[1]


def test_failed_request_when_it_shared_an_earlier_one_s_blocks_then_those_stay() -> None:
    manager = BlockManager(16, 4)
    healthy, failed = running_request("healthy", 9), running_request("failed", 21)
    compute(manager, healthy)
    manager.free(healthy)
    compute(manager, failed)
    assert failed.num_cached_tokens == 8
    assert hits(manager, 25) == 20
    fail(manager, failed)
    assert hits(manager, 25) == 8
    manager.check_invariants([])


def test_failed_request_when_it_had_been_preempted_then_what_it_left_behind_goes_too() -> None:
    manager = BlockManager(16, 4)
    failed = running_request("failed", 17)
    compute(manager, failed)
    manager.free(failed)  # as a preemption does
    assert hits(manager, 25) == 16
    fail(manager, failed)
    assert hits(manager, 25) == 0
    manager.check_invariants([])


def test_failed_request_when_its_old_blocks_belong_to_others_by_now_then_theirs_stay() -> None:
    manager = BlockManager(2, 4)
    failed, other = running_request("failed", 8), running_request("other", tuple(range(20, 28)))
    compute(manager, failed)
    manager.free(failed)
    compute(manager, other)
    fail(manager, failed)
    assert manager.lookup(running_request("r", tuple(range(20, 29))))[1] == 8
    manager.check_invariants([other])


def test_failed_request_when_others_hold_its_blocks_then_they_keep_them_but_nobody_finds_them() -> None:
    """The neighbour goes on; neither its blocks nor those that stand on them come into the cache again."""
    manager = BlockManager(16, 4)
    failed, neighbour = running_request("failed", 9), running_request("neighbour", 17)
    compute(manager, failed)
    compute(manager, neighbour)
    assert hits(manager, 25) == 16
    fail(manager, failed)
    assert hits(manager, 25) == 0
    manager.check_invariants([neighbour])
    neighbour.token_ids += [17, 18, 19, 20]
    compute(manager, neighbour)
    assert hits(manager, 25) == 0, "the first two blocks are the failed one's"
    again = running_request("again", 9)
    compute(manager, again)
    assert hits(manager, 25) == 8, "computed anew, by one who did not fail"
    manager.free(neighbour)
    manager.free(again)
    assert hits(manager, 25) == 8
    manager.check_invariants([])


def test_block_of_a_failed_request_when_reused_then_it_is_cached_like_any_other() -> None:
    manager = BlockManager(4, 4)
    failed, neighbour = running_request("failed", 8), running_request("neighbour", 9)
    compute(manager, failed)
    compute(manager, neighbour)
    fail(manager, failed)
    manager.free(neighbour)
    compute(manager, running_request("fresh", 16))
    assert hits(manager, 17) == 16


def test_random_worlds_when_some_fail_then_no_hit_stands_on_a_failed_request() -> None:
    """Each block remembers who computed it and on whose blocks; a hit on one that failed, directly or below, is a fault."""
    draw = random.Random(5)
    for _ in range(200):
        manager, running, author, failed = BlockManager(24, 2), list[Request](), dict[int, set[str]](), set[str]()
        for number in range(30):
            if len(running) < 4 and draw.random() < 0.6:
                prompt = tuple(draw.choice([1, 2]) for _ in range(draw.randint(1, 8)))
                request = running_request(f"r{number}", prompt)
                shared, _ = manager.lookup(request)
                for block_id in shared:
                    assert not author[block_id] & failed, f"{author[block_id]} failed"
                if manager.allocate(request, request.num_tokens) is None:
                    continue
                running.append(request)
                below: set[str] = set()
                for index, block_id in enumerate(request.block_table):
                    if index >= len(shared):
                        author[block_id] = below | {request.request_id}
                    below = author[block_id]
                request.num_computed_tokens = draw.randint(request.num_computed_tokens, request.num_tokens)
            elif running:
                request = draw.choice(running)
                request.num_computed_tokens = request.num_tokens
            else:
                continue
            manager.cache_full_blocks(request, request.num_computed_tokens)
            if draw.random() < 0.4:
                running.remove(request)
                is_failure = draw.random() < 0.5
                failed |= {request.request_id} if is_failure else set()
                manager.free(request, discard=is_failure)
            manager.check_invariants(running)


# ---- with a model ---------------------------------------------------------------------------------------------------------

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
SHARED = prompt_of(24, 9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("distrust"))


def run(world: World, request_id: str, prompt: list[int], params: SamplingParams = PARAMS) -> RequestOutput:
    world.submit(Asked(prompt, params), request_id)
    return world.run()[request_id]


@pytest.mark.parametrize("ahead", [False, True], ids=["step by step", "plans ahead"])
@pytest.mark.parametrize("budget", [64, 8], ids=["whole", "chunks"])
def test_request_when_its_logits_are_not_finite_then_later_ones_do_not_hit_its_blocks(
    model: Path, ahead: bool, budget: int
) -> None:
    bad = [*SHARED, NAN_TOKEN, *prompt_of(15, 10)]
    world = World(model, async_scheduling=ahead, max_num_batched_tokens=budget)
    try:
        assert run(world, "first", bad).outputs[0].finish_reason == "error"
        assert world.engine.block_manager.num_cached_blocks == 0
        healthy = run(world, "healthy", [*SHARED, 5])
        assert (healthy.num_cached_tokens, healthy.outputs[0].finish_reason) == (0, "length")
        second = run(world, "second", bad)
        assert (second.num_cached_tokens, second.outputs[0].finish_reason) == (24, "error"), "the healthy one's"
        last = run(world, "last", [*SHARED, 5])
        assert last.num_cached_tokens == 24
        assert last.outputs[0].token_ids == healthy.outputs[0].token_ids
    finally:
        world.close()


def test_requests_of_any_error_when_ended_then_nothing_of_them_is_cached(model: Path) -> None:
    """An error of the whole step, of the executor and of the output: all endings go the same way."""

    def raising(*_: object) -> None:
        raise RuntimeError("planted")

    for target, name in (("executor", "execute"), ("output", "add_token")):
        world = World(model)
        try:
            world.submit(Asked(prompt_of(20, 11), SamplingParams(**{**vars(PARAMS), "max_tokens": 30})), "r")
            for _ in range(5):
                world.step()
            assert world.engine.block_manager.num_used_blocks == 6
            setattr(getattr(world.engine, target), name, raising)
            assert world.run()["r"].outputs[0].finish_reason == "error"
            assert world.engine.block_manager.num_cached_blocks == 0
        finally:
            world.close()
