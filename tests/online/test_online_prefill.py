"""An answer that is begun for the model, over HTTP: the prompt ends with it as it is, `echo` gives it back, and the rest is read as what
goes on from there."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from utils.http_server import RunningServer, running_server

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
USER: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
BEFORE = "<user> hi\n<assistant> "  # as the template of the tests writes it
TEXTS = [
    *("".join(text) for count in (1, 2, 3) for text in itertools.product("<\n ", repeat=count)),
    *("The answer is: ", "```json\n", "user", "\n", "é😀 ", "{{ messages }}"),
]


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[RunningServer]:
    with running_server(tiny_model) as running:
        yield running


@pytest.fixture(scope="module")
def thinking(thinking_model: Path) -> Iterator[RunningServer]:
    with running_server(thinking_model) as running:
        yield running


def _post(server: RunningServer, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=300)


def _begun(text: Any) -> list[dict[str, Any]]:
    return [*USER, {"role": "assistant", "content": text}]


def _ids(server: RunningServer, **body: Any) -> list[int]:
    answer = _post(server, "/tokenize", body)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["tokens"])


def _chat(server: RunningServer, **body: Any) -> dict[str, Any]:
    """The message, streamed and whole: both must be the same."""
    asked = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "continue_final_message": True, **body}
    whole = _post(server, CHAT, asked)
    assert whole.status_code == 200, whole.text
    found = whole.json()["choices"][0]["message"]
    message = {name: found.get(name) or "" for name in ("content", "reasoning")}
    streamed = {"content": "", "reasoning": ""}
    with httpx.stream("POST", server.url + CHAT, json={**asked, "stream": True}, timeout=300) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    for name in streamed:
                        streamed[name] += choice["delta"].get(name) or ""
    assert streamed == message
    return message


def test_given_any_begun_text_when_tokenized_then_the_prompt_ends_with_it(server: RunningServer) -> None:
    for text in TEXTS:
        assert _ids(server, messages=_begun(text), continue_final_message=True) == _ids(server, prompt=BEFORE + text)


@pytest.mark.parametrize("text", ["The answer is: ", "```json\n", "<", [{"type": "text", "text": "a"}] * 2])
def test_given_begun_answer_when_echoed_then_it_comes_back_as_it_stands_in_the_prompt(
    server: RunningServer, text: Any
) -> None:
    plain = _chat(server, messages=_begun(text))["content"]
    echoed = _chat(server, messages=_begun(text), echo=True)["content"]
    assert echoed == (text if isinstance(text, str) else "a\na") + plain
    assert plain


def test_given_begun_answer_when_asked_then_the_model_goes_on_as_from_the_raw_prompt(server: RunningServer) -> None:
    for text in ("The answer is: ", "<", "```json\n"):
        raw = {"prompt": BEFORE + text, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        expected = _post(server, "/v1/completions", raw).json()["choices"][0]["text"]
        assert _chat(server, messages=_begun(text))["content"] == expected


@pytest.mark.parametrize("count", [False, True])
def test_given_begun_message_when_sent_then_its_prompt_ends_with_it(server: RunningServer, count: bool) -> None:
    for text in ("<", "|", "end", "\n a", [{"type": "text", "text": "so"}]):
        body: dict[str, Any] = {"messages": _begun(text)}
        shown = text if isinstance(text, str) else "so"
        expected = len(_ids(server, prompt=BEFORE + shown))
        if count:
            assert _post(server, f"{MESSAGES}/count_tokens", body).json()["input_tokens"] == expected
        else:
            usage = _post(server, MESSAGES, {**body, "max_tokens": 2}).json()["usage"]
            assert usage["input_tokens"] + usage["cache_read_input_tokens"] == expected


@pytest.mark.parametrize("path", [MESSAGES, f"{MESSAGES}/count_tokens"])
@pytest.mark.parametrize(
    ("content", "where"),
    [
        ("so ", "messages[1].content:"),
        ("so\n", "messages[1].content:"),
        ("so\u00a0", "messages[1].content:"),
        ([{"type": "text", "text": "so"}, {"type": "text", "text": "it "}], "messages[1].content[1].text:"),
    ],
)
def test_given_begun_message_with_whitespace_at_its_end_when_sent_then_it_is_told(
    server: RunningServer, path: str, content: Any, where: str
) -> None:
    body = {"messages": _begun(content), **({"max_tokens": 2} if path == MESSAGES else {})}
    answer = _post(server, path, body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message == f"{where} final assistant content cannot end with trailing whitespace"


def test_given_calls_in_the_last_message_when_it_shall_go_on_then_it_is_told(server: RunningServer) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    for content in ("so", None):
        messages = [*USER, {"role": "assistant", "content": content, "tool_calls": [call]}]
        answer = _post(server, CHAT, {"messages": messages, "continue_final_message": True, "max_tokens": 2})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
        assert "tool_calls" in answer.json()["error"]["message"]


# what was begun -> where what the model writes belongs
THOUGHTS = {
    "<think>": "reasoning",
    "<think>\nSo, ": "reasoning",
    "<think>so</think>": "content",
    "<think>so</think>It is": "content",
    "It is": "content",
    "The tag is <think>": "content",
}


@pytest.mark.parametrize("text", THOUGHTS)
def test_given_model_that_reasons_when_an_answer_is_begun_then_what_follows_is_read_behind_it(
    thinking: RunningServer, text: str
) -> None:
    message = _chat(thinking, messages=_begun(text))
    assert message.pop(THOUGHTS[text]) != ""
    assert list(message.values()) == [""]


def test_given_user_who_speaks_of_a_marker_when_no_turn_is_opened_then_the_answer_is_content(
    thinking: RunningServer,
) -> None:
    """The prompt ends with the user's own words: they open nothing."""
    asked = {"messages": [{"role": "user", "content": "what is <think>"}], "continue_final_message": None}
    assert _chat(thinking, **asked, add_generation_prompt=False)["reasoning"] == ""
    opened = _chat(thinking, **asked)
    assert (opened["content"], opened["reasoning"] != "") == ("", True)


def test_given_begun_thoughts_when_structured_then_the_structure_stands_behind_them(thinking: RunningServer) -> None:
    """A structure waits for the end of thoughts that are open, and for nothing where none are."""
    asked: dict[str, Any] = {"guided_choice": ["yes"], "ignore_eos": None, "max_tokens": 8}
    assert _chat(thinking, messages=_begun("The tag is <think>"), **asked)["content"] == "yes"
    assert _chat(thinking, messages=_begun("<think>so"), **asked)["content"] == ""
