"""The official `openai` client against the server: sync and async, streaming and not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from utils.http_server import RunningServer, running_server

MESSAGES = [{"role": "system", "content": "You are quick."}, {"role": "user", "content": "the lazy dog"}]
GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def server(tiny_model: Any) -> Iterator[RunningServer]:
    with running_server(tiny_model, served_model_name=("tiny", "alias")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as made:
        yield made


# What a caller may ask of chat: each row is one call, made whole and streamed.
CHAT_CALLS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "seeded": {"seed": 7, "max_tokens": 8},
    "two choices": {"n": 2, "seed": 1, "max_tokens": 6},
    "top_p": {"top_p": 0.5, "seed": 2, "max_tokens": 6},
    "logprobs": {**GREEDY, "logprobs": True, "top_logprobs": 3},
    "logprobs alone": {**GREEDY, "logprobs": True},
    "logit_bias": {**GREEDY, "logit_bias": {"50": 100}},
    "penalties": {**GREEDY, "presence_penalty": 1.5, "frequency_penalty": -0.5},
    "max_completion_tokens": {"temperature": 0, "max_completion_tokens": 5},
    "labels": {**GREEDY, "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
    "vllm's": {**GREEDY, "extra_body": {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True}},
    "min_tokens": {**GREEDY, "extra_body": {"min_tokens": 8, "stop_token_ids": [5]}},
    "continued": {**GREEDY, "extra_body": {"continue_final_message": True}},
    "token ids": {**GREEDY, "extra_body": {"return_token_ids": True, "skip_special_tokens": False}},
    "allowed": {**GREEDY, "extra_body": {"allowed_token_ids": [10, 11, 12], "bad_words": ["dog"]}},
}
COMPLETION_CALLS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "hello world"},
    "texts": {"prompt": ["hello", "world", "the dog"]},
    "ids": {"prompt": [10, 11, 12]},
    "lists of ids": {"prompt": [[10, 11], [12, 13, 14]]},
    "echo": {"prompt": "hello", "echo": True},
    "two choices": {"prompt": ["hello", "world"], "n": 2, "best_of": 2, "temperature": 1, "seed": 3},
    "default length": {"prompt": "hello", "max_tokens": openai.omit},
    "logprobs": {"prompt": "hello", "logprobs": 2},
}


def _joined(chunks: Any, part: str) -> dict[int, str]:
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            text = choice.delta.content if part == "chat" else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (text or "")
    return texts


@pytest.mark.parametrize("name", CHAT_CALLS)
def test_given_chat_when_streamed_then_the_text_is_that_of_the_whole_answer(client: openai.OpenAI, name: str) -> None:
    arguments = {"model": "tiny", "messages": MESSAGES, **CHAT_CALLS[name]}
    whole = client.chat.completions.create(**arguments)
    stream = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))

    assert {choice.index: choice.message.content for choice in whole.choices} == _joined(stream, "chat")
    assert len({chunk.id for chunk in stream}) == 1
    assert stream[0].choices[0].delta.role == "assistant"
    assert stream[-1].usage.completion_tokens == whole.usage.completion_tokens > 0
    ends = [choice.finish_reason for chunk in stream for choice in chunk.choices if choice.finish_reason]
    assert sorted(ends) == sorted(choice.finish_reason for choice in whole.choices)


@pytest.mark.parametrize("name", COMPLETION_CALLS)
def test_given_completion_when_streamed_then_the_text_is_that_of_the_whole_answer(
    client: openai.OpenAI, name: str
) -> None:
    arguments = {"model": "alias", **GREEDY, **COMPLETION_CALLS[name]}
    whole = client.completions.create(**arguments)
    streamed = {**arguments, "logprobs": openai.omit}
    stream = list(client.completions.create(**streamed, stream=True))

    assert [choice.index for choice in whole.choices] == list(range(len(whole.choices)))
    assert {choice.index: choice.text for choice in whole.choices} == _joined(stream, "completion")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_given_async_client_when_calls_overlap_then_each_stream_keeps_its_id_and_text(server: RunningServer) -> None:
    async def one(client: openai.AsyncOpenAI, number: int) -> tuple[str, str]:
        messages = [{"role": "user", "content": f"hello {number}"}]
        arguments: dict[str, Any] = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 24}
        whole = await client.chat.completions.create(**arguments)
        chunks = [chunk async for chunk in await client.chat.completions.create(**arguments, stream=True)]
        assert _joined(chunks, "chat")[0] == whole.choices[0].message.content
        (name,) = {chunk.id for chunk in chunks}
        return name, _joined(chunks, "chat")[0]

    async def run() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300
        ) as client:
            return await asyncio.gather(*(one(client, number) for number in range(8)))

    found = asyncio.run(run())
    assert len({name for name, _ in found}) == len(found)
    assert len({text for _, text in found}) > 1
    server.wait_until_idle()


def test_given_logprobs_when_asked_then_they_are_those_of_the_tokens(client: openai.OpenAI) -> None:
    arguments = {"model": "tiny", "messages": MESSAGES, **CHAT_CALLS["logprobs"]}
    whole = client.chat.completions.create(**arguments).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**arguments, stream=True)]
    streamed = [entry for choice in chunks if choice.logprobs for entry in choice.logprobs.content]

    assert streamed == whole.logprobs.content
    assert len(streamed) == 8
    for entry in streamed:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy: the likeliest was chosen
        assert bytes(entry.bytes).decode(errors="replace") == entry.token or entry.token.startswith("bytes:")


def test_given_echo_with_logprobs_when_no_tokens_are_wanted_then_the_prompt_alone_is_scored(
    client: openai.OpenAI,
) -> None:
    answer = client.completions.create(model="tiny", prompt="hello world", echo=True, logprobs=1, max_tokens=0)
    found = answer.choices[0]
    assert found.text == "hello world" == "".join(found.logprobs.tokens)
    assert found.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in found.logprobs.token_logprobs[1:])
    assert found.logprobs.text_offset[0] == 0
    assert answer.usage.completion_tokens == 0


def test_given_stop_text_when_it_comes_then_it_is_cut_and_the_reason_says_so(client: openai.OpenAI) -> None:
    text = client.completions.create(model="tiny", prompt="hello", temperature=0, max_tokens=16).choices[0].text
    stop = text[len(text) // 2 :][:3]
    answer = client.completions.create(model="tiny", prompt="hello", temperature=0, max_tokens=16, stop=stop).choices[0]
    assert answer.text == text[: text.index(stop)]
    assert answer.finish_reason == "stop"
    assert answer.model_extra is not None
    assert answer.model_extra["stop_reason"] == stop


def test_given_models_when_listed_then_every_name_is_there(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"temperature": 200}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"n": 1000}, openai.BadRequestError, "n"),
        ({"tools": [{"type": "web"}]}, openai.BadRequestError, "tools"),
        ({"extra_body": {"nonsense": 1}}, openai.BadRequestError, "nonsense"),
    ],
)
def test_given_bad_value_when_asked_then_the_client_raises_its_own_error_with_the_field(
    client: openai.OpenAI, change: dict[str, Any], error: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **change})
    assert caught.value.param == param
    assert param in caught.value.message
