"""Owners of blocks, the prefix cache and its numbers."""

from __future__ import annotations

import pytest
from utils.scheduler_world import running_request

from pellucid.errors import ConfigError, InvariantError
from pellucid.scheduling.block_manager import BlockManager
from pellucid.scheduling.request import Request, RequestStatus

STAT_KEYS = {
    "block_size",
    "num_blocks",
    "used_blocks",
    "peak_used_blocks",
    "free_blocks",
    "usage",
    "prefix_hits",
    "prefix_misses",
    "prefix_saved_tokens",
}


def compute(manager: BlockManager, request: Request) -> list[int]:
    """Allocate and compute all tokens of a request."""
    new_block_ids = manager.allocate(request, request.num_tokens)
    assert new_block_ids is not None
    request.num_computed_tokens = request.num_tokens
    manager.cache_full_blocks(request, request.num_tokens)
    return new_block_ids


def numbers(manager: BlockManager, *keys: str) -> list[int | float]:
    stats = manager.stats()
    return [stats[key] for key in keys]


def test_donor_and_sharer_when_run_in_two_rounds_then_the_specified_numbers_hold() -> None:
    """Block size 4, 8 blocks; an 8-token donor, then a 9-token request that begins with the same 8 tokens; twice."""
    manager = BlockManager(8, 4)
    donor, sharer = running_request("donor", 8), running_request("sharer", 9)
    assert compute(manager, donor) == [0, 1]
    assert manager.lookup(sharer) == ([0, 1], 8)
    assert compute(manager, sharer) == [2]
    assert sharer.num_cached_tokens == 8
    assert [manager.num_owners(block_id) for block_id in range(3)] == [2, 2, 1]
    assert numbers(manager, "prefix_hits", "prefix_misses", "prefix_saved_tokens") == [1, 1, 8]
    assert numbers(manager, "used_blocks", "free_blocks", "usage") == [3, 5, 0.375]
    manager.check_invariants([donor, sharer])
    manager.free(donor)
    manager.free(sharer)
    assert numbers(manager, "used_blocks", "free_blocks") == [0, 8]

    for name, length in (("donor again", 8), ("sharer again", 9)):
        compute(manager, running_request(name, length))
    assert numbers(manager, "prefix_hits", "prefix_misses", "prefix_saved_tokens") == [3, 1, 24]
    assert numbers(manager, "used_blocks", "peak_used_blocks") == [3, 3]
    assert set(manager.stats()) == STAT_KEYS


def test_caching_off_when_prompts_repeat_then_nothing_is_shared_or_counted() -> None:
    manager = BlockManager(8, 4, enable_prefix_caching=False)
    first, second = running_request("a", 8), running_request("b", 9)
    compute(manager, first)
    assert manager.lookup(second) == ([], 0)
    compute(manager, second)
    assert numbers(manager, "prefix_hits", "prefix_misses", "prefix_saved_tokens") == [0, 0, 0]
    assert manager.stats()["used_blocks"] == 5
    manager.check_invariants([first, second])


def test_prompt_of_20_when_blocks_hold_16_then_two_are_used() -> None:
    manager = BlockManager(8, 16)
    compute(manager, running_request("r", 20))
    assert manager.stats()["used_blocks"] == 2


@pytest.mark.parametrize(("length", "shared", "cached"), [(8, [0, 1], 7), (9, [0, 1], 8), (7, [0], 4), (3, [], 0)])
def test_request_within_a_cached_prompt_when_looked_up_then_its_last_token_is_still_computed(
    length: int, shared: list[int], cached: int
) -> None:
    manager = BlockManager(8, 4)
    compute(manager, running_request("donor", 8))
    request = running_request("r", length)
    assert manager.lookup(request) == (shared, cached)
    manager.allocate(request, length)
    assert request.num_computed_tokens == cached


def test_blocks_that_are_full_but_not_computed_when_looked_up_then_they_are_not_shared() -> None:
    manager = BlockManager(8, 4)
    donor, request = running_request("donor", 12), running_request("r", 12)
    manager.allocate(donor, 12)
    assert manager.lookup(request) == ([], 0)
    manager.cache_full_blocks(donor, 7)
    assert manager.lookup(request) == ([0], 4)
    manager.cache_full_blocks(donor, 12)
    assert manager.lookup(request) == ([0, 1, 2], 11)


