"""/v1/responses with the official `openai` client: sync and async, streaming and not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response
from utils.http_server import RunningServer, running_server

_PATIENCE = 300.0
GREEDY = {"model": "tiny", "temperature": 0, "max_output_tokens": 8}
FLAG = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}
TOOL = {"type": "function", "name": "switch", "description": "Turns it", "parameters": FLAG, "strict": True}
FORCED = {"model": "tiny", "temperature": 0, "max_output_tokens": 120, "tools": [TOOL], "parallel_tool_calls": False}
HISTORY = [
    {"role": "user", "content": "is it on"},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Look."}]},
    {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "yes"}]},
]


@pytest.fixture(scope="module")
def server(roomy_model: Any) -> Iterator[RunningServer]:
    with running_server(
        roomy_model, max_model_len=2048, served_model_name=("tiny", "alias"), api_key=("one", "two")
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="one", max_retries=0, timeout=_PATIENCE) as made:
        yield made


# What a caller may ask: each row is one call, made whole and streamed.
CALLS: dict[str, dict[str, Any]] = {
    "text": {"input": "the lazy dog"},
    "items": {"input": [{"role": "user", "content": "the lazy"}, {"role": "user", "content": "dog"}]},
    "parts": {"input": [{"role": "user", "content": [{"type": "input_text", "text": "the dog"}]}]},
    "instructions": {"input": "dog", "instructions": "You are quick."},
    "developer": {"input": [{"role": "developer", "content": "quick"}, {"role": "user", "content": "dog"}]},
    "turns": {
        "input": [
            {"role": "user", "content": "a"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
            {"role": "user", "content": "c"},
        ]
    },
    "history with tools": {"input": HISTORY},
    "seeded": {"input": "dog", "temperature": 1, "top_p": 0.9, "extra_body": {"seed": 7, "top_k": 20, "min_p": 0.01}},
    "logprobs": {"input": "dog", "include": ["message.output_text.logprobs"], "top_logprobs": 2},
    "tools that may be used": {"input": "dog", "tools": [TOOL], "tool_choice": "auto"},
    "tools that may not": {"input": "dog", "tools": [TOOL], "tool_choice": "none"},
    "labels": {"input": "dog", "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
    "defaults spelled out": {
        "input": "dog",
        "truncation": "disabled",
        "background": False,
        "parallel_tool_calls": True,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "extra_body": {"ignore_eos": True, "stop": ["never"]},
    },
}


def _shown(response: Response) -> list[dict[str, Any]]:
    """The items without names that are made up."""
    return [{k: v for k, v in item.to_dict().items() if k not in ("id", "call_id")} for item in response.output]


@pytest.mark.parametrize("name", CALLS)
def test_given_request_when_streamed_then_it_comes_to_the_whole_response(client: openai.OpenAI, name: str) -> None:
    arguments: dict[str, Any] = {**GREEDY, **CALLS[name]}
    whole = client.responses.create(**arguments)
    events = list(client.responses.create(**arguments, stream=True))

    Response.model_validate(whole.to_dict())
    last: Any = events[-1]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert last.type == f"response.{whole.status}"
    assert _shown(last.response) == _shown(whole)
    assert last.response.usage.output_tokens == whole.usage.output_tokens > 0
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert whole.incomplete_details is None or whole.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ({"input": "dog", "instructions": "quick"}, [("system", "quick"), ("user", "dog")]),
        ({"input": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, None),
        ({"input": CALLS["turns"]["input"]}, [("user", "a"), ("assistant", "b"), ("user", "c")]),
    ],
)
def test_given_conversation_when_asked_of_chat_too_then_text_and_tokens_are_the_same(
    client: openai.OpenAI, given: dict[str, Any], messages: Any
) -> None:
    asked: Any = given["input"] if messages is None else [{"role": role, "content": text} for role, text in messages]
    chat = client.chat.completions.create(model="tiny", messages=asked, temperature=0, max_tokens=8)
    response = client.responses.create(**{**GREEDY, **given})
    assert response.output_text == chat.choices[0].message.content
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "switch"}], ids=["required", "named"])
def test_given_forced_call_when_made_then_its_arguments_follow_the_schema(client: openai.OpenAI, choice: Any) -> None:
    whole = client.responses.create(input="dog", tool_choice=choice, **FORCED)
    events: list[Any] = list(client.responses.create(input="dog", tool_choice=choice, stream=True, **FORCED))
    (call,) = whole.output
    assert (whole.status, call.type, call.name) == ("completed", "function_call", "switch")
    assert isinstance(json.loads(call.arguments)["on"], bool)
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == done.arguments == call.arguments
    # its output goes back, with the call as it came
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    after = client.responses.create(**GREEDY, input=[{"role": "user", "content": "dog"}, *whole.output, output])
    assert after.output_text


def test_given_schema_when_asked_then_the_text_is_of_it(client: openai.OpenAI) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "flag", "schema": FLAG, "strict": True}}
    response = client.responses.create(model="tiny", input="dog", temperature=0, max_output_tokens=200, text=text)
    assert response.status == "completed"
    assert isinstance(json.loads(response.output_text)["on"], bool)


def test_given_json_object_when_asked_then_the_text_begins_one(client: openai.OpenAI) -> None:
    response = client.responses.create(**GREEDY, input="dog", text={"format": {"type": "json_object"}})
    assert response.output_text.startswith("{")


def test_given_stream_helper_when_used_then_the_final_response_is_there(client: openai.OpenAI) -> None:
    with client.responses.stream(input="dog", tool_choice="required", **FORCED) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    assert final.output[0].type == "function_call"


def test_given_logprobs_when_asked_then_they_are_those_of_chat(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {**GREEDY, **CALLS["logprobs"]}
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "dog"}],
        temperature=0,
        max_tokens=8,
        logprobs=True,
        top_logprobs=2,
    )
    part: Any = client.responses.create(**arguments).output[0]
    events: Any = client.responses.create(**arguments, stream=True)
    streamed = [
        one.to_dict() for event in events if event.type == "response.output_text.delta" for one in event.logprobs
    ]
    assert chat.choices[0].logprobs is not None
    expected = [entry.to_dict() for entry in chat.choices[0].logprobs.content or ()]
    assert [entry.to_dict() for entry in part.content[0].logprobs] == streamed == expected
    assert len(expected) == 8


def test_given_stored_response_when_gone_on_with_then_the_conversation_is_the_same(client: openai.OpenAI) -> None:
    first = client.responses.create(**GREEDY, input="dog", instructions="quick")
    second = client.responses.create(**GREEDY, input="and", previous_response_id=first.id)
    items: Any = [{"role": "user", "content": "dog"}, *first.output, {"role": "user", "content": "and"}]
    spelled = client.responses.create(**GREEDY, input=items)
    assert second.previous_response_id == first.id
    assert second.output_text == spelled.output_text
    assert second.usage is not None
    assert spelled.usage is not None
    assert second.usage.input_tokens == spelled.usage.input_tokens

    third = list(client.responses.create(**GREEDY, input="more", previous_response_id=second.id, stream=True))
    got = client.responses.retrieve(third[-1].response.id)  # type: ignore[union-attr]
    assert got.output_text == third[-1].response.output_text  # type: ignore[union-attr]
    (item,) = client.responses.input_items.list(got.id).data
    assert item.to_dict()["content"] == [{"type": "input_text", "text": "more"}]
    client.responses.delete(got.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(got.id)


def test_given_another_key_when_it_asks_for_a_response_then_there_is_none(
    client: openai.OpenAI, server: RunningServer
) -> None:
    made = client.responses.create(**GREEDY, input="dog")
    unstored = client.responses.create(**GREEDY, input="dog", store=False)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="two", max_retries=0, timeout=_PATIENCE) as other:
        with pytest.raises(openai.NotFoundError):
            other.responses.retrieve(made.id)
        with pytest.raises(openai.NotFoundError):
            other.responses.delete(made.id)
        with pytest.raises(openai.BadRequestError, match="previous_response_id|not stored"):
            other.responses.create(**GREEDY, input="a", previous_response_id=made.id)
    assert client.responses.retrieve(made.id).id == made.id
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unstored.id)


def test_given_long_conversation_when_truncated_then_its_oldest_turns_are_dropped(client: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": f"{number:02d}" + "x" * 250} for number in range(12)]
    arguments: dict[str, Any] = {**GREEDY, "instructions": "quick"}
    with pytest.raises(openai.BadRequestError, match="max_model_len"):
        client.responses.create(**arguments, input=turns)
    cut = client.responses.create(**arguments, input=turns, truncation="auto")
    kept = [client.responses.create(**arguments, input=turns[number:]) for number in (5, 6)]
    assert cut.usage is not None
    assert cut.usage.input_tokens in [one.usage.input_tokens for one in kept if one.usage is not None]
    assert cut.usage.input_tokens + 8 <= 2048 < cut.usage.input_tokens + 8 + 300
    assert cut.output_text in [one.output_text for one in kept]


def test_given_async_client_when_calls_overlap_then_each_response_keeps_its_id_and_text(server: RunningServer) -> None:
    async def one(client: openai.AsyncOpenAI, number: int) -> tuple[str, str]:
        arguments: dict[str, Any] = {**GREEDY, "input": f"hello {number}", "max_output_tokens": 16}
        whole = await client.responses.create(**arguments)
        events: list[Any] = [event async for event in await client.responses.create(**arguments, stream=True)]
        names = {event.response.id for event in events if hasattr(event, "response")}
        assert len(names) == 1
        assert events[-1].response.output_text == whole.output_text
        return names.pop(), whole.output_text

    async def run() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="one", max_retries=0, timeout=_PATIENCE
        ) as client:
            return await asyncio.gather(*(one(client, number) for number in range(6)))

    found = asyncio.run(run())
    assert len({name for name, _ in found}) == len(found)
    assert len({text for _, text in found}) > 1
    server.wait_until_idle()


def test_given_server_without_a_store_when_asked_for_one_then_it_says_so(tiny_model: Any) -> None:
    with running_server(tiny_model, max_stored_responses=0) as running:
        url = f"{running.url}/v1/responses"
        body = {"input": "dog", "max_output_tokens": 2}
        plain = httpx.post(url, json=body, timeout=_PATIENCE).json()
        assert plain["store"] is False
        for field, value in (("store", True), ("previous_response_id", plain["id"])):
            refused = httpx.post(url, json={**body, field: value}, timeout=_PATIENCE)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == field
        assert httpx.get(f"{url}/{plain['id']}", timeout=_PATIENCE).status_code == 404


def test_given_model_that_thinks_when_asked_then_thoughts_are_items_of_their_own(thinking_model: Any) -> None:
    with (
        running_server(thinking_model, served_model_name=("tiny",)) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", timeout=_PATIENCE) as client,
    ):
        thought = client.responses.create(**GREEDY, input="dog")
        events: list[Any] = list(client.responses.create(**GREEDY, input="dog", stream=True))
        plain = client.responses.create(**GREEDY, input="dog", reasoning={"effort": "none"})
        with pytest.raises(openai.BadRequestError, match=r"reasoning\.effort"):
            client.responses.create(**GREEDY, input="dog", reasoning={"effort": "high"})
        with pytest.raises(openai.BadRequestError, match="include"):
            client.responses.create(**GREEDY, **CALLS["logprobs"])
    item: Any = thought.output[0]
    assert item.type == "reasoning"
    assert thought.usage is not None
    assert 0 < thought.usage.output_tokens_details.reasoning_tokens <= thought.usage.output_tokens
    deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(deltas) == item.content[0].text
    assert plain.output[0].type == "message"


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"temperature": 200}, openai.BadRequestError, "temperature"),
        ({"max_output_tokens": 0}, openai.BadRequestError, "max_output_tokens"),
        ({"input": []}, openai.BadRequestError, "input"),
        ({"previous_response_id": "resp_unknown"}, openai.BadRequestError, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, openai.BadRequestError, "tools"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice"),
        ({"background": True}, openai.BadRequestError, "background"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "odd"}}}},
            openai.BadRequestError,
            "text",
        ),
        ({"extra_body": {"nonsense": 1}}, openai.BadRequestError, "nonsense"),
    ],
)
def test_given_bad_value_when_asked_then_the_client_raises_its_own_error_with_the_field(
    client: openai.OpenAI, change: dict[str, Any], error: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(error) as caught:
        client.responses.create(**{**GREEDY, "input": "dog", **change})
    assert caught.value.param == param
    assert param in caught.value.message or caught.value.code == "previous_response_not_found"
