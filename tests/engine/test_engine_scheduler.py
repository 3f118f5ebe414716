"""Steps as tables: a scenario in words, then every step that must come of it."""

from __future__ import annotations

import pytest
from utils.scheduler_world import EOS, make_request
from utils.step_tables import assert_steps, prompt_of, row_of, world

from pellucid.contract.plan import ModelRunnerOutput
from pellucid.scheduling.block_manager import BlockManager
from pellucid.scheduling.config import SchedulerConfig
from pellucid.scheduling.request import EngineCoreRequest, RequestStatus
from pellucid.scheduling.scheduler import RequestScheduler, TokenEvent

BEHIND = "head of the queue waits"
SHARED = "waits for the shared prompt of its first choice"


# ---- mixed -------------------------------------------------------------------------------------------------


def test_mixed_when_prompts_exceed_the_budget_then_the_last_is_cut_and_decodes_go_first() -> None:
    """Budget 8. a (6 tokens) and b (5) arrive: b gets only 2 tokens at first. c (9) arrives and fills what is left."""
    a_world = world(budget=8)
    a_world.add(make_request("a", prompt_of(10, 6), max_tokens=3))
    a_world.add(make_request("b", prompt_of(20, 5), max_tokens=2))
    a_world.add(make_request("c", prompt_of(30, 9), max_tokens=1))
    spent = "token budget of 8 spent"
    assert_steps(
        a_world,
        [
            ("prefill", {"a": (0, 6), "b": (0, 2)}, [], {"c": spent}),
            ("mixed", {"a": (6, 1), "b": (2, 3), "c": (0, 4)}, [], {}),
            ("mixed", {"a": (7, 1), "b": (5, 1), "c": (4, 5)}, [], {}),
        ],
    )


def test_mixed_with_a_chunk_limit_when_a_prompt_is_long_then_others_come_in_beside_it() -> None:
    """Budget 8, chunks of at most 3: a long prompt leaves room for two more in its first step."""
    a_world = world(budget=8, chunk=3)
    a_world.add(make_request("long", prompt_of(10, 7), max_tokens=1))
    a_world.add(make_request("b", prompt_of(20, 3), max_tokens=2))
    a_world.add(make_request("c", prompt_of(30, 4), max_tokens=1))
    assert_steps(
        a_world,
        [
            ("prefill", {"long": (0, 3), "b": (0, 3), "c": (0, 2)}, [], {}),
            ("mixed", {"long": (3, 3), "b": (3, 1), "c": (2, 2)}, [], {}),
            ("prefill", {"long": (6, 1)}, [], {}),
        ],
    )


def test_mixed_when_max_num_seqs_is_reached_then_the_head_waits_for_a_place() -> None:
    a_world = world(max_num_seqs=1)
    for name in "abc":
        a_world.add(make_request(name, 2, max_tokens=1))
    full = "max_num_seqs 1 reached"
    assert_steps(
        a_world,
        [
            ("prefill", {"a": (0, 2)}, [], {"b": full, "c": BEHIND}),
            ("prefill", {"b": (0, 2)}, [], {"c": full}),
            ("prefill", {"c": (0, 2)}, [], {}),
        ],
    )


def test_mixed_when_blocks_run_out_then_the_newest_is_preempted_and_resumes_with_its_outputs() -> None:
    """4 blocks of 2. a and b (3 tokens each) hold two blocks each; a needs a third: b gives way, nothing new comes in
    although c would fit, and b resumes over prompt + outputs as one prefill as soon as a has ended."""
    a_world = world(num_blocks=4, block_size=2)
    a_world.add(make_request("a", prompt_of(10, 3), max_tokens=3))
    a_world.add(make_request("b", prompt_of(20, 3), max_tokens=4))
    a_world.add(make_request("c", prompt_of(30, 1), max_tokens=1))
    assert_steps(
        a_world,
        [
            ("prefill", {"a": (0, 3), "b": (0, 3)}, [], {"c": "no free blocks: needs 1, 0 free"}),
            ("decode", {"a": (3, 1), "b": (3, 1)}, [], {"c": "no free blocks: needs 1, 0 free"}),
            ("decode", {"a": (4, 1)}, ["b"], {"b": "blocks are short: 1 preempted in this step", "c": BEHIND}),
            ("prefill", {"b": (0, 5), "c": (0, 1)}, [], {}),
            ("decode", {"b": (5, 1)}, [], {}),
        ],
    )
    assert a_world.records["b"].num_preemptions == 1


