"""What comes from outside: requests that are added, refused, cancelled and ended, plans that are applied twice or late."""

from __future__ import annotations

import re

import pytest
from utils.scheduler_world import make_request, next_token
from utils.step_tables import prompt_of, row_of, world

from pellucid.contract.plan import ModelRunnerOutput
from pellucid.errors import ConfigError, InvalidRequestError, InvariantError
from pellucid.scheduling.config import SchedulerConfig
from pellucid.scheduling.policies import policy_of
from pellucid.scheduling.request import EngineCoreRequest, RequestStatus
from pellucid.scheduling.wait import WAIT_REASONS


@pytest.mark.parametrize(
    ("options", "prompt", "message", "param"),
    [
        ({}, (), "the prompt is empty; it needs at least 1 token", "prompt"),
        ({}, 64, "prompt has 64 tokens and needs room for 1 more; max_model_len is 64", "prompt"),
        ({}, 32, "prompt of 32 tokens + 1 needs 9 blocks of 4 tokens; 8 exist", "prompt"),
        ({"max_tokens": 0}, 3, "max_tokens is 0; it must be at least 1", "max_tokens"),
    ],
)
def test_impossible_request_when_added_then_it_is_refused_with_the_numbers(
    options: dict[str, int], prompt: tuple[int, ...] | int, message: str, param: str
) -> None:
    scheduler = world().scheduler
    core = make_request("r", prompt)
    if "max_tokens" in options:
        core = EngineCoreRequest("r", core.prompt_token_ids, core.sampling_params, seed=0, **options)
    with pytest.raises(InvalidRequestError, match=re.escape(message)) as caught:
        scheduler.add(core)
    assert caught.value.param == param
    assert not scheduler.has_unfinished


def test_prompt_longer_than_a_step_when_added_then_only_mixed_takes_it() -> None:
    world(budget=4).scheduler.add(make_request("r", 5))
    with pytest.raises(InvalidRequestError, match=r"prompt has 5 tokens;.* max_num_batched_tokens is 4"):
        world("prefill_first", budget=4).scheduler.add(make_request("r", 5))


def test_request_id_when_in_use_then_refused_and_when_forgotten_then_free_again() -> None:
    scheduler = world().scheduler
    scheduler.add(make_request("r", 3))
    with pytest.raises(InvalidRequestError, match="'r' is in use"):
        scheduler.add(make_request("r", 3))
    with pytest.raises(InvariantError, match="before it ends"):
        scheduler.forget("r")
    scheduler.cancel("r")
    assert scheduler.forget("r")
    assert not scheduler.forget("r")
    scheduler.add(make_request("r", 3))
    plan = scheduler.schedule()
    assert plan.finished == ("r",)
    assert [new.request_id for new in plan.new_requests] == ["r"]


def test_cancel_when_waiting_running_ended_or_unknown_then_it_says_whether_it_is_known() -> None:
    a_world = world(max_num_seqs=1)
    a_world.add(make_request("runs", 3))
    a_world.add(make_request("waits", 3))
    a_world.step()
    for name in ("runs", "waits"):
        a_world.cancel(name)
        assert a_world.records[name].finish_reason == "abort"
    assert a_world.blocks.num_used_blocks == 0
    assert a_world.scheduler.cancel("runs")
    assert not a_world.scheduler.cancel("unknown")
    plan = a_world.scheduler.schedule()
    assert (plan.kind, plan.finished) == ("none", ("runs", "waits"))
    assert a_world.scheduler.schedule().finished == ()


def test_finish_from_outside_when_a_request_runs_then_it_ends_once_with_its_reason() -> None:
    scheduler = world().scheduler
    request = scheduler.add(make_request("r", 3))
    scheduler.schedule()
    assert scheduler.finish("r", RequestStatus.FINISHED_STOPPED, stop_reason="\n\n")
    assert not scheduler.finish("r", RequestStatus.FINISHED_ERROR, error="too late")
    assert (request.status, request.stop_reason, request.error) == (RequestStatus.FINISHED_STOPPED, "\n\n", None)
    with pytest.raises(InvariantError, match="cannot finish as running"):
        scheduler.finish("r", RequestStatus.RUNNING)


def test_request_cancelled_and_its_id_reused_when_the_old_plan_is_applied_then_the_new_one_is_untouched() -> None:
    scheduler = world().scheduler
    scheduler.add(make_request("r", 3))
    old = scheduler.schedule()
    scheduler.cancel("r")
    scheduler.forget("r")
    request = scheduler.add(make_request("r", 3))
    assert scheduler.apply(old, ModelRunnerOutput({"r": 1})) == []
    assert (request.output_token_ids, request.num_computed_tokens) == ([], 0)


