"""Clients in the midst of their answers, and beside them requests of all kinds that fail: not one token of the former changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
from utils.http_server import RunningServer, running_server
from utils.neighbours import BEYOND, NAN_TOKEN, build_model, prompt_of

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
NUM_TOKENS = 400
NEIGHBOURS: list[dict[str, Any]] = [
    {"prompt": prompt_of(12, 80), "temperature": 0, "logprobs": 2},
    {"prompt": prompt_of(30, 81), "temperature": 0.9, "seed": 4, "top_p": 0.9, "repetition_penalty": 1.2},
    {"prompt": "hello world", "temperature": 0.8, "seed": 5},
]
_SHORT = {COMPLETIONS: {"max_tokens": 4}, CHAT: {"max_tokens": 4}}
_USER = [{"role": "user", "content": f"say {BEYOND}"}]
_STEER = {name: [3e38] * 64 for name in ("layers.0.mlp", "layers.1", "embed_tokens")}
# path, body, status, words of the answer; status 0: whatever it gets
BAD: list[tuple[str, dict[str, Any], int, str]] = [
    *(
        (COMPLETIONS, {"prompt": "a", "repetition_penalty": value}, 400, "repetition_penalty")
        for value in (5e-324, 1e-320, 1e-46, 7e-46, 1e-45, 1.4e-45, 1e-40, 1e-38, 9e-7, 0)
    ),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "repetition_penalty": 1e-45}, 400, "repetition_penalty"),
    (COMPLETIONS, {"prompt": "a", "temperature": 1e-45}, 200, "choices"),
    (COMPLETIONS, {"prompt": "a", "top_p": 5e-324, "min_p": 1e-46, "presence_penalty": 1e-46}, 200, "choices"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": 1e-46}}, 200, "choices"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"309": 1}}, 400, "token 309"),
    (COMPLETIONS, {"prompt": f"b {BEYOND}"}, 400, "309"),
    (COMPLETIONS, {"prompt": ["a", f"b {BEYOND}"]}, 400, "309"),
    (COMPLETIONS, {"prompt": [5, 309]}, 400, "309"),
    (COMPLETIONS, {"prompt": [5, 2**40]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": "a", "bad_words": [BEYOND]}, 400, "bad_words"),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": [309]}, 400, "stop_token_ids"),
    (CHAT, {"messages": _USER}, 400, "309"),
    ("/v1/messages", {"messages": _USER, "model": "m", "max_tokens": 4}, 400, "309"),
    ("/v1/responses", {"input": f"say {BEYOND}"}, 400, "309"),
    ("/v1/embeddings", {"input": f"say {BEYOND}"}, 400, "309"),
    (COMPLETIONS, {"prompt": [5, NAN_TOKEN, 6]}, 500, "not finite"),
    (COMPLETIONS, {"prompt": [*prompt_of(30, 81), NAN_TOKEN], "n": 3}, 500, "not finite"),
    (COMPLETIONS, {"prompt": [5, NAN_TOKEN, 6], "prompt_logprobs": 1}, 500, "not finite"),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "steering": _STEER}, 0, ""),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("neighbours"), max_position_embeddings=4096)


@pytest.fixture(scope="module", params=["thread", "process", "thread, plans ahead"])
def server(model: Path, request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    kind: str = request.param
    with running_server(
        model,
        served_model_name=("m",),
        engine_process="process" in kind,
        async_scheduling="ahead" in kind,
        max_num_batched_tokens=32,
    ) as running:
        yield running


def answer_of(server: RunningServer, body: dict[str, Any], begun: Event | None = None) -> list[Any]:
    """Tokens, text and logprobs of each chunk of a streamed completion, joined."""
    body = {**body, "max_tokens": NUM_TOKENS, "ignore_eos": True, "return_token_ids": True, "stream": True}
    body["logit_bias"] = {str(NAN_TOKEN): -100}  # drawn, it would end the answer
    found: list[Any] = []
    with httpx.stream("POST", server.url + COMPLETIONS, json=body, timeout=300) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                found += choice["token_ids"] or []
                found += (choice["logprobs"] or {}).get("token_logprobs") or []
            if begun is not None:
                begun.set()
    return sorted(map(repr, found)) if "logprobs" in body else found


def answers_until(is_over: Event, server: RunningServer, body: dict[str, Any], begun: Event) -> list[list[Any]]:
    """One answer behind the other, so that there is always one on its way."""
    found = [answer_of(server, body, begun)]
    while not is_over.is_set():
        found.append(answer_of(server, body))
    return found


def test_clients_when_others_fail_beside_them_then_they_get_what_they_get_alone(server: RunningServer) -> None:
    expected = [answer_of(server, body) for body in NEIGHBOURS]
    assert all(len(found) >= NUM_TOKENS for found in expected)
    begun, is_over = [Event() for _ in NEIGHBOURS], Event()
    with ThreadPoolExecutor(len(NEIGHBOURS)) as pool:
        pairs = zip(NEIGHBOURS, begun, strict=True)
        running = [pool.submit(answers_until, is_over, server, body, event) for body, event in pairs]
        try:
            for event in begun:
                assert event.wait(60)
            for path, body, status, words in BAD:
                answer = httpx.post(server.url + path, json=_SHORT.get(path, {}) | body, timeout=300)
                assert not status or answer.status_code == status, (body, answer.text)
                assert words in answer.text
        finally:
            is_over.set()
        for one, alone in zip(running, expected, strict=True):
            assert all(found == alone for found in one.result())
    server.wait_until_idle()
