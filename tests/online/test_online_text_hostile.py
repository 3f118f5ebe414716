"""Texts that cannot be encoded and numbers that JSON lacks, in every field that takes a text or any value: refused by the field's name,
or taken; never a failure of the server, streamed or not, and never one of somebody else's request."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from utils.http_server import RunningServer, running_server

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
COUNT, EMBEDDINGS, TOKENIZE, DETOKENIZE = "/v1/messages/count_tokens", "/v1/embeddings", "/tokenize", "/detokenize"
HERE = "@@"  # where a row's value goes: in the place of this text, quotes included, or within a text or a key
USER: list[Any] = [{"role": "user", "content": "hi"}]
SHORT = {CHAT: "max_tokens", COMPLETIONS: "max_tokens", RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}


class Field(NamedTuple):
    """A place in a body, and what an error about it names."""

    path: str
    body: dict[str, Any]
    name: str


def _call(name: str = "f", arguments: str = "{}", **more: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function, **more}]}


def _tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


def _turn(*blocks: Any, role: str = "user") -> list[Any]:
    return [{"role": role, "content": list(blocks)}, *USER]


_SHARED = (
    *(
        "model",
        "stop",
        "bad_words",
        "user",
        "request_id",
        "cache_salt",
        "guided_regex",
        "guided_grammar",
        "guided_json",
    ),
    *("temperature", "seed", "hidden_states_format", "suffix"),
)
_OF_CHAT: dict[str, Any] = {
    "content": {"messages": [{"role": "user", "content": HERE}]},
    "part": {"messages": [{"role": "user", "content": [{"type": "text", "text": HERE}]}]},
    "name": {"messages": [{"role": "user", "content": "a", "name": HERE}]},
    "key of a message": {"messages": [{"role": "user", "content": "a", HERE: 1}]},
    "begun answer": {"messages": [*USER, {"role": "assistant", "content": HERE}], "continue_final_message": True},
    "thoughts": {"messages": [{"role": "assistant", "content": "a", "reasoning_content": HERE}, *USER]},
    "call's name": {"messages": [_call(name=HERE), *USER]},
    "call's arguments": {"messages": [_call(arguments=HERE), *USER]},
    "call's id": {"messages": [_call(id=HERE), *USER]},
    "call that is answered": {"messages": [{"role": "tool", "content": "a", "tool_call_id": HERE}, *USER]},
    "tool's name": {"messages": USER, "tools": [{"type": "function", "function": {"name": HERE}}]},
    "tool's description": {"messages": USER, "tools": [_tool(description=HERE)]},
    "tool's parameter": {"messages": USER, "tools": [_tool(parameters={"properties": {HERE: {}}})]},
    "tool's default": {"messages": USER, "tools": [_tool(parameters={"properties": {"a": {"default": HERE}}})]},
    "tool's choice": {
        "messages": USER,
        "tools": [_tool()],
        "tool_choice": {"type": "function", "function": {"name": HERE}},
    },
    "template's variable": {"messages": USER, "chat_template_kwargs": {"a": HERE}},
    "template's variable's name": {"messages": USER, "chat_template_kwargs": {HERE: 1}},
    "metadata": {"messages": USER, "metadata": {"a": HERE}},
    "metadata's key": {"messages": USER, "metadata": {HERE: "a"}},
    "safety_identifier": {"messages": USER, "safety_identifier": HERE},
    "prompt_cache_key": {"messages": USER, "prompt_cache_key": HERE},
    "schema": {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"schema": {"const": HERE}}}},
}  # fmt: skip
_OF_RESPONSES: dict[str, Any] = {
    "input": {"input": HERE},
    "message": {"input": [{"role": "user", "content": [{"type": "input_text", "text": HERE}]}]},
    "call": {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": HERE}, *USER]},
    "output": {"input": [{"type": "function_call_output", "call_id": "a", "output": HERE}, *USER]},
    "instructions": {"input": "a", "instructions": HERE},
    "metadata": {"input": "a", "metadata": {"a": HERE}},
    "previous": {"input": "a", "previous_response_id": HERE},
    "tools": {"input": "a", "tools": [{"type": "function", "name": "f", "description": HERE}]},
    "schema": {"input": "a", "text": {"format": {"type": "json_schema", "name": "a", "schema": {"const": HERE}}}},
}
_OF_MESSAGES: dict[str, Any] = {
    "content": {"messages": [{"role": "user", "content": HERE}]},
    "begun answer": {"messages": [*USER, {"role": "assistant", "content": HERE}]},
    "text": {"messages": _turn({"type": "text", "text": HERE})},
    "thoughts": {"messages": _turn({"type": "thinking", "thinking": HERE}, {"type": "text", "text": "a"}, role="assistant")},
    "input": {"messages": _turn({"type": "tool_use", "id": "a", "name": "f", "input": {"a": HERE}}, role="assistant")},
    "input's key": {"messages": _turn({"type": "tool_use", "id": "a", "name": "f", "input": {HERE: 1}}, role="assistant")},
    "call's name": {"messages": _turn({"type": "tool_use", "id": "a", "name": HERE, "input": {}}, role="assistant")},
    "result": {"messages": _turn({"type": "tool_result", "tool_use_id": "a", "content": HERE})},
    "system": {"messages": USER, "system": HERE},
    "stop_sequences": {"messages": USER, "stop_sequences": [HERE]},
    "metadata": {"messages": USER, "metadata": {"user_id": HERE}},
    "tools": {"messages": USER, "tools": [{"name": "f", "input_schema": {"properties": {"a": {"const": HERE}}}}]},
}  # fmt: skip
_OTHERS: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": HERE}),
    (COMPLETIONS, {"prompt": ["a", HERE]}),
    (COMPLETIONS, {"prompt": [5, HERE]}),
    (COMPLETIONS, {"prompt": "a b", "logprobs": 1, "stop": [HERE]}),
    (COMPLETIONS, {"prompt": "a", "guided_choice": [HERE]}),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"choice": [HERE]}}),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"json": {"const": HERE}}}),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"regex": "a", "after": HERE}}),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {HERE: 1}}),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": HERE}}),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {HERE: 1}}),
    (EMBEDDINGS, {"input": HERE}),
    (EMBEDDINGS, {"input": ["a", HERE]}),
    (TOKENIZE, {"prompt": HERE, "return_token_strs": True}),
    (TOKENIZE, {"messages": [{"role": "user", "content": HERE}]}),
    (DETOKENIZE, {"tokens": [HERE]}),
    (COUNT, {"messages": [{"role": "user", "content": HERE}]}),
]


def _field(path: str, body: dict[str, Any]) -> Field:
    return Field(path, body, next(name for name, value in body.items() if HERE in json.dumps(value)))


FIELDS: dict[str, Field] = {
    **{f"completions {name}": _field(COMPLETIONS, {"prompt": "a", name: HERE}) for name in _SHARED},
    **{f"chat {name}": _field(CHAT, body) for name, body in _OF_CHAT.items()},
    **{f"responses {name}": _field(RESPONSES, body) for name, body in _OF_RESPONSES.items()},
    **{f"messages {name}": _field(MESSAGES, body) for name, body in _OF_MESSAGES.items()},
    **{f"{path} {number}": _field(path, body) for number, (path, body) in enumerate(_OTHERS)},
}
# JSON texts that stand for a value: of those that nobody can take, and of those that may be taken.
REFUSED = [
    r'"\ud800"',
    r'"a\udfff"',
    r'"\ude00\ud83d"',
    "NaN",
    "-Infinity",
    "1e999",
    "-1E+400",
    f"1{'0' * 250}e99",
    "9" * 5000,
]
TAKEN = [
    *(r'"\ud83d\ude00"', r'"\u0000"', r'"\uffff"', '"\ufffe\U0010ffff"', "9" * 390, "1e308"),
    *(r'"{\"a\": \"\\ud83d\"}"', r'"{\"a\": NaN, \"b\": 1e999}"'),  # within a text: the arguments of a call
]
NEIGHBOUR = {"prompt": "a neighbour", "max_tokens": 60, "temperature": 0.9, "seed": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(roomy_model: Path) -> Iterator[RunningServer]:
    with running_server(roomy_model, served_model_name=("tiny",)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=300) as made:
        yield made


@pytest.fixture
def neighbour(client: httpx.Client) -> Iterator[None]:
    """A request that runs beside the test, and must be as it is alone."""
    texts: list[str] = []

    def ask() -> None:
        texts.append(client.post(COMPLETIONS, json=NEIGHBOUR).json()["choices"][0]["text"])

    ask()
    beside = threading.Thread(target=ask, daemon=True)
    beside.start()
    yield
    beside.join(300)
    assert len(texts) == 2
    assert texts[0] == texts[1]


def _bodies(field: Field, *, streamed: bool) -> Iterator[tuple[str, bool, bytes]]:
    """(value, whether nobody can take it, the body with it); a key can only be a text."""
    ending = {SHORT[field.path]: 2, "stream": streamed} if field.path in SHORT else {}
    text = json.dumps({**field.body, **ending})
    assert text.count(HERE) == 1
    for value in (*REFUSED, *TAKEN):
        if value.startswith('"') or f'"{HERE}":' not in text:
            yield value[:40], value in REFUSED, text.replace(f'"{HERE}"', value).encode()


def _strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda constant: pytest.fail(constant))


def _events(answer: httpx.Response) -> list[Any]:
    return [_strict(line[6:]) for line in answer.text.split("\n") if line.startswith("data: {")]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.usefixtures("neighbour")
def test_given_hostile_value_when_sent_then_it_is_refused_by_name_or_taken(
    server: RunningServer, client: httpx.Client, name: str, streamed: bool
) -> None:
    field = FIELDS[name]
    for value, is_refused, body in _bodies(field, streamed=streamed):
        answer = client.post(field.path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in ((400,) if is_refused else (200, 400, 404)), (value, answer.text[:300])
        if answer.status_code != 200:
            error = _strict(answer.content.decode())["error"]
            said = f"{error['message']} {error.get('param')}"
            assert field.name in said or "more than 400 digits" in said, (value, error)
            continue
        found = _events(answer) if streamed and field.path in SHORT else [_strict(answer.content.decode())]
        assert found
        assert not [one for one in found if one.get("error") or one.get("type") == "error"], (value, found)
    server.wait_until_idle()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES, EMBEDDINGS])
@pytest.mark.parametrize("value", [b"\xff\xfe", b"\xed\xa0\x80", "é😀".encode(), b"a\x80" * 100], ids=range(4))
@pytest.mark.parametrize("header", ["x-request-id", "authorization", "user-agent", "traceparent", "anthropic-version"])
def test_given_header_of_other_bytes_when_sent_then_it_is_answered(
    client: httpx.Client, header: str, value: bytes, path: str
) -> None:
    body = {
        CHAT: {"messages": USER},
        COMPLETIONS: {"prompt": "a"},
        RESPONSES: {"input": "a"},
        MESSAGES: {"messages": USER},
    }
    short = {SHORT[path]: 1} if path in SHORT else {}
    answer = client.post(path, json={**body.get(path, {"input": "a"}), **short}, headers=[(header.encode(), value)])
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-request-id"].isascii()


@pytest.mark.parametrize("escape", ["%ED%A0%80", "%FF", "%C3%A9", "%00", "%F0%9F%98%80"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models/{}"),
        ("GET", "/v1/responses/{}"),
        ("DELETE", "/v1/responses/{}"),
        ("GET", "/v1/responses/{}/input_items?after={}"),
        ("GET", "/v1/responses/a?stream={}"),
        ("POST", "/v1/requests/{}/cancel"),
        ("GET", "/debug/steps?since={}"),
        ("GET", "/{}"),
    ],
)
def test_given_path_of_other_bytes_when_asked_for_then_it_is_told(
    client: httpx.Client, method: str, path: str, escape: str
) -> None:
    answer = client.request(method, path.replace("{}", escape))
    assert answer.status_code in (400, 404), answer.text
    assert _strict(answer.content.decode())["error"]["message"]
