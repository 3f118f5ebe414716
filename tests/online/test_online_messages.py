"""/v1/messages with the official `anthropic` client: sync and async, streaming and not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from utils.http_server import RunningServer, running_server

_PATIENCE = 300.0
GREEDY: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "extra_body": {"temperature": 0}}
DOG = [{"role": "user", "content": "the lazy dog"}]
FLAG = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}
TOOL = {"name": "switch", "description": "Turns it", "input_schema": FLAG}
HISTORY = [
    {"role": "user", "content": [{"type": "text", "text": "is it on"}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Look.", "signature": ""},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "call_1", "name": "look", "input": {"at": "it"}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "yes"}]},
            {"type": "text", "text": "and?", "cache_control": {"type": "ephemeral", "ttl": "5m"}},
        ],
    },
]


@pytest.fixture(scope="module")
def server(roomy_model: Any) -> Iterator[RunningServer]:
    with running_server(
        roomy_model, max_model_len=2048, served_model_name=("tiny", "alias"), api_key=("one",)
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="one", max_retries=0, timeout=_PATIENCE) as made:
        yield made


# What a caller may ask: each row is one call, made whole and streamed.
CALLS: dict[str, dict[str, Any]] = {
    "text": {"messages": DOG},
    "blocks": {"messages": [{"role": "user", "content": [{"type": "text", "text": "dog"}]}]},
    "system": {"messages": DOG, "system": "You are quick."},
    "system blocks": {
        "messages": DOG,
        "system": [{"type": "text", "text": "You are quick.", "cache_control": {"type": "ephemeral"}}],
    },
    "turns": {"messages": [*DOG, {"role": "assistant", "content": "jumps"}, {"role": "user", "content": "why"}]},
    "left open": {"messages": [*DOG, {"role": "assistant", "content": "It jumps"}]},
    "history with tools": {"messages": HISTORY},
    "seeded": {"messages": DOG, "extra_body": {"temperature": 1, "top_p": 0.9, "top_k": 20, "seed": 7}},
    "stop sequences": {"messages": DOG, "stop_sequences": ["never"]},
    "tools that may be used": {"messages": DOG, "tools": [TOOL], "tool_choice": {"type": "auto"}},
    "tools that may not": {"messages": DOG, "tools": [TOOL], "tool_choice": {"type": "none"}},
    "labels": {"messages": DOG, "metadata": {"user_id": "me"}, "service_tier": "auto"},
    "thinking switched off": {"messages": DOG, "thinking": {"type": "disabled"}},
    "thinking as it likes": {"messages": DOG, "thinking": {"type": "adaptive"}},
}


def _shown(message: Any) -> list[dict[str, Any]]:
    """The blocks without names that are made up."""
    return [{k: v for k, v in block.to_dict().items() if k not in ("id", "parsed_output")} for block in message.content]


@pytest.mark.parametrize("name", CALLS)
def test_given_request_when_streamed_then_it_comes_to_the_whole_message(client: anthropic.Anthropic, name: str) -> None:
    arguments = {**GREEDY, **CALLS[name]}
    whole = client.messages.create(**arguments)
    with client.messages.stream(**arguments) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()

    anthropic.types.Message.model_validate(whole.to_dict())
    assert (kinds[0], kinds[-2], kinds[-1]) == ("message_start", "message_delta", "message_stop")
    assert _shown(final) == _shown(whole)
    assert (final.stop_reason, final.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert final.usage.output_tokens == whole.usage.output_tokens > 0
    assert whole.type == "message"
    assert whole.role == "assistant"


@pytest.mark.parametrize("name", CALLS)
def test_given_conversation_when_counted_then_it_is_what_the_message_takes(
    client: anthropic.Anthropic, name: str
) -> None:
    arguments = {**GREEDY, **CALLS[name]}
    usage = client.messages.create(**arguments).usage
    own = ("messages", "system", "tools", "tool_choice", "thinking")
    counted = client.messages.count_tokens(model="tiny", **{k: v for k, v in arguments.items() if k in own})
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ({"messages": DOG}, DOG),
        ({"messages": DOG, "system": "quick"}, [{"role": "system", "content": "quick"}, *DOG]),
        ({"messages": CALLS["turns"]["messages"]}, CALLS["turns"]["messages"]),
    ],
)
def test_given_conversation_when_asked_of_chat_too_then_text_and_tokens_are_the_same(
    client: anthropic.Anthropic, server: RunningServer, given: dict[str, Any], messages: Any
) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="one", max_retries=0, timeout=_PATIENCE) as other:
        chat = other.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=8)
    message: Any = client.messages.create(**{**GREEDY, **given})
    assert message.content[0].text == chat.choices[0].message.content
    assert chat.usage is not None
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == chat.usage.prompt_tokens


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "switch"}], ids=["any", "named"])
def test_given_forced_call_when_made_then_its_input_follows_the_schema(
    client: anthropic.Anthropic, choice: Any
) -> None:
    arguments: dict[str, Any] = {**GREEDY, "max_tokens": 200, "messages": DOG, "tools": [TOOL]}
    arguments["tool_choice"] = {**choice, "disable_parallel_tool_use": True}
    whole: Any = client.messages.create(**arguments)
    with client.messages.stream(**arguments) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    (call,) = whole.content
    assert (whole.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "switch")
    assert isinstance(call.input["on"], bool)
    assert json.loads("".join(pieces)) == call.input
    assert _shown(final) == _shown(whole)
    # its result goes back, with the call as it came
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "done", "is_error": True}
    turns: Any = [*DOG, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(**GREEDY, messages=turns).content


def test_given_stop_sequence_when_it_comes_then_it_is_cut_and_named(client: anthropic.Anthropic) -> None:
    arguments: dict[str, Any] = {**GREEDY, "max_tokens": 16, "messages": DOG}
    text = client.messages.create(**arguments).content[0].text  # type: ignore[union-attr]
    stop = text[len(text) // 2 :][:3]
    message: Any = client.messages.create(**arguments, stop_sequences=[stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.content[0].text == text[: text.index(stop)]


def test_given_schema_when_asked_then_the_text_is_of_it(client: anthropic.Anthropic) -> None:
    config: Any = {"format": {"type": "json_schema", "schema": FLAG}}
    message: Any = client.messages.create(**{**GREEDY, "max_tokens": 200}, messages=DOG, output_config=config)
    assert message.stop_reason == "end_turn"
    assert isinstance(json.loads(message.content[0].text)["on"], bool)


def test_given_async_client_when_calls_overlap_then_each_message_keeps_its_id_and_text(server: RunningServer) -> None:
    async def one(client: anthropic.AsyncAnthropic, number: int) -> tuple[str, Any]:
        arguments: dict[str, Any] = {**GREEDY, "messages": [{"role": "user", "content": f"hello {number}"}]}
        whole = await client.messages.create(**arguments)
        async with client.messages.stream(**arguments) as stream:
            texts = [text async for text in stream.text_stream]
            final = await stream.get_final_message()
        events = [event async for event in await client.messages.create(**arguments, stream=True)]
        assert events[-1].type == "message_stop"
        assert "".join(texts) == whole.content[0].text  # type: ignore[union-attr]
        assert _shown(final) == _shown(whole)
        return final.id, "".join(texts)

    async def run() -> list[tuple[str, Any]]:
        async with anthropic.AsyncAnthropic(
            base_url=server.url, api_key="one", max_retries=0, timeout=_PATIENCE
        ) as client:
            return await asyncio.gather(*(one(client, number) for number in range(5)))

    found = asyncio.run(run())
    assert len({name for name, _ in found}) == len(found)
    assert len({text for _, text in found}) > 1
    server.wait_until_idle()


def test_given_model_that_thinks_when_asked_then_thoughts_are_blocks_of_their_own(thinking_model: Any) -> None:
    with (
        running_server(thinking_model, served_model_name=("tiny",)) as running,
        anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0, timeout=_PATIENCE) as client,
    ):
        thought: Any = client.messages.create(**GREEDY, messages=DOG)
        with client.messages.stream(**GREEDY, messages=DOG) as stream:
            deltas = [event.thinking for event in stream if event.type == "thinking"]
        asked: Any = client.messages.create(
            **{**GREEDY, "max_tokens": 1025, "extra_body": {"ignore_eos": True}},
            messages=DOG,
            thinking={"type": "enabled", "budget_tokens": 1024},
        )
        hidden = client.messages.create(**GREEDY, messages=DOG, thinking={"type": "adaptive", "display": "omitted"})
        plain: Any = client.messages.create(**GREEDY, messages=DOG, thinking={"type": "disabled"})
    assert thought.content[0].type == asked.content[0].type == "thinking"
    assert "".join(deltas) == thought.content[0].thinking
    assert asked.stop_reason == "model_context_window_exceeded"
    assert hidden.content == []
    assert hidden.usage.output_tokens_details is not None
    assert hidden.usage.output_tokens_details.thinking_tokens > 0
    assert plain.content[0].type == "text"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "other"}, anthropic.NotFoundError, "other"),
        ({"extra_body": {"temperature": 200}}, anthropic.BadRequestError, "temperature"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
        ({"messages": []}, anthropic.BadRequestError, "messages"),
        ({"stop_sequences": [""]}, anthropic.BadRequestError, r"stop_sequences\[0\]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, anthropic.BadRequestError, "tools"),
        ({"tool_choice": {"type": "any"}}, anthropic.BadRequestError, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, anthropic.BadRequestError, "thinking"),
        ({"output_config": {"effort": "high"}}, anthropic.BadRequestError, r"output_config\.effort"),
        ({"extra_body": {"nonsense": 1}}, anthropic.BadRequestError, "nonsense"),
    ],
)
def test_given_bad_value_when_asked_then_the_client_raises_its_own_error_with_the_field(
    client: anthropic.Anthropic, change: dict[str, Any], error: type[anthropic.APIStatusError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        client.messages.create(**{**GREEDY, "messages": DOG, **change})
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == ("not_found_error" if error is anthropic.NotFoundError else "invalid_request_error")
    assert caught.value.request_id == body["request_id"]


def test_given_wrong_key_when_sent_then_the_error_is_anthropics(server: RunningServer) -> None:
    with (
        anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0, timeout=_PATIENCE) as client,
        pytest.raises(anthropic.AuthenticationError) as caught,
    ):
        client.messages.create(**GREEDY, messages=DOG)
    assert caught.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
    url, headers = f"{server.url}/v1/messages", {"authorization": "Bearer one", "anthropic-version": "2023-06-01"}
    taken = httpx.post(url, json={"messages": DOG, "max_tokens": 2}, headers=headers, timeout=_PATIENCE)
    assert taken.status_code == 200
    assert taken.headers["request-id"] == taken.headers["x-request-id"]
    assert httpx.get(url, headers=headers, timeout=_PATIENCE).json()["type"] == "error"