@pytest.mark.parametrize("options", [{"cache_salt": "s"}, {"adapter": "a"}, {"prompt_logprobs": 1}])
def test_request_that_differs_in_more_than_tokens_when_looked_up_then_it_gets_no_hit(
    options: dict[str, object],
) -> None:
    manager = BlockManager(8, 4)
    compute(manager, running_request("donor", 8))
    assert manager.lookup(running_request("r", 9, **options)) == ([], 0)


def test_equal_salts_when_looked_up_then_they_share() -> None:
    manager = BlockManager(8, 4)
    compute(manager, running_request("donor", 8, cache_salt="s"))
    assert manager.lookup(running_request("r", 9, cache_salt="s")) == ([0, 1], 8)


def test_equal_hashes_of_different_tokens_when_looked_up_then_no_block_is_shared() -> None:
    manager = BlockManager(8, 4)
    donor = running_request("donor", (1, 2, 3, 4, 5))
    compute(manager, donor)
    other = running_request("other", (9, 9, 9, 9, 5))
    other.block_hashes = list(donor.block_hashes)  # as if the hash had collided
    assert manager.lookup(other) == ([], 0)


def test_same_tokens_behind_different_beginnings_when_looked_up_then_no_block_is_shared() -> None:
    manager = BlockManager(8, 4)
    compute(manager, running_request("donor", (1, 1, 1, 1, 5, 5, 5, 5)))
    compute(manager, running_request("other beginning", (2, 2, 2, 2)))
    assert manager.lookup(running_request("r", (2, 2, 2, 2, 5, 5, 5, 5, 0))) == ([2], 4)


def test_freed_request_when_blocks_run_short_then_its_tail_is_reused_before_its_beginning() -> None:
    manager = BlockManager(4, 4)
    donor = running_request("donor", 16)
    compute(manager, donor)
    manager.free(donor)
    compute(manager, running_request("other", (7, 7, 7, 7, 7)))
    assert manager.lookup(running_request("r", 16)) == ([0, 1], 8)


def test_two_freed_requests_when_blocks_run_short_then_the_one_freed_first_goes_first() -> None:
    manager = BlockManager(4, 4)
    old, young = running_request("old", (1,) * 8), running_request("young", (2,) * 8)
    compute(manager, young)
    compute(manager, old)
    manager.free(old)
    manager.free(young)
    compute(manager, running_request("other", (3,) * 8))
    assert manager.lookup(running_request("r", (1,) * 9)) == ([], 0)
    assert manager.lookup(running_request("s", (2,) * 9)) == ([0, 1], 8)


def test_blocks_that_nobody_can_share_when_freed_then_they_are_reused_before_cached_ones() -> None:
    manager = BlockManager(3, 4)
    cached, partial = running_request("cached", 8), running_request("partial", (9, 9))
    compute(manager, cached)
    compute(manager, partial)
    manager.free(cached)
    manager.free(partial)
    assert manager.allocate(running_request("other", (8, 8)), 2) == [2]


def test_too_few_blocks_when_allocated_then_nothing_changes() -> None:
    manager = BlockManager(4, 4)
    donor = running_request("donor", 8)
    compute(manager, donor)
    manager.free(donor)
    holder = running_request("holder", (9,) * 8)
    compute(manager, holder)  # takes the two blocks never used
    before = manager.stats()
    request = running_request("r", 9)  # 2 cached blocks that lie in the free queue + 1 that does not exist
    assert manager.num_blocks_needed(request, 9) == 3
    assert manager.allocate(request, 9) is None
    assert manager.stats() == before
    assert (request.block_table, request.num_computed_tokens) == ([], 0)
    manager.check_invariants([holder])


def test_growing_request_when_its_block_is_full_then_exactly_one_is_added() -> None:
    manager = BlockManager(4, 4)
    request = running_request("r", 4)
    assert manager.allocate(request, 4) == [0]
    assert manager.allocate(request, 5) == [1]
    assert manager.allocate(request, 8) == []
    assert request.block_table == [0, 1]


def test_two_who_computed_the_same_when_one_leaves_then_the_other_still_donates() -> None:
    manager = BlockManager(8, 4)
    first, second = running_request("a", 8), running_request("b", 8)
    manager.allocate(first, 8)
    manager.allocate(second, 8)
    for request in (first, second):
        request.num_computed_tokens = 8
        manager.cache_full_blocks(request, 8)
    manager.check_invariants([first, second])
    manager.free(second)
    assert manager.lookup(running_request("r", 9)) == ([0, 1], 8)
    manager.check_invariants([first])


