"""Calls as a model may write them, through every API that hands them out: what comes can always be read, says what was written, is the
same streamed and whole, and can be sent back; and nobody beside is hurt."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from utils.http_server import RunningServer, running_server
from utils.tiny_models import build_tiny_checkpoint

from pellucid.api.structured_outputs import StructuredOutputsParams
from pellucid.server.chat import preparing

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }}"
    "{% if call.function.arguments is mapping %}{% for key, value in call.function.arguments | items %}"
    " {{ key }}={{ value | tojson }}{% endfor %}{% else %}{{ call.function.arguments }}{% endif %}</tool_call>{% endfor %}\n"
    "{% endfor %}{% if tools %}<tools>{% endif %}<assistant> "
)
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}, "n": {"type": ["number", "null"]}}}
LONG = "9" * 4400  # more digits than Python reads


class Case(NamedTuple):
    """What the model writes, and the call that it is: name, arguments as text, and as an object."""

    dialect: str
    text: str
    arguments: str
    input: dict[str, Any]
    name: str = "f"
    max_tokens: int = 200


def _hermes(arguments: str, name: str = "f") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def _cut(arguments: str, expected: dict[str, Any]) -> Case:
    return Case("hermes", _hermes(arguments).partition("}\n</tool_call>")[0], arguments, expected)


def _written(arguments: str, expected: dict[str, Any], **more: Any) -> Case:
    return Case("hermes", _hermes(arguments), arguments, expected, **more)


CASES: dict[str, Case] = {
    "as it should be": _written('{"a": "é😀", "n": 1.5}', {"a": "é😀", "n": 1.5}),
    "none": _written("{}", {}),
    "line end in a text": _written('{"a": "x\ny"}', {"a": "x\ny"}),
    "NUL in a text": _written('{"a": "x\x00\x1fy"}', {"a": "x\x00\x1fy"}),
    "escape that there is not": _written(r'{"a": "x\q\d"}', {"a": r"x\q\d"}),
    "comma too many": _written('{"a": 1,}', {"a": 1}),
    "half a character": _written(r'{"a": "\ud83d"}', {"a": "\ufffd"}),
    "halves in the wrong order": _written(r'{"a": "\ude00\ud83d"}', {"a": "\ufffd\ufffd"}),
    "two halves": _written(r'{"a": "\ud83d\ude00"}', {"a": "😀"}),
    "half a character in a key": _written(r'{"\udfff": 1}', {"\ufffd": 1}),
    "no number": _written('{"n": NaN}', {"n": "NaN"}),
    "beyond all numbers": _written('{"n": [1e999, -Infinity]}', {"n": ["1e999", "-Infinity"]}),
    "a long number": _written(f'{{"n": {LONG}}}', {"n": LONG}, max_tokens=5000),
    "a number of 30 digits": _written(f'{{"n": {LONG[:30]}}}', {"n": int(LONG[:30])}),
    "cut off in a text": _cut('{"a": "hello", "b": "wor', {"a": "hello", "b": "wor"}),
    "cut off in a number": _cut('{"a": "hello", "n": 12', {"a": "hello", "n": 12}),
    "cut off in a key": _cut('{"a": "hello", "b', {"a": "hello"}),
    "cut off in an escape": _cut('{"a": "hello\\u00', {"a": "hello"}),
    "no JSON": _written('{"a": "b" "c"}', {"a": "b", "raw_arguments": '{"a": "b" "c"}'}),
    "a list as a text": Case("hermes", _hermes('"[1]"'), "[1]", {"raw_arguments": "[1]"}),
    "a text as a text": Case("hermes", _hermes('"\\ud83d"'), "\ufffd", {"raw_arguments": "\ufffd"}),
    "an object as a text": Case("hermes", _hermes(r'"{\"a\": \"\\n\"}"'), r'{"a": "\n"}', {"a": "\n"}),
    "name of half a character": Case("hermes", _hermes("{}", r"\ud800"), "{}", {}, "\ufffd"),
    "parameter that is no number": Case(
        "qwen3_coder", "<function=f>\n<parameter=n>\nNaN\n</parameter>\n</function>", '{"n": "NaN"}', {"n": "NaN"}
    ),
    "parameter of half a character": Case(
        "qwen3_coder", '<function=f>\n<parameter=n>\n"\\ud83d"\n</parameter>\n</function>', '{"n": "\ufffd"}', {"n": "\ufffd"}
    ),
    "parameter of several lines": Case(
        "qwen3_coder", "<function=f>\n<parameter=a>\nx\n\ty\n</parameter>\n</function>", r'{"a": "x\n\ty"}', {"a": "x\n\ty"}
    ),
    "parameter that is cut off": Case(
        "qwen3_coder", "<function=f>\n<parameter=a>\nx\ny", r'{"a": "x\ny', {"a": "x\ny"}
    ),
    "two halves in Python": Case("pythonic", r'[f(a="\ud83d\ude00")]', '{"a": "😀"}', {"a": "😀"}),
    "half a character in Python": Case("pythonic", r'[f(a="\ud83d")]', '{"a": "\ufffd"}', {"a": "\ufffd"}),
}  # fmt: skip
NEIGHBOUR = {"prompt": "a neighbour", "max_tokens": 40, "temperature": 0.9, "seed": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny_checkpoint(tmp_path_factory.mktemp("calls"), "llama", max_position_embeddings=8192)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def servers(model: Path) -> Iterator[Callable[[str], RunningServer]]:
    """A server for each dialect, started when it is first asked for."""
    started: dict[str, Any] = {}

    def server(dialect: str) -> RunningServer:
        if dialect not in started:
            running = running_server(model, served_model_name=("m",), tool_dialect=dialect, num_blocks=1024)
            started[dialect] = (running, running.__enter__())
        return started[dialect][1]  # type: ignore[no-any-return]

    yield server
    for running, _ in started.values():
        running.__exit__(None, None, None)


def _post(server: RunningServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(server.url + path, json=body, timeout=300)
    assert answer.status_code == 200, answer.text[:500]
    return dict(_strict(answer.content))


def _strict(text: bytes | str) -> Any:
    return json.loads(text, parse_constant=lambda constant: pytest.fail(constant))


def _events(server: RunningServer, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with httpx.stream("POST", server.url + path, json={**body, "stream": True}, timeout=300) as stream:
        lines = b"".join(stream.iter_bytes()).decode().split("\n")
    found = [_strict(line[6:]) for line in lines if line.startswith("data: {")]
    assert not [event for event in found if "error" in event or event.get("type") in ("error", "response.failed")]
    return found


def _chat(server: RunningServer, max_tokens: int) -> tuple[str, str]:
    tool = {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}
    body = {"messages": _USER, "tools": [tool], "max_tokens": max_tokens, **_STRUCTURED}
    message = _post(server, CHAT, body)["choices"][0]["message"]
    ((call,), name, arguments) = (message["tool_calls"], "", "")
    for event in _events(server, CHAT, body):
        for choice in event["choices"]:
            for part in choice["delta"].get("tool_calls", ()):
                name += part["function"].get("name") or ""
                arguments += part["function"]["arguments"]
    assert (name, arguments) == (call["function"]["name"], call["function"]["arguments"])
    result = {"role": "tool", "tool_call_id": call["id"], "content": "so"}
    _post(server, "/tokenize", {"messages": [*_USER, message, result]})
    return name, arguments


def _responses(server: RunningServer, max_tokens: int) -> tuple[str, str]:
    tool = {"type": "function", "name": "f", "parameters": PARAMETERS}
    text = {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}}
    body = {"input": "hi", "tools": [tool], "max_output_tokens": max_tokens, "text": text}
    (call,) = [item for item in _post(server, RESPONSES, body)["output"] if item["type"] == "function_call"]
    events = _events(server, RESPONSES, body)
    deltas = [one["delta"] for one in events if one["type"] == "response.function_call_arguments.delta"]
    (done,) = [one for one in events if one["type"] == "response.function_call_arguments.done"]
    assert (done["name"], done["arguments"], "".join(deltas)) == (call["name"], call["arguments"], call["arguments"])
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "so"}
    _post(server, RESPONSES, {"input": [*_USER, call, result], "max_output_tokens": 1})
    return call["name"], call["arguments"]


def _messages(server: RunningServer, max_tokens: int) -> tuple[str, Any]:
    config = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    body = {
        "messages": _USER,
        "tools": [{"name": "f", "input_schema": PARAMETERS}],
        "max_tokens": max_tokens,
        "output_config": config,
    }
    whole = _post(server, MESSAGES, body)
    (block,) = [one for one in whole["content"] if one["type"] == "tool_use"]
    events = _events(server, MESSAGES, body)
    deltas = [one["delta"] for one in events if one["type"] == "content_block_delta"]
    said = "".join(delta["partial_json"] for delta in deltas if delta["type"] == "input_json_delta")
    (start,) = [one["content_block"] for one in events if one["type"] == "content_block_start"]
    assert (start["name"], start["input"], _strict(said or "{}")) == (block["name"], {}, block["input"])
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": "so"}
    turns = [{"role": "assistant", "content": [block]}, {"role": "user", "content": [result]}]
    _post(server, f"{MESSAGES}/count_tokens", {"messages": [*_USER, *turns]})
    return block["name"], block["input"]


_USER = [{"role": "user", "content": "hi"}]
_STRUCTURED = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the model write a text beside tools, as `auto` lets it write any."""

    def write(text: str) -> None:
        regex = re.escape(text).replace(LONG, f"9{{{len(LONG)}}}")
        said = StructuredOutputsParams(choice=[text]) if LONG not in text else StructuredOutputsParams(regex=regex)
        monkeypatch.setattr(preparing, "calls_or_answer", lambda *given, **how: said)

    return write