def test_mixed_when_blocks_run_out_then_the_least_important_gives_way_though_it_came_first() -> None:
    """3 blocks of 2. The unimportant a (priority 5) runs when b comes. Both fill their blocks; a needs a third, finds
    itself the least important and gives way."""
    a_world = world(num_blocks=3, block_size=2)
    a_world.add(make_request("a", prompt_of(10, 3), max_tokens=3, priority=5))
    a_world.step()
    a_world.add(make_request("b", prompt_of(20, 1), max_tokens=4, priority=0))
    assert_steps(
        a_world,
        [
            ("mixed", {"a": (3, 1), "b": (0, 1)}, [], {}),
            ("decode", {"b": (1, 1)}, ["a"], {"a": "blocks are short: 1 preempted in this step"}),
            ("decode", {"b": (2, 1)}, [], {"a": "no free blocks: needs 3, 1 free"}),
            ("decode", {"b": (3, 1)}, [], {"a": "no free blocks: needs 3, 1 free"}),
            ("prefill", {"a": (0, 5)}, [], {}),
        ],
    )


def test_victim_that_was_already_taken_when_it_gives_way_then_its_tokens_leave_the_step() -> None:
    """6 blocks of 1. The unimportant a runs before b comes, is taken first in each step, gets the last block, and then
    loses all to b."""
    a_world = world(num_blocks=6, block_size=1)
    a_world.add(make_request("a", prompt_of(10, 1), max_tokens=5, priority=1))
    a_world.step()
    a_world.add(make_request("b", prompt_of(20, 1), max_tokens=4, priority=0))
    short = "blocks are short: 1 preempted in this step"
    assert_steps(
        a_world,
        [
            ("mixed", {"a": (1, 1), "b": (0, 1)}, [], {}),
            ("decode", {"a": (2, 1), "b": (1, 1)}, [], {}),
            ("decode", {"b": (2, 1)}, ["a"], {"a": short}),
            ("decode", {"b": (3, 1)}, [], {"a": "no free blocks: needs 4, 2 free"}),
            ("prefill", {"a": (0, 4)}, [], {}),
            ("decode", {"a": (4, 1)}, [], {}),
        ],
    )


def test_victim_within_its_prompt_when_it_gives_way_then_its_budget_goes_to_those_behind_it() -> None:
    """11 blocks of 1, budget 4, chunks of 2. a is within its prompt when b lacks a block; d then gets a chunk of 2."""
    a_world = world(num_blocks=11, block_size=1, budget=4, chunk=2)
    a_world.add(make_request("a", prompt_of(10, 7), max_tokens=1, priority=1))
    a_world.step()
    a_world.add(make_request("b", prompt_of(20, 1), max_tokens=2))
    a_world.add(make_request("d", prompt_of(30, 3), max_tokens=1))
    short = "blocks are short: 1 preempted in this step"
    assert_steps(
        a_world,
        [
            ("prefill", {"a": (2, 2), "b": (0, 1), "d": (0, 1)}, [], {}),
            ("mixed", {"b": (1, 1), "d": (1, 2)}, ["a"], {"a": short}),
            ("prefill", {"a": (0, 2)}, [], {}),
            ("prefill", {"a": (2, 2)}, [], {}),
            ("prefill", {"a": (4, 2)}, [], {}),
            ("prefill", {"a": (6, 1)}, [], {}),
        ],
    )


def test_important_request_when_it_comes_late_then_it_is_admitted_before_those_who_wait() -> None:
    a_world = world(max_num_seqs=1)
    a_world.add(make_request("a", 2, max_tokens=1, priority=1))
    a_world.add(make_request("b", 2, max_tokens=1, priority=1))
    a_world.add(make_request("c", 2, max_tokens=1, priority=0))
    assert [next(iter(a_world.step().entries)).request_id for _ in range(3)] == ["c", "a", "b"]