def test_group_with_caching_off_when_its_prompt_is_computed_then_choices_share_until_the_last_leaves() -> None:
    manager = BlockManager(8, 4, enable_prefix_caching=False)
    choices = [running_request(f"r-{index}", 9, group_id="r", choice_index=index) for index in range(3)]
    for choice in choices:
        compute(manager, choice)
    stranger = running_request("s-0", 9, group_id="s")
    assert manager.stats()["used_blocks"] == 2 + 3
    assert [choice.num_cached_tokens for choice in choices] == [0, 0, 0]
    assert numbers(manager, "prefix_hits", "prefix_misses", "prefix_saved_tokens") == [0, 0, 0]
    assert manager.lookup(stranger) == ([], 0)
    manager.free(choices[0])
    late = running_request("r-3", 9, group_id="r", choice_index=3)
    assert manager.lookup(late) == ([0, 1], 8)
    manager.free(choices[1])
    manager.free(choices[2])
    assert manager.lookup(late) == ([], 0)
    assert manager.stats()["free_blocks"] == 8
    manager.check_invariants([])


def test_failed_request_when_its_blocks_are_discarded_then_nobody_shares_them() -> None:
    manager = BlockManager(8, 4)
    failed = running_request("failed", 8)
    compute(manager, failed)
    manager.free(failed, discard=True)
    assert manager.lookup(running_request("r", 9)) == ([], 0)
    manager.check_invariants([])


def test_preempted_request_when_it_comes_back_then_it_counts_neither_hit_nor_miss_again() -> None:
    manager = BlockManager(8, 4)
    request = running_request("r", 8)
    compute(manager, request)
    manager.free(request)
    request.num_preemptions = 1
    manager.allocate(request, 8)
    assert request.num_computed_tokens == 7
    assert request.num_cached_tokens == 0
    assert numbers(manager, "prefix_hits", "prefix_misses", "prefix_saved_tokens") == [0, 1, 0]


def test_prefix_cache_when_reset_then_only_an_idle_one_forgets() -> None:
    manager = BlockManager(8, 4)
    donor = running_request("donor", 8)
    compute(manager, donor)
    assert not manager.reset_prefix_cache()
    assert manager.lookup(running_request("r", 9)) == ([0, 1], 8)
    manager.free(donor)
    assert manager.reset_prefix_cache()
    assert manager.lookup(running_request("s", 9)) == ([], 0)
    manager.check_invariants([])


def test_model_fingerprints_when_they_differ_then_chains_differ() -> None:
    digests = []
    for fingerprint in ("one", "other"):
        manager = BlockManager(8, 4, model_fingerprint=fingerprint)
        request = running_request("r", 4)
        compute(manager, request)
        digests += request.block_hashes
    assert digests[0] != digests[1]


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0)])
def test_impossible_sizes_when_made_then_they_are_refused_with_their_values(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ConfigError, match=f"num_blocks {num_blocks} and block_size {block_size}"):
        BlockManager(num_blocks, block_size)


def _leak(manager: BlockManager, request: Request) -> list[Request]:
    return []


def _lose_a_block(manager: BlockManager, request: Request) -> list[Request]:
    request.block_table.pop()
    return [request]


def _hold_twice(manager: BlockManager, request: Request) -> list[Request]:
    request.block_table[1] = request.block_table[0]
    return [request]


def _hold_after_the_end(manager: BlockManager, request: Request) -> list[Request]:
    request.transition(RequestStatus.FINISHED_STOPPED)
    return [request]


def _change_tokens(manager: BlockManager, request: Request) -> list[Request]:
    request.token_ids[0] += 1
    return [request]


def _compute_beyond_blocks(manager: BlockManager, request: Request) -> list[Request]:
    request.num_computed_tokens = 9
    return [request]


@pytest.mark.parametrize(
    "damage", [_leak, _lose_a_block, _hold_twice, _hold_after_the_end, _change_tokens, _compute_beyond_blocks]
)
def test_damaged_books_when_checked_then_the_check_fails(damage) -> None:  # type: ignore[no-untyped-def]
    manager = BlockManager(8, 4)
    request = running_request("r", 8)
    compute(manager, request)
    manager.check_invariants([request])
    with pytest.raises(InvariantError):
        manager.check_invariants(damage(manager, request))


def test_request_freed_twice_when_its_blocks_have_no_owner_then_it_is_an_error() -> None:
    manager = BlockManager(8, 4)
    request = running_request("r", 8)
    compute(manager, request)
    table = list(request.block_table)
    manager.free(request)
    request.block_table = table
    with pytest.raises(InvariantError, match="has no owner"):
        manager.free(request)
