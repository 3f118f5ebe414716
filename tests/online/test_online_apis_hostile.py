"""Requests of the Responses and the Messages API that cannot be honoured: each is told what is wrong, and holds nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from utils.hostile_rows import OK, Row, check_row
from utils.http_server import RunningServer, running_server

RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
_USER: list[Any] = [{"role": "user", "content": "hi"}]


def _response(status: int, *words: str, **fields: Any) -> Row:
    return Row(RESPONSES, {"input": "hi", "max_output_tokens": 2, **fields}, status, words)


def _item(status: int, *words: str, **item: Any) -> Row:
    return _response(status, *words, input=[item])


def _message(status: int, *words: str, **fields: Any) -> Row:
    return Row(MESSAGES, {"messages": _USER, "max_tokens": 2, **fields}, status, words)


def _block(status: int, *words: str, role: str = "user", **block: Any) -> Row:
    return _message(status, *words, messages=[{"role": role, "content": [block]}])


def _deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


OF_RESPONSES: dict[str, Row] = {
    "no input": Row(RESPONSES, {}, 400, ("input", "required")),
    "input null": _response(400, "input", input=None),
    "input number": _response(400, "input is 5", "text or a list", input=5),
    "input empty text": _response(OK, input=""),  # the template says something all the same
    "input empty list": _response(400, "input", input=[]),
    "input too many items": _response(400, "input", "4096", input=_USER * 4097),
    "input ids": _response(400, "input[0]", input=[1, 2]),
    "item unknown type": _item(400, "input[0]", "function_call_output", type="computer_call", id="a"),
    "item reference": _item(400, "input[0]", type="item_reference", id="msg_1"),
    "item image": _item(400, "input[0].content[0]", "input_text", role="user", content=[{"type": "input_image"}]),
    "item file": _item(400, "input[0].content[0]", role="user", content=[{"type": "input_file", "file_id": "a"}]),
    "item extra": _item(400, "input[0].nonsense", role="user", content="a", nonsense=1),
    "item role": _item(400, "input[0].role", role="root", content="a"),
    "item no content": _item(400, "input[0].content", role="user"),
    "part without text": _item(400, "input[0].content[0].text", role="user", content=[{"type": "input_text"}]),
    "part extra": _item(
        400, "input[0].content[0].cache", role="user", content=[{"type": "input_text", "text": "a", "cache": 1}]
    ),
    "call without name": _item(400, "input[0].name", type="function_call", call_id="a", arguments="{}"),
    "call arguments object": _item(400, "arguments", type="function_call", call_id="a", name="f", arguments={}),
    "output without call": _item(400, "input[0].call_id", type="function_call_output", output="a"),
    "output number": _item(400, "input[0].output", type="function_call_output", call_id="a", output=5),
    "thoughts encrypted": _item(400, "encrypted_content", type="reasoning", encrypted_content="abc"),
    "thoughts summary": _item(400, "summary", type="reasoning", summary=[{"type": "summary_text", "text": "a"}]),
    "thoughts alone": _item(OK, type="reasoning", content=[{"type": "reasoning_text", "text": "a"}]),
    "surrogate": Row(RESPONSES, b'{"input":"\\ud800"}', 400, ("input", "U+D800")),
    "too long": _response(400, "max_model_len", input="ab " * 50_000),
    "too long, truncated": _response(400, "max_model_len", input="ab " * 50_000, truncation="auto"),
    "template code": _response(OK, input="{{ 7*7 }}{% for x in range(9**9) %}{% endfor %}"),
    "max_tokens": _response(400, "max_tokens", max_tokens=5),
    "max_output_tokens 0": _response(400, "max_output_tokens is 0", max_output_tokens=0),
    "max_output_tokens 1.5": _response(400, "max_output_tokens is 1.5", max_output_tokens=1.5),
    "max_output_tokens 2^63": _response(400, "max_output_tokens", max_output_tokens=2**63),
    "temperature NaN": Row(RESPONSES, b'{"input":"a","temperature":NaN}', 400, ("temperature",)),
    "top_p 0": _response(400, "top_p", top_p=0),
    "n": _response(400, "n is 2", n=2),
    "messages": _response(400, "messages", messages=_USER),
    "background": _response(400, "background", background=True),
    "conversation": _response(400, "conversation", conversation="conv_1"),
    "prompt": _response(400, "prompt", prompt={"id": "pmpt_1"}),
    "tier": _response(400, "service_tier", service_tier="flex"),
    "verbosity": _response(400, "text.verbosity", text={"verbosity": "low"}),
    "include": _response(400, "include[0]", include=["reasoning.encrypted_content"]),
    "top_logprobs alone": _response(400, "top_logprobs", "include", top_logprobs=2),
    "top_logprobs 1000": _response(400, "top_logprobs", include=["message.output_text.logprobs"], top_logprobs=1000),
    "logprobs beside tools": _response(
        400, "include", include=["message.output_text.logprobs"], tools=[{"type": "function", "name": "f"}]
    ),
    "stream_options": _response(400, "stream_options", stream_options={"include_obfuscation": False}),
    "obfuscation": _response(400, "stream_options", stream=True, stream_options={"include_obfuscation": True}),
    "usage": _response(400, "stream_options", stream=True, stream_options={"include_usage": True}),
    "effort": _response(400, "reasoning.effort", reasoning={"effort": "high"}),
    "effort none": _response(OK, reasoning={"effort": "none"}),
    "summary": _response(400, "reasoning.summary", reasoning={"summary": "detailed"}),
    "format without schema": _response(400, "text.format", text={"format": {"type": "json_schema", "name": "a"}}),
    "format with schema": _response(400, "text.format", text={"format": {"type": "text", "schema": {}}}),
    "schema too deep": _response(400, "nested", text={"format": {"type": "json_schema", "schema": _deep(80)}}),
    "schema that refers to itself": _response(
        400, "text.format.schema", text={"format": {"type": "json_schema", "name": "a", "schema": {"$ref": "#"}}}
    ),
    "tool built in": _response(400, "tools[0].type", tools=[{"type": "web_search"}]),
    "tool as chat has it": _response(400, "tools[0]", tools=[{"type": "function", "function": {"name": "f"}}]),
    "tools too many": _response(400, "tools", tools=[{"type": "function", "name": f"f{n}"} for n in range(129)]),
    "tools of one name": _response(400, "tools", "twice", tools=[{"type": "function", "name": "f"}] * 2),
    "tool name": _response(400, "tools[0]", tools=[{"type": "function", "name": "a b"}]),
    "tool schema": _response(
        400,
        "tools",
        tools=[
            {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "odd"}}}}
        ],
        tool_choice="required",
    ),
    "choice without tools": _response(400, "tool_choice", tool_choice="required"),
    "choice unknown": _response(
        400,
        "tool_choice",
        "'g'",
        tools=[{"type": "function", "name": "f"}],
        tool_choice={"type": "function", "name": "g"},
    ),
    "choice of allowed": _response(400, "tool_choice", tool_choice={"type": "allowed_tools", "mode": "auto"}),
    "metadata too many": _response(400, "metadata", metadata={str(number): "a" for number in range(17)}),
    "previous": _response(400, "previous_response_id", "resp_x", previous_response_id="resp_x"),
    "previous too long": _response(400, "previous_response_id", previous_response_id="x" * 300),
    "template variable taken": _response(400, "chat_template_kwargs", chat_template_kwargs={"messages": []}),
}
OF_MESSAGES: dict[str, Row] = {
    "no messages": Row(MESSAGES, {"max_tokens": 2}, 400, ("messages", "required")),
    "no max_tokens": Row(MESSAGES, {"messages": _USER}, 400, ("max_tokens", "required")),
    "max_tokens 0": _message(400, "max_tokens", max_tokens=0),
    "max_tokens text": _message(400, "max_tokens", max_tokens="5"),
    "max_tokens 2^31": _message(400, "max_tokens", max_tokens=2**31),
    "messages empty": _message(400, "messages", messages=[]),
    "messages text": _message(400, "messages", messages="hi"),
    "role system": _message(400, "messages[0].role", messages=[{"role": "system", "content": "a"}]),
    "content number": _message(400, "messages[0].content", messages=[{"role": "user", "content": 5}]),
    "content empty": _message(OK, messages=[{"role": "user", "content": []}]),
    "image": _block(400, "messages[0].content[0]", "tool_result", type="image", source={"type": "url", "url": "a"}),
    "document": _block(400, "messages[0].content[0]", type="document", source={}),
    "redacted thoughts": _block(400, "content[0]", role="assistant", type="redacted_thinking", data="a"),
    "server tool": _block(400, "content[0]", role="assistant", type="server_tool_use", id="a", name="b", input={}),
    "block extra": _block(400, "nonsense", type="text", text="a", nonsense=1),
    "citations": _block(400, "citations", type="text", text="a", citations=[{"type": "page_location"}]),
    "user calls": _block(400, "tool_use", "user", type="tool_use", id="a", name="b", input={}),
    "user thinks": _block(400, "thinking", "user", type="thinking", thinking="a", signature=""),
    "assistant has a result": _block(400, "tool_result", role="assistant", type="tool_result", tool_use_id="a"),
    "call without input": _block(400, "input", role="assistant", type="tool_use", id="a", name="b"),
    "call left open": _block(400, "messages", role="assistant", type="tool_use", id="a", name="b", input={}),
    "nothing left open": _block(400, "messages", "text", role="assistant", type="text", text=" "),
    "result image": _block(400, "content", type="tool_result", tool_use_id="a", content=[{"type": "image"}]),
    "result number": _block(400, "content", type="tool_result", tool_use_id="a", content=5),
    "system number": _message(400, "system", system=5),
    "system image": _message(400, "system[0]", system=[{"type": "image"}]),
    "stop sequences text": _message(400, "stop_sequences", stop_sequences="a"),
    "stop sequences empty": _message(400, "stop_sequences[0]", stop_sequences=[""]),
    "stop sequences too many": _message(400, "stop_sequences", "32", stop_sequences=["a"] * 100),
    "stop": _message(400, "stop_sequences", stop=["a"]),
    "temperature": _message(400, "temperature", temperature=1e300),
    "top_k": _message(400, "top_k", top_k=1.5),
    "thinking without a budget": _message(400, "thinking", thinking={"type": "enabled"}),
    "thinking small": _message(400, "thinking.budget_tokens", thinking={"type": "enabled", "budget_tokens": 5}),
    "thinking over max_tokens": _message(
        400,
        "budget_tokens is 2,048",
        "max_tokens",
        max_tokens=1500,
        thinking={"type": "enabled", "budget_tokens": 2048},
    ),
    "thinking unknown": _message(400, "thinking.type", thinking={"type": "maybe"}),
    "tool of the server": _message(400, "tools[0].type", tools=[{"type": "bash_20250124", "name": "bash"}]),
    "tool without a schema": _message(400, "tools[0].input_schema", tools=[{"name": "f"}]),
    "choice without a name": _message(
        400, "tool_choice", tools=[{"name": "f", "input_schema": {}}], tool_choice={"type": "tool"}
    ),
    "choice without tools": _message(400, "tool_choice", tool_choice={"type": "any"}),
    "choice text": _message(400, "tool_choice", tool_choice="auto"),
    "effort": _message(400, "output_config.effort", output_config={"effort": "max"}),
    "format": _message(400, "output_config.format.type", output_config={"format": {"type": "text"}}),
    "schema": _message(
        400, "output_config.format.schema", output_config={"format": {"type": "json_schema", "schema": {"type": "odd"}}}
    ),
    "container": _message(400, "container", container="a"),
    "MCP": _message(400, "mcp_servers", mcp_servers=[{"url": "http://a"}]),
    "metadata": _message(400, "metadata", metadata={"a": "b"}),
    "cache control": _message(400, "cache_control", cache_control={"type": "permanent"}),
    "speed": _message(400, "speed", speed="fast"),
    "stream_options": _message(400, "stream_options", stream=True, stream_options={}),
    "surrogate": Row(MESSAGES, b'{"max_tokens":2,"messages":[{"role":"user","content":"\\udfff"}]}', 400, ("U+DFFF",)),
    "not JSON": Row(MESSAGES, b"{", 400, ("JSON",)),
    "too long": _message(400, "max_model_len", messages=[{"role": "user", "content": "ab " * 50_000}]),
    "count max_tokens": Row(COUNT, {"messages": _USER, "max_tokens": 5}, 400, ("max_tokens",)),
    "count nothing": Row(COUNT, {}, 400, ("messages",)),
    "count what is too long": Row(COUNT, {"messages": [{"role": "user", "content": "ab " * 50_000}]}, OK),
}
ROWS = {
    **{f"responses: {name}": row for name, row in OF_RESPONSES.items()},
    **{f"messages: {name}": row for name, row in OF_MESSAGES.items()},
}


@pytest.fixture(scope="module")
def server(tiny_model: Any) -> Iterator[RunningServer]:
    with running_server(tiny_model, served_model_name=("tiny",), max_body_bytes=1 << 20) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=300) as made:
        yield made


@pytest.mark.parametrize("name", ROWS)
def test_given_hostile_body_when_sent_then_it_is_told_why_and_nothing_is_held(
    server: RunningServer, client: httpx.Client, name: str
) -> None:
    row = ROWS[name]
    check_row(client, row, ("message", "type", "param", "code") if row.path == RESPONSES else ("type", "message"))
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 404),
        ("?stream=true", 400),
        ("?stream=maybe", 400),
        ("/input_items?limit=0", 400),
        ("/input_items?limit=101", 400),
        ("/input_items?order=up", 400),
        ("/input_items", 404),
    ],
)
def test_given_unknown_response_when_asked_for_then_it_is_told(client: httpx.Client, query: str, status: int) -> None:
    answer = client.get(f"/v1/responses/resp_unknown{query}")
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == (
        "response_id" if status == 404 else query.rpartition("?")[2].split("=")[0]
    )


@pytest.mark.parametrize("own", [None, "same", "in_resp_named-1"])
def test_given_input_items_when_listed_by_pages_then_all_come_in_order(client: httpx.Client, own: str | None) -> None:
    """Whatever ids they came with: pages are found by them."""
    ids = {} if own is None else {"type": "message", "id": own}
    items = [{"role": "user", "content": str(number), **ids} for number in range(5)]
    made = client.post(RESPONSES, json={"input": items, "max_output_tokens": 2, "request_id": "named"}).json()
    assert made["id"] == "resp_named"
    found: list[str] = []
    after = ""
    for _ in range(3):
        page = client.get(f"{RESPONSES}/{made['id']}/input_items?order=asc&limit=2{after}").json()
        found += [item["content"] for item in page["data"]]
        if not page["has_more"]:
            break
        after = f"&after={page['last_id']}"
    assert found == ["0", "1", "2", "3", "4"]
    newest = client.get(f"{RESPONSES}/{made['id']}/input_items").json()["data"]
    assert [item["content"] for item in newest] == found[::-1]
    assert client.get(f"{RESPONSES}/{made['id']}/input_items?after=x").status_code == 400
