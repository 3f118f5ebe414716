"""What a model writes, as chat answers with it: cut into any pieces, a stream's chunks join to the whole answer."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pellucid.api.outputs import CompletionOutput, EngineCoreOutput, FinishReason, RequestOutput
from pellucid.server.chat.answer import ChatAnswer
from pellucid.server.chat.parsing import OutputStyle
from pellucid.server.chat.protocol import ChatCompletionRequest
from pellucid.server.generate.answers import Identity
from pellucid.server.generate.generation import Usage
from pellucid.server.generate.logprobs import LogprobFormat
from pellucid.text.reasoning_parser import REASONING_DIALECTS
from pellucid.text.tool_dialects import TOOL_DIALECTS, Tool

KNOWN = (Tool("f", {"type": "object", "properties": {"a": {"type": "integer"}}}), Tool("g", {}))
THINK = REASONING_DIALECTS["think"]
_TWO = (
    '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n<tool_call>{"name": "g", "arguments": {}}</tool_call>'
)
_F, _G = ["f", '{"a": 1}'], ["g", "{}"]
# text, what ended it -> content, reasoning, calls, finish reason
CASES: dict[str, tuple[str, FinishReason, tuple[str | None, str, list[list[str]], str]]] = {
    "content": ("hello <b>", "stop", ("hello <b>", "", [], "stop")),
    "nothing": ("", "stop", ("", "", [], "stop")),
    "reasoning": ("<think>so</think>\nyes", "stop", ("yes", "so", [], "stop")),
    "reasoning cut short": ("<think>so it", "length", ("", "so it", [], "length")),
    "calls": (_TWO, "stop", (None, "", [_F, _G], "tool_calls")),
    "all": (f"<think>so</think>Look: {_TWO}", "stop", ("Look:", "so", [_F, _G], "tool_calls")),
    "call cut short": (_TWO[: _TWO.index("1}")], "length", (None, "", [["f", '{"a": ']], "length")),
    "no call": ("<tool_call> is a marker", "stop", ("<tool_call> is a marker", "", [], "stop")),
    "marker cut short": ("yes <tool_c", "length", ("yes <tool_c", "", [], "length")),
}


def _answer(style: OutputStyle) -> ChatAnswer:
    request = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "hi"}]})
    return ChatAnswer(request, Identity("chatcmpl", "r", "m", 0, "fp"), [1], 1, LogprobFormat(None), style.reader())


def _whole(style: OutputStyle, text: str, end: FinishReason) -> dict[str, Any]:
    output = RequestOutput("r", None, [1], [CompletionOutput(0, text, finish_reason=end)], True)
    choice: dict[str, Any] = _answer(style).whole([output], Usage(1, 1))["choices"][0]
    return choice


def _streamed(style: OutputStyle, text: str, end: FinishReason, seed: int) -> tuple[Any, ...]:
    """(content, reasoning, calls, finish reason) of the chunks of a stream that is cut at random."""
    answer, drawn = _answer(style), random.Random(seed)
    content = reasoning = ""
    calls: list[list[str]] = []
    reasons = []
    while True:
        cut = drawn.randint(0, 5)
        piece, text = text[:cut], text[cut:]
        for chunk in answer.chunks(EngineCoreOutput("", 0, piece, [1], None, None if text else end, None)):
            (choice,) = chunk["choices"]
            content += choice["delta"].get("content", "")
            reasoning += choice["delta"].get("reasoning_content", "")
            for call in choice["delta"].get("tool_calls", []):
                if "id" in call:
                    calls.append([call["function"]["name"], ""])
                assert call["index"] == len(calls) - 1
                calls[-1][1] += call["function"]["arguments"]
            reasons.append(choice["finish_reason"])
        if not text:
            break
    assert all(reason is None for reason in reasons[:-1])
    return content, reasoning, calls, reasons[-1]


@pytest.mark.parametrize("name", CASES)
def test_given_text_when_answered_then_its_parts_are_told_apart_streamed_and_whole(name: str) -> None:
    text, end, (content, reasoning, calls, reason) = CASES[name]
    style = OutputStyle(THINK, TOOL_DIALECTS["hermes"], KNOWN)
    choice = _whole(style, text, end)
    message = choice["message"]

    found = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", [])]
    assert (message["content"], message.get("reasoning", ""), found) == (content, reasoning, calls)
    assert choice["finish_reason"] == reason
    assert ("tool_calls" in message, "reasoning_content" in message) == (bool(calls), bool(reasoning))
    for seed in range(20):
        streamed = _streamed(style, text, end, seed)
        assert streamed == (content or "", reasoning, calls, reason)


def test_given_calls_that_may_not_be_parallel_when_read_then_the_first_alone_is_shown() -> None:
    style = OutputStyle(None, TOOL_DIALECTS["hermes"], KNOWN, parallel=False)
    assert _streamed(style, _TWO, "stop", 1) == ("", "", [_F], "tool_calls")
    assert len(_whole(style, _TWO, "stop")["message"]["tool_calls"]) == 1


def test_given_prompt_that_opened_reasoning_when_read_then_the_text_begins_within() -> None:
    style = OutputStyle(THINK, starts_inside=True)
    assert _streamed(style, "so</think>yes", "stop", 2) == ("yes", "so", [], "stop")


def test_given_reasoning_that_is_not_wanted_when_read_then_it_is_left_out() -> None:
    style = OutputStyle(THINK, shows_reasoning=False)
    assert _streamed(style, "<think>so</think>yes", "stop", 3) == ("yes", "", [], "stop")
    assert "reasoning" not in _whole(style, "<think>so</think>yes", "stop")["message"]


def test_given_no_tools_when_text_looks_like_a_call_then_it_is_content() -> None:
    assert _whole(OutputStyle(), _TWO, "stop")["message"]["content"] == _TWO
    assert _streamed(OutputStyle(), _TWO, "stop", 4) == (_TWO, "", [], "stop")