def test_cached_prompt_when_admitted_then_only_the_rest_is_computed() -> None:
    """Caching on. b's 8 first tokens are a's prompt; they count as cached and do not cost budget."""
    a_world = world(caching=True, budget=8)
    a_world.add(make_request("a", 8, max_tokens=1))
    a_world.step()
    a_world.add(make_request("b", 13, max_tokens=1))
    a_world.add(make_request("c", 8, max_tokens=1))
    plan = a_world.step()
    assert row_of(plan) == ("prefill", {"b": (8, 5), "c": (7, 1)}, [], {})
    assert [entry.num_cached_tokens for entry in plan.entries] == [8, 7]
    assert [new.block_ids for new in plan.new_requests] == [(0, 1), (0, 1)]
    assert [len(entry.new_block_ids) for entry in plan.entries] == [2, 0]
    a_world.check_end()


def test_equal_prompts_in_one_step_when_caching_is_on_then_each_computes_its_own() -> None:
    """What is computed in a step can be shared from the next step on, not within it."""
    a_world = world(caching=True)
    a_world.add(make_request("a", 5, max_tokens=1))
    a_world.add(make_request("b", 5, max_tokens=1))
    assert_steps(a_world, [("prefill", {"a": (0, 5), "b": (0, 5)}, [], {})])


@pytest.mark.parametrize("caching", [False, True])
def test_choices_of_one_request_when_scheduled_then_the_first_computes_the_prompt_for_all(caching: bool) -> None:
    """Three choices of a 9-token prompt: the first alone for two chunks of 6, then two that compute one token each."""
    a_world = world(caching=caching, budget=6)
    for index in range(3):
        a_world.add(
            make_request(f"r-{index}", 9, max_tokens=2 if index else 3, group_id="r", choice_index=index, seed=index)
        )
    assert_steps(
        a_world,
        [
            ("prefill", {"r-0": (0, 6)}, [], {"r-1": "token budget of 6 spent", "r-2": BEHIND}),
            ("prefill", {"r-0": (6, 3)}, [], {"r-1": SHARED, "r-2": BEHIND}),
            ("mixed", {"r-0": (9, 1), "r-1": (8, 1), "r-2": (8, 1)}, [], {}),
            ("decode", {"r-0": (10, 1), "r-1": (9, 1), "r-2": (9, 1)}, [], {}),
        ],
    )
    assert [record.num_cached_tokens for record in a_world.records.values()] == ([0, 8, 8] if caching else [0, 0, 0])
    assert a_world.blocks.stats()["prefix_hits"] == (2 if caching else 0)


@pytest.mark.parametrize(("caching", "cached"), [(False, 0), (True, 8)])
def test_second_choice_when_planned_then_only_the_prefix_cache_counts_as_cached(caching: bool, cached: int) -> None:
    a_world = world(caching=caching)
    for index in range(2):
        a_world.add(make_request(f"r-{index}", 9, max_tokens=3, group_id="r", choice_index=index))
    a_world.step()
    (entry,) = [entry for entry in a_world.step().entries if entry.request_id == "r-1"]
    assert (entry.start, entry.num_cached_tokens) == (8, cached)


def test_first_choice_when_it_is_cancelled_within_its_prompt_then_the_next_takes_its_part() -> None:
    a_world = world(budget=4)
    for index in range(3):
        a_world.add(make_request(f"r-{index}", 8, max_tokens=2, group_id="r", choice_index=index))
    assert row_of(a_world.step())[1] == {"r-0": (0, 4)}
    a_world.cancel("r-0")
    assert row_of(a_world.step())[1] == {"r-1": (0, 4)}
    assert row_of(a_world.step())[1] == {"r-1": (4, 4)}
    assert row_of(a_world.step())[1] == {"r-1": (8, 1), "r-2": (7, 1)}
    a_world.drain(10)
    a_world.check_end()


# ---- prefill_first -----------------------------------------------------------------------------------------


def test_prefill_first_when_prompts_come_then_decodes_wait_until_no_prefill_is_possible() -> None:
    """Budget 8, at most 2 running. a and b are prefilled together; c arrives but there is no place until a has ended;
    then c is prefilled in a step of its own while b waits for its next token."""
    a_world = world("prefill_first", budget=8, max_num_seqs=2)
    a_world.add(make_request("a", prompt_of(10, 4), max_tokens=2))
    a_world.add(make_request("b", prompt_of(20, 4), max_tokens=3))
    a_world.add(make_request("c", prompt_of(30, 3), max_tokens=2))
    full = "max_num_seqs 2 reached"
    assert_steps(
        a_world,
        [
            ("prefill", {"a": (0, 4), "b": (0, 4)}, [], {"c": full}),
            ("decode", {"a": (4, 1), "b": (4, 1)}, [], {"c": full}),
            ("prefill", {"c": (0, 3)}, [], {}),
            ("decode", {"b": (5, 1), "c": (3, 1)}, [], {}),
        ],
    )