@pytest.fixture
def neighbour(servers: Callable[[str], RunningServer]) -> Iterator[Callable[[str], None]]:
    """Runs a request beside the test, and compares it with its lone run."""
    threads: list[threading.Thread] = []
    texts: list[str] = []

    def run(dialect: str) -> None:
        def ask() -> None:
            texts.append(_post(servers(dialect), "/v1/completions", NEIGHBOUR)["choices"][0]["text"])

        ask()
        threads.append(threading.Thread(target=ask, daemon=True))
        threads[0].start()

    yield run
    threads[0].join(300)
    assert len(texts) == 2
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", CASES)
def test_given_call_as_written_when_handed_out_then_every_api_has_it(
    servers: Callable[[str], RunningServer],
    written: Callable[[str], None],
    neighbour: Callable[[str], None],
    name: str,
) -> None:
    case = CASES[name]
    server = servers(case.dialect)
    neighbour(case.dialect)
    written(case.text)
    assert _chat(server, case.max_tokens) == (case.name, case.arguments)
    assert _responses(server, case.max_tokens) == (case.name, case.arguments)
    assert _messages(server, case.max_tokens) == (case.name, case.input)


def test_given_call_that_max_tokens_cuts_when_handed_out_then_what_came_is_there(
    servers: Callable[[str], RunningServer], written: Callable[[str], None]
) -> None:
    text = "line\n" * 50
    written(_hermes(f'{{"path": "a.txt", "a": "{text}"}}'))
    name, found = _messages(servers("hermes"), 120)
    assert (name, found["path"]) == ("f", "a.txt")
    assert text.startswith(found["a"])
    assert len(found["a"]) > 20
