"""Plans made before the tokens that they stand on are known, and drafts: what is taken, what stands, what is dropped."""

from __future__ import annotations

from utils.scheduler_world import make_request

from pellucid.contract.plan import AcceptedDraft, ModelRunnerOutput
from pellucid.scheduling.block_manager import BlockManager
from pellucid.scheduling.config import DraftConfig, SchedulerConfig
from pellucid.scheduling.request import RequestStatus
from pellucid.scheduling.scheduler import RequestScheduler

EOS = 9


def scheduler(num_blocks: int = 8, *, ahead: bool = False, drafts: DraftConfig | None = None) -> RequestScheduler:
    config = SchedulerConfig(4, 16, 64, async_scheduling=ahead, drafts=drafts)
    return RequestScheduler(config, BlockManager(num_blocks, 4, enable_prefix_caching=False))


def sampled(token: int) -> ModelRunnerOutput:
    return ModelRunnerOutput({"a": token})


def test_plan_ahead_when_the_token_before_is_unknown_then_its_place_is_kept() -> None:
    """Prompt of 3, 3 outputs. Three plans are made before anything is applied; the third is empty: it reaches the end."""
    made = scheduler(ahead=True)
    request = made.add(make_request("a", (1, 2, 3), max_tokens=3))
    first, second, third, fourth = (made.schedule() for _ in range(4))
    spans = [
        [(entry.start, entry.num_tokens, entry.samples) for entry in plan.entries] for plan in (first, second, third)
    ]
    assert spans == [[(0, 3, True)], [(3, 1, True)], [(4, 1, True)]]
    assert fourth.kind == "none", "three outputs are on their way, and more are not asked for"
    for plan, token in ((first, 4), (second, 5), (third, 6)):
        (event,) = made.apply(plan, sampled(token))
        assert event.token_id == token
    assert request.output_token_ids == [4, 5, 6]
    assert request.status is RequestStatus.FINISHED_LENGTH
    assert made.block_manager.num_used_blocks == 0


def test_plan_ahead_when_the_token_before_ends_the_request_then_it_is_dropped_and_the_blocks_are_free() -> None:
    made = scheduler(ahead=True)
    made.add(make_request("a", (1, 2, 3, 4), max_tokens=8, eos=(EOS,)))
    first, second = made.schedule(), made.schedule()
    assert [entry.new_block_ids for entry in second.entries] == [(1,)]
    (event,) = made.apply(first, sampled(EOS))
    assert event.finish_status is RequestStatus.FINISHED_STOPPED
    assert made.block_manager.num_used_blocks == 0
    assert made.living(second) == set()
    assert made.apply(second, sampled(5)) == []
    assert made.schedule().finished == ("a",)


def test_plan_ahead_when_it_preempts_then_the_token_in_flight_is_passed_over_and_sampled_again() -> None:
    """Two requests of 4 + 4 tokens in 3 blocks of 4: the second output of `b` has no room beside that of `a`."""
    made = scheduler(3, ahead=True)
    for name in ("a", "b"):
        made.add(make_request(name, (1, 2, 3, 4), max_tokens=4))
    first, second = made.schedule(), made.schedule()
    assert second.preempted == ("b",)
    assert [entry.request_id for entry in second.entries] == ["a"]
    events = made.apply(first, ModelRunnerOutput({"a": 5, "b": 6}))
    assert [event.request_id for event in events] == ["a"]
    record = made.get("b")
    assert record is not None
    assert record.output_token_ids == []
    assert record.num_placeholders == 0
    made.check_invariants()


def test_drafts_when_some_are_sampled_then_those_stand_and_the_rest_is_computed_again() -> None:
    """1 2 3 1 2 was followed by 3 1 2 before; 3 is right, then 7 is sampled where 1 was guessed."""
    made = scheduler(drafts=DraftConfig(3, 1, 2, max_num_seqs=4))
    request = made.add(make_request("a", (1, 2, 3, 1), max_tokens=8))
    made.apply(made.schedule(), sampled(2))
    plan = made.schedule()
    (entry,) = plan.entries
    assert (entry.start, entry.num_tokens, entry.draft_token_ids) == (4, 4, (3, 1, 2))
    assert (plan.kind, plan.num_draft_tokens) == ("decode", 3)
    events = made.apply(plan, ModelRunnerOutput({"a": 7}, accepted_drafts={"a": [AcceptedDraft(3)]}))
    assert [event.token_id for event in events] == [3, 7]
    assert (request.num_computed_tokens, request.num_tokens) == (6, 7)
    assert [entry.start for entry in made.schedule().entries] == [6]


def test_draft_when_it_ends_the_request_then_what_was_accepted_behind_it_is_dropped() -> None:
    made = scheduler(drafts=DraftConfig(3, 1, 2, max_num_seqs=4))
    request = made.add(make_request("a", (1, 2, EOS, 4, 1), max_tokens=8, eos=(EOS,)))
    made.apply(made.schedule(), sampled(2))
    plan = made.schedule()
    assert plan.entries[0].draft_token_ids == (EOS, 4, 1)
    accepted = {"a": [AcceptedDraft(EOS), AcceptedDraft(4)]}
    events = made.apply(plan, ModelRunnerOutput({"a": 8}, accepted_drafts=accepted))
    assert [(event.token_id, event.finish_status) for event in events] == [(EOS, RequestStatus.FINISHED_STOPPED)]
    assert request.output_token_ids == [2, EOS]
    assert made.block_manager.num_used_blocks == 0


def test_drafts_when_more_requests_run_than_may_have_them_or_one_token_is_left_then_none() -> None:
    made = scheduler(drafts=DraftConfig(3, 1, 2, max_num_seqs=1))
    for name in ("a", "b"):
        made.add(make_request(name, (1, 1, 1), max_tokens=3))
    made.apply(made.schedule(), ModelRunnerOutput({"a": 1, "b": 1}))
    plan = made.schedule()
    assert [entry.draft_token_ids for entry in plan.entries] == [(), ()]
    made.apply(plan, ModelRunnerOutput({"a": 1, "b": 1}))
    made.cancel("b")
    assert [entry.draft_token_ids for entry in made.schedule().entries] == [()], "one output is left: nothing to guess"