def test_prefill_first_when_the_head_does_not_fit_then_nobody_passes_it() -> None:
    """Budget 8: a (5) leaves 3; b (4) does not fit and stops c (1), which would."""
    a_world = world("prefill_first", budget=8)
    a_world.add(make_request("a", prompt_of(10, 5), max_tokens=2))
    a_world.add(make_request("b", prompt_of(20, 4), max_tokens=1))
    a_world.add(make_request("c", prompt_of(30, 1), max_tokens=1))
    assert_steps(
        a_world,
        [
            ("prefill", {"a": (0, 5)}, [], {"b": "token budget of 8: needs 4, 3 left", "c": BEHIND}),
            ("prefill", {"b": (0, 4), "c": (0, 1)}, [], {}),
            ("decode", {"a": (5, 1)}, [], {}),
        ],
    )


def test_prefill_first_when_a_resumed_request_is_longer_than_a_step_then_it_is_cut_and_goes_on_before_others() -> None:
    """4 blocks of 2, budget 3. b is preempted with 5 tokens and resumes with 3; the 2 left go before c's prompt."""
    a_world = world("prefill_first", num_blocks=4, block_size=2, budget=3)
    a_world.add(make_request("a", prompt_of(10, 3), max_tokens=3))
    a_world.add(make_request("b", prompt_of(20, 3), max_tokens=4))
    for _ in range(3):
        a_world.step()
    a_world.add(make_request("c", prompt_of(30, 1), max_tokens=1))
    short = "blocks are short: 1 preempted in this step"
    assert_steps(
        a_world,
        [
            ("decode", {"a": (4, 1)}, ["b"], {"b": short, "c": BEHIND}),
            ("prefill", {"b": (0, 3)}, [], {"c": "token budget of 3 spent"}),
            ("prefill", {"b": (3, 2), "c": (0, 1)}, [], {}),
            ("decode", {"b": (5, 1)}, [], {}),
        ],
    )


def test_prefill_first_when_the_beginning_is_cached_then_only_the_rest_must_fit_the_budget() -> None:
    a_world = world("prefill_first", caching=True, budget=9)
    a_world.add(make_request("a", 8, max_tokens=1))
    a_world.step()
    a_world.add(make_request("b", prompt_of(40, 8), max_tokens=1))
    a_world.add(make_request("c", 9, max_tokens=1))
    assert row_of(a_world.step())[1] == {"b": (0, 8), "c": (8, 1)}


# ---- endings -----------------------------------------------------------------------------------------------


def run_tokens(
    core: EngineCoreRequest,
    tokens: list[int],
    stop_strings: dict[int, str] | None = None,
    max_model_len: int = 64,
    num_blocks: int = 8,
) -> list[TokenEvent]:
    """Feed tokens to one request until it ends."""
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=max_model_len)
    scheduler = RequestScheduler(config, BlockManager(num_blocks, 4))
    scheduler.add(core)
    events: list[TokenEvent] = []
    for token in tokens:
        plan = scheduler.schedule()
        output = ModelRunnerOutput({core.request_id: token})
        events += scheduler.apply(plan, output, lambda _, token_id: (stop_strings or {}).get(token_id))
        scheduler.check_invariants()
    return events


STOPPED, LENGTH, ERROR = (
    RequestStatus.FINISHED_STOPPED,
    RequestStatus.FINISHED_LENGTH,
    RequestStatus.FINISHED_ERROR,
)


