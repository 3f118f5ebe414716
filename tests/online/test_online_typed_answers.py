"""Answers of the Responses and the Messages API, made of scripted texts: what the official clients put together from a stream is
what comes as a whole, however the text was cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic.types
import openai
import pytest
from anthropic.lib.streaming._messages import accumulate_event
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from pellucid.api.outputs import EngineCoreOutput
from pellucid.api.sampling_params import SamplingParams
from pellucid.server.anthropic.answer import MessageAnswer
from pellucid.server.anthropic.protocol import MessagesRequest
from pellucid.server.chat.parsing import OutputStyle
from pellucid.server.generate.answers import Identity
from pellucid.server.generate.generation import Usage
from pellucid.server.generate.logprobs import LogprobFormat
from pellucid.server.http.errors import HttpError
from pellucid.server.responses.answer import ResponseAnswer
from pellucid.server.responses.input import answered
from pellucid.server.responses.protocol import ResponsesRequest
from pellucid.text.reasoning_parser import REASONING_DIALECTS
from pellucid.text.tool_dialects import TOOL_DIALECTS, Tool

USAGE, THOUGHTS = Usage(10, 20, 4), 3
TOOL = Tool("look", {"type": "object", "properties": {"at": {"type": "string"}}})
STYLE = OutputStyle(REASONING_DIALECTS["think"], TOOL_DIALECTS["hermes"], (TOOL,))
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "the sky"}}\n</tool_call>'
# name -> (text, kinds of what it holds)
TEXTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "nothing": ("", ()),
    "text": ("Good day.", ("text",)),
    "thoughts": ("<think>Hm. So.</think>Good day.", ("thinking", "text")),
    "thoughts alone": ("<think>Hm. So", ("thinking",)),
    "call": (CALL, ("tool_use",)),
    "text and call": ("Let me see." + CALL, ("text", "tool_use")),
    "thoughts, text, two calls": (f"<think>Hm</think>See.{CALL}\n{CALL}", ("thinking", "text", "tool_use", "tool_use")),
    "call and text": (CALL + "Done it.", ("tool_use", "text")),
    "call that breaks off": (CALL[:-25], ("tool_use",)),
}
CUTS = (1, 3, 7, 1000)


def _deltas(text: str, cut: int, reason: Any = "stop", stop: str | None = None) -> Iterator[EngineCoreOutput]:
    for start in range(0, len(text), cut):
        yield EngineCoreOutput("", 0, text[start : start + cut], [1], None, None, None)
    yield EngineCoreOutput("", 0, "", [2], None, reason, stop)


def _identity() -> Identity:
    return Identity("x", "name", "tiny", 1, "fp")


def _response_answer(**fields: Any) -> ResponseAnswer:
    request = ResponsesRequest.model_validate({"input": "hi", **fields})
    return ResponseAnswer(request, _identity(), SamplingParams(), STYLE.reader(), LogprobFormat(None))


def _message_answer(**fields: Any) -> MessageAnswer:
    turns = [{"role": "user", "content": "hi"}]
    request = MessagesRequest.model_validate({"messages": turns, "max_tokens": 20, **fields})
    return MessageAnswer(request, _identity(), 10, STYLE.reader())


def _stream(answer: Any, deltas: Iterator[EngineCoreOutput]) -> list[dict[str, Any]]:
    events = list(answer.opening())
    for delta in deltas:
        events += answer.events(delta)
    return events + list(answer.closing(USAGE, THOUGHTS))


def _kinds(response: dict[str, Any]) -> tuple[str, ...]:
    names = {"message": "text", "reasoning": "thinking", "function_call": "tool_use"}
    return tuple(names[item["type"]] for item in response["output"])


def _unparsed(value: Any) -> Any:
    """Without what the client adds."""
    if isinstance(value, list):
        return [_unparsed(item) for item in value]
    if isinstance(value, dict):
        return {key: _unparsed(item) for key, item in value.items() if not key.startswith("parsed")}
    return value


def _without_call_ids(items: Any) -> Any:
    return [{key: value for key, value in item.items() if key != "call_id"} for item in items]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", TEXTS)
def test_given_text_when_cut_then_a_response_is_the_same_and_the_client_can_follow(name: str, cut: int) -> None:
    text, kinds = TEXTS[name]
    whole = _response_answer()
    _stream(whole, _deltas(text, 1000))
    answer = _response_answer()
    events = _stream(answer, _deltas(text, cut))

    state: Any = ResponseStreamState(input_tools=openai.omit, text_format=openai.omit)
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for event in events:
        state.handle_event(adapter.validate_python(event))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert _kinds(answer.whole()) == kinds or (name == "nothing" and _kinds(answer.whole()) == ("text",))
    assert _without_call_ids(answer.whole()["output"]) == _without_call_ids(whole.whole()["output"])
    completed = state._completed_response.to_dict()["output"]
    assert _unparsed(completed) == Response.model_validate(answer.whole()).to_dict()["output"]
    assert all(item["status"] == "completed" for item in answer.whole()["output"])
    assert answered(completed) == answered(answer.whole()["output"])  # can be said again


@pytest.mark.parametrize("name", TEXTS)
def test_given_response_when_its_deltas_are_joined_then_they_are_its_items(name: str) -> None:
    answer = _response_answer()
    events = _stream(answer, _deltas(TEXTS[name][0], 3))
    joined: dict[int, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            joined[event["output_index"]] = joined.get(event["output_index"], "") + event["delta"]
    for index, item in enumerate(answer.whole()["output"]):
        made = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert joined.get(index, "") == made
    opened = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
    closed = [event["output_index"] for event in events if event["type"] == "response.output_item.done"]
    assert opened == closed == list(range(len(opened)))


@pytest.mark.parametrize(
    ("reason", "status", "details", "kind"),
    [
        ("stop", "completed", None, "response.completed"),
        ("length", "incomplete", {"reason": "max_output_tokens"}, "response.incomplete"),
        ("abort", "cancelled", None, "response.incomplete"),
    ],
)
def test_given_end_when_reached_then_the_response_says_why(reason: str, status: str, details: Any, kind: str) -> None:
    answer = _response_answer()
    events = _stream(answer, _deltas("Good day", 3, reason))
    response = events[-1]["response"]
    assert (events[-1]["type"], response["status"], response["incomplete_details"]) == (kind, status, details)
    assert response["output"][0]["status"] == ("completed" if reason == "stop" else "incomplete")
    assert response["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 20,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 30,
    }


def test_given_error_in_a_stream_when_told_then_each_api_has_its_shape() -> None:
    error = HttpError(503, "the engine is dead", "service_unavailable_error", code="engine_dead")
    (failed,) = _response_answer().failure(error)
    assert failed["type"] == "response.failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "the engine is dead"}
    (told,) = _message_answer().failure(error)
    assert told == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "the engine is dead"},
        "request_id": "name",
    }


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", TEXTS)
def test_given_text_when_cut_then_a_message_is_the_same_and_the_client_can_follow(name: str, cut: int) -> None:
    text, kinds = TEXTS[name]
    answer = _message_answer()
    events = _stream(answer, _deltas(text, cut))
    snapshot: Any = None
    adapter: TypeAdapter[Any] = TypeAdapter(anthropic.types.RawMessageStreamEvent)
    buffers: dict[int, bytes] = {}
    for event in events:
        if event["type"] != "ping":
            given: Any = adapter.validate_python(event)
            snapshot = accumulate_event(event=given, current_snapshot=snapshot, json_bufs=buffers)
    whole = anthropic.types.Message.model_validate(answer.whole())
    assert tuple(block.type for block in whole.content) == kinds
    assert [block.to_dict() for block in snapshot.content] == [block.to_dict() for block in whole.content]
    assert (snapshot.stop_reason, snapshot.usage.to_dict()) == (whole.stop_reason, whole.usage.to_dict())
    assert whole.stop_reason == ("tool_use" if "tool_use" in kinds else "end_turn")
    starts = [event["index"] for event in events if event["type"] == "content_block_start"]
    stops = [event["index"] for event in events if event["type"] == "content_block_stop"]
    assert starts == stops == list(range(len(kinds)))


@pytest.mark.parametrize(
    ("reason", "stop", "tokens", "expected"),
    [
        ("stop", None, 5, ("end_turn", None)),
        ("stop", "END", 5, ("stop_sequence", "END")),
        ("length", None, 20, ("max_tokens", None)),
        ("length", None, 19, ("model_context_window_exceeded", None)),
        ("abort", None, 5, ("max_tokens", None)),
    ],
)
def test_given_end_when_reached_then_the_message_says_why(
    reason: str, stop: str | None, tokens: int, expected: tuple[str, str | None]
) -> None:
    answer = _message_answer()
    for delta in _deltas("Good day", 3, reason, stop):
        list(answer.events(delta))
    _, end, last = answer.closing(Usage(10, tokens), 0)
    assert (end["delta"]["stop_reason"], end["delta"]["stop_sequence"]) == expected
    assert last == {"type": "message_stop"}


@pytest.mark.parametrize("thinking", [{"type": "disabled"}, {"type": "adaptive", "display": "omitted"}])
def test_given_thoughts_that_are_not_wanted_when_made_then_they_are_left_out_and_counted(thinking: Any) -> None:
    answer = _message_answer(thinking=thinking)
    events = _stream(answer, _deltas("<think>Hm.</think>Good day", 3))
    assert [block["type"] for block in answer.whole()["content"]] == ["text"]
    assert "thinking" not in {event.get("delta", {}).get("type", "").removesuffix("_delta") for event in events}
    assert answer.thoughts == "Hm."
