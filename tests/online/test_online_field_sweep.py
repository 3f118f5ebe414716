"""Every field of every endpoint, wrong in type or out of range: the refusal speaks of a field by the name that was sent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from utils.http_server import RunningServer, running_server

from pellucid.server.anthropic.protocol import CountTokensRequest, MessagesRequest
from pellucid.server.chat.protocol import ChatCompletionRequest
from pellucid.server.completions.protocol import CompletionRequest
from pellucid.server.debug.protocol import DetokenizeRequest, TokenizeRequest
from pellucid.server.embeddings.protocol import EmbeddingRequest
from pellucid.server.responses.protocol import ResponsesRequest

_USER = [{"role": "user", "content": "hi"}]
_BODIES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatCompletionRequest, {"messages": _USER, "max_tokens": 1}),
    "/v1/completions": (CompletionRequest, {"prompt": "hi", "max_tokens": 1}),
    "/v1/embeddings": (EmbeddingRequest, {"input": "hi"}),
    "/v1/responses": (ResponsesRequest, {"input": "hi", "max_output_tokens": 1}),
    "/v1/messages": (MessagesRequest, {"messages": _USER, "max_tokens": 1}),
    "/v1/messages/count_tokens": (CountTokensRequest, {"messages": _USER}),
    "/tokenize": (TokenizeRequest, {"prompt": "hi"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [5]}),
}
_WRONG: tuple[Any, ...] = ("\u0001 wrong", -(10**30), 10**30, 0.5, True, [[{}]], {"wrong": 1}, [10**12])
# Names that no client of any endpoint sends.
_INTERNAL = re.compile(r"or None|(?<![a-z_])token_ids|\bcore\.|SamplingParams|pydantic")
_FIELDS = [(path, name) for path, (model, _) in _BODIES.items() for name in model.model_fields]


@pytest.fixture(scope="module")
def client(tiny_model: Any) -> Iterator[httpx.Client]:
    running: RunningServer
    with running_server(tiny_model, capture=True, steering=True) as running, httpx.Client(base_url=running.url) as one:
        yield one


def _refusals(client: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    answer = client.post(path, json=body, timeout=120)
    assert answer.status_code in (200, 400, 404, 422), (body, answer.text[:300])
    if answer.status_code in (400, 422):
        yield body, answer.json()["error"]


@pytest.mark.parametrize(("path", "name"), _FIELDS, ids=[f"{path} {name}" for path, name in _FIELDS])
def test_field_when_wrong_then_the_refusal_speaks_of_what_was_sent(client: httpx.Client, path: str, name: str) -> None:
    model, good = _BODIES[path]
    alias = model.model_fields[name].alias or name
    refused = 0
    for value in _WRONG:
        body = {**good, alias: value}
        for sent, error in _refusals(client, path, body):
            refused += 1
            message, param = error["message"], error.get("param", alias)
            assert param in sent, (value, error)
            assert not message or param in message, (value, error)
            assert not _INTERNAL.search(message), (value, error)
    assert refused or alias == "metadata", "nothing that was tried is wrong"


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (
            "/v1/chat/completions",
            {"max_completion_tokens": 5, "min_tokens": 10},
            "min_tokens",
            "max_completion_tokens, 5",
        ),
        ("/v1/chat/completions", {"max_tokens": 5, "min_tokens": 10}, "min_tokens", "at most max_tokens, 5"),
        ("/v1/responses", {"max_output_tokens": 5, "min_tokens": 10}, "min_tokens", "max_output_tokens, 5"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 999}, "top_logprobs", "top_logprobs is 999"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "messages[0].content[0].type is 'image_url'",
        ),
        ("/v1/embeddings", {"input": [10**6]}, "input", "input[0]"),
        ("/detokenize", {"tokens": [10**6]}, "tokens", "tokens"),
    ],
)
def test_field_when_it_has_another_name_inside_then_the_refusal_has_the_clients(
    client: httpx.Client, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    answer = client.post(path, json={**_BODIES[path][1], **body}, timeout=120)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert words in error["message"]