def test_plan_when_applied_twice_then_it_is_an_error() -> None:
    scheduler = world().scheduler
    scheduler.add(make_request("r", 3))
    plan = scheduler.schedule()
    scheduler.apply(plan, ModelRunnerOutput({"r": 1}))
    with pytest.raises(InvariantError, match="step 0 is not in flight"):
        scheduler.apply(plan, ModelRunnerOutput({"r": 1}))


def test_second_plan_when_made_before_the_first_is_applied_then_it_takes_only_known_tokens() -> None:
    """Budget 4: a (6 tokens) is cut; the second plan takes the rest of a and the beginning of b; the third
    takes nothing of a, whose next token is not known yet."""
    a_world = world(budget=4)
    a_world.add(make_request("a", prompt_of(10, 6), max_tokens=2))
    a_world.add(make_request("b", prompt_of(20, 5), max_tokens=1))
    plans = [a_world.schedule() for _ in range(3)]
    assert [row_of(plan)[1] for plan in plans] == [{"a": (0, 4)}, {"a": (4, 2), "b": (0, 2)}, {"b": (2, 3)}]
    for plan in plans:
        a_world.finish(plan)
    a_world.drain(2)
    a_world.check_end()


def test_request_preempted_by_a_second_plan_when_the_first_is_applied_then_its_old_part_is_passed_over() -> None:
    """10 blocks of 1, budget 4. b resumes with 5 tokens in two plans; the second one takes its blocks away for a."""
    a_world = world("prefill_first", num_blocks=10, block_size=1, budget=4)
    a_world.add(make_request("a", prompt_of(10, 1), max_tokens=7))
    a_world.add(make_request("x", prompt_of(20, 1), max_tokens=9))
    a_world.add(make_request("b", prompt_of(30, 2), max_tokens=5))
    for _ in range(5):
        a_world.step()
    a_world.cancel("x")
    plans = [a_world.schedule(), a_world.schedule()]
    assert row_of(plans[0])[1:3] == ({"b": (0, 4)}, [])
    assert row_of(plans[1])[1:3] == ({"a": (5, 1)}, ["b"])
    assert a_world.finish(plans[0]) == []
    assert a_world.records["b"].num_computed_tokens == 0
    a_world.finish(plans[1])
    a_world.drain(10)
    a_world.check_end()


def test_queue_when_iterated_then_running_come_before_waiting_in_order() -> None:
    a_world = world(max_num_seqs=1)
    for name, priority in (("a", 2), ("b", 1), ("c", 0)):
        a_world.add(make_request(name, 3, priority=priority))
        a_world.step()
    assert [request.request_id for request in a_world.scheduler] == ["a", "c", "b"]
    assert (a_world.scheduler.num_running, a_world.scheduler.num_waiting) == (1, 2)


def test_empty_scheduler_when_asked_then_the_plan_is_none_and_steps_are_still_counted() -> None:
    scheduler = world().scheduler
    plans = [scheduler.schedule() for _ in range(3)]
    assert [(plan.step_id, plan.kind, plan.entries) for plan in plans] == [
        (0, "none", ()),
        (1, "none", ()),
        (2, "none", ()),
    ]
    assert scheduler.apply(plans[0], ModelRunnerOutput({})) == []
    assert not scheduler.has_unfinished


def test_preempted_request_when_admitted_again_then_the_executor_gets_all_of_it_again() -> None:
    a_world = world(num_blocks=4, block_size=2)
    a_world.add(make_request("a", prompt_of(10, 3), max_tokens=3))
    b = make_request("b", prompt_of(20, 3), max_tokens=4, seed=9)
    a_world.add(b)
    plans = [a_world.step() for _ in range(4)]
    (new,) = plans[3].new_requests
    first = next_token(list(b.prompt_token_ids), 9, 0)
    second = next_token([*b.prompt_token_ids, first], 9, 0)
    assert (new.request_id, new.prompt_token_ids, new.output_token_ids) == ("b", b.prompt_token_ids, (first, second))
    assert (new.sampling.seed, new.sampling.choice_index, new.block_ids) == (9, 0, ())
    assert plans[3].finished == ("a",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0"),
        ({"max_model_len": 0}, "max_model_len is 0"),
        ({"max_prefill_chunk": 0}, "max_prefill_chunk is 0"),
        ({"policy": "best"}, "policy 'best' is not known; policies: mixed, padded, prefill_first"),
        (
            {"policy": "prefill_first", "max_prefill_chunk": 4},
            "max_prefill_chunk 4: prefill_first computes whole prompts",
        ),
    ],
)
def test_config_when_a_value_cannot_be_honoured_then_it_is_refused(options: dict[str, object], message: str) -> None:
    fields = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 16, **options}
    with pytest.raises(ConfigError, match=re.escape(message)):
        policy_of(SchedulerConfig(**fields))  # type: ignore[arg-type]


def test_reasons_to_wait_when_listed_then_each_is_told_apart() -> None:
    assert len(set(WAIT_REASONS)) == len(WAIT_REASONS)