@pytest.mark.parametrize(
    ("options", "tokens", "stop_strings", "status", "stop_reason"),
    [
        pytest.param({"eos": (EOS,)}, [5, EOS], {}, STOPPED, None, id="eos"),
        pytest.param({"eos": (1, 2)}, [5, 2], {}, STOPPED, None, id="the second of two eos"),
        pytest.param({"eos": (EOS,), "stop_token_ids": [EOS]}, [EOS], {EOS: "x"}, STOPPED, None, id="eos before all"),
        pytest.param(
            {"eos": (EOS,), "ignore_eos": True, "stop_token_ids": [EOS]},
            [EOS],
            {},
            STOPPED,
            EOS,
            id="stop id, eos ignored",
        ),
        pytest.param({"stop_token_ids": [7]}, [5, 7], {7: "x"}, STOPPED, 7, id="stop id before stop string"),
        pytest.param({}, [5, 7], {7: "x"}, STOPPED, "x", id="stop string"),
        pytest.param({"max_tokens": 2}, [5, 7], {7: "x"}, STOPPED, "x", id="stop string before length"),
        pytest.param({"max_tokens": 2}, [5, 7], {}, LENGTH, None, id="length"),
        pytest.param({"eos": (EOS,), "max_tokens": 1}, [EOS], {}, STOPPED, None, id="eos before length"),
        pytest.param(
            {"eos": (EOS,), "ignore_eos": True, "max_tokens": 2}, [EOS, EOS], {}, LENGTH, None, id="ignored eos"
        ),
        pytest.param({"eos": (EOS,), "min_tokens": 2}, [EOS, EOS, EOS], {}, STOPPED, None, id="eos within min_tokens"),
        pytest.param({"stop_token_ids": [7], "min_tokens": 1}, [7, 7], {}, STOPPED, 7, id="stop id within min_tokens"),
        pytest.param({"min_tokens": 1}, [7, 7], {7: "x"}, STOPPED, "x", id="stop string within min_tokens"),
    ],
)
def test_request_when_a_token_could_end_it_then_the_first_rule_in_order_does(
    options: dict[str, object],
    tokens: list[int],
    stop_strings: dict[int, str],
    status: RequestStatus,
    stop_reason: int | str | None,
) -> None:
    core = make_request("r", 3, **options)  # type: ignore[arg-type]
    events = run_tokens(core, tokens, stop_strings)
    assert [event.token_id for event in events] == tokens
    assert [event.finish_status for event in events[:-1]] == [None] * (len(tokens) - 1)
    assert (events[-1].finish_status, events[-1].stop_reason) == (status, stop_reason)


def test_request_when_it_reaches_max_model_len_then_it_ends_by_length() -> None:
    events = run_tokens(make_request("r", 3, max_tokens=10), [5, 5], max_model_len=5)
    assert [event.finish_status for event in events] == [None, LENGTH]


def test_request_when_it_outgrows_all_blocks_then_it_ends_with_both_numbers() -> None:
    """2 blocks of 4 hold 8 tokens; the 9th could never be computed."""
    events = run_tokens(make_request("r", 7, max_tokens=10), [5, 6], num_blocks=2)
    assert [(event.token_id, event.finish_status) for event in events] == [(5, None), (6, ERROR)]
    assert events[-1].error == "the request has grown to 9 tokens, which need 3 blocks of 4; 2 exist"


def test_request_that_ends_exactly_when_all_blocks_are_full_then_it_ends_by_length() -> None:
    events = run_tokens(make_request("r", 7, max_tokens=2), [5, 6], num_blocks=2)
    assert events[-1].finish_status is LENGTH


def test_two_requests_when_one_fails_in_the_executor_then_it_ends_alone_and_its_blocks_are_not_trusted() -> None:
    a_world = world(caching=True)
    a_world.add(make_request("bad", 20, max_tokens=3))
    a_world.add(make_request("good", prompt_of(40, 8), max_tokens=3))
    a_world.step()
    assert len(a_world.blocks.lookup(a_world.records["bad"])[0]) == 4  # its first chunk of 16 is cached by now
    events = a_world.finish(a_world.schedule(), fail=frozenset({"bad"}))
    assert events[0] == TokenEvent("bad", None, ERROR, None, "logits are not finite")
    assert events[1].finish_status is None
    assert a_world.blocks.lookup(a_world.records["bad"]) == ([], 0)
    a_world.drain(5)
    a_world.check_end()


def test_executor_when_it_returns_no_token_for_a_sampling_entry_then_that_request_fails() -> None:
    scheduler = world().scheduler
    scheduler.add(make_request("r", 3))
    (event,) = scheduler.apply(scheduler.schedule(), ModelRunnerOutput({}))
    assert (event.finish_status, event.error) == (ERROR, "step 0 + 3 tokens gave no sampled token")
