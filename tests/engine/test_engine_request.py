"""The states of a request and the edges between them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from utils.scheduler_world import make_request

from pellucid.api.hidden_states import HiddenStatesParams
from pellucid.errors import InvariantError
from pellucid.scheduling.request import Request, RequestStatus

WAITING, RUNNING, PREEMPTED = RequestStatus.WAITING, RequestStatus.RUNNING, RequestStatus.PREEMPTED
STOPPED, LENGTH = RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH
ABORTED, ERROR = RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR

ALLOWED = {
    (WAITING, RUNNING),
    (WAITING, ABORTED),
    (WAITING, ERROR),
    (RUNNING, PREEMPTED),
    (RUNNING, STOPPED),
    (RUNNING, LENGTH),
    (RUNNING, ABORTED),
    (RUNNING, ERROR),
    (PREEMPTED, RUNNING),
    (PREEMPTED, STOPPED),
    (PREEMPTED, LENGTH),
    (PREEMPTED, ABORTED),
    (PREEMPTED, ERROR),
}


@pytest.mark.parametrize(("before", "after"), list(product(RequestStatus, RequestStatus)))
def test_request_when_its_status_changes_then_only_edges_of_the_table_are_taken(
    before: RequestStatus, after: RequestStatus
) -> None:
    request = Request(make_request("r", 3))
    request.status = before
    if (before, after) in ALLOWED:
        request.transition(after)
        assert request.status is after
    else:
        with pytest.raises(InvariantError, match=f"'r' cannot go from {before.value} to {after.value}"):
            request.transition(after)
        assert request.status is before


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (WAITING, None),
        (RUNNING, None),
        (PREEMPTED, None),
        (STOPPED, "stop"),
        (LENGTH, "length"),
        (ABORTED, "abort"),
        (ERROR, "error"),
    ],
)
def test_request_in_each_status_when_asked_then_its_finish_reason_is_of_the_closed_set(
    status: RequestStatus, reason: str | None
) -> None:
    request = Request(make_request("r", 3))
    request.status = status
    assert request.finish_reason == reason
    assert request.is_finished == (reason is not None)
    assert status.is_finished == (reason is not None)


def test_request_when_outputs_are_added_then_counts_follow() -> None:
    request = Request(make_request("r", (5, 6, 7)))
    assert (request.num_prompt_tokens, request.num_tokens, request.num_pending_tokens) == (3, 3, 3)
    assert request.is_prefill
    request.num_scheduled_tokens = 2
    assert (request.next_start, request.num_pending_tokens) == (2, 1)
    request.num_scheduled_tokens, request.num_computed_tokens = 0, 3
    request.append_output(9)
    assert request.output_token_ids == [9]
    assert request.token_ids == [5, 6, 7, 9]
    assert (request.num_output_tokens, request.num_tokens, request.num_pending_tokens) == (1, 4, 1)
    assert not request.is_prefill


def test_request_one_token_short_of_its_prompt_when_asked_then_it_is_still_a_prefill() -> None:
    request = Request(make_request("r", 3))
    request.num_computed_tokens = 2
    assert request.is_prefill


def test_requests_when_sorted_then_priority_counts_before_arrival() -> None:
    late_but_important = Request(make_request("a", 1, priority=-1), sequence=9)
    early = Request(make_request("b", 1), sequence=1)
    later = Request(make_request("c", 1), sequence=2)
    ordered = sorted([later, early, late_but_important], key=lambda request: request.queue_key)
    assert [request.request_id for request in ordered] == ["a", "b", "c"]


def test_core_request_when_read_by_the_names_of_the_fields_then_what_was_asked() -> None:
    core = make_request("r", 3)
    assert not core.return_hidden_states
    assert core.hidden_states_for_tokens is core.hidden_states_layers is None
    asked = replace(core, hidden_states=HiddenStatesParams((0, -1), (2,)))
    assert asked.return_hidden_states
    assert (asked.hidden_states_for_tokens, asked.hidden_states_layers) == ([0, -1], [2])
    assert replace(core, hidden_states=HiddenStatesParams()).hidden_states_for_tokens is None
