"""A client that leaves, wherever it is: its request ends, its blocks are free, the others go on."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from utils.http_server import RunningServer, running_server

_PATIENCE = 120.0
_TOKENS = 7000  # of an answer that nobody waits for


@pytest.fixture(scope="module")
def server(long_model: Any) -> Iterator[RunningServer]:
    with running_server(long_model, num_blocks=1100, max_num_batched_tokens=16) as running:
        yield running


def _generated(server: RunningServer) -> int:
    return asyncio.run_coroutine_threadsafe(server.engine.stats(), server.loop).result(_PATIENCE).generation_tokens


def _post(server: RunningServer, **fields: Any) -> socket.socket:
    """A connection on which a request has been sent."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    body = json.dumps(
        {"prompt": [5] * 8, "temperature": 0, "ignore_eos": True, "max_tokens": _TOKENS, **fields}
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    connection = socket.create_connection((host, int(port)), timeout=_PATIENCE)
    connection.sendall(head.encode() + body)
    return connection


def _wait_for_running(server: RunningServer, tokens_since: int | None = None) -> None:
    """Until a request runs; with `tokens_since`, until it has made a token."""

    async def poll() -> None:
        while True:
            stats = await server.engine.stats()
            if stats.num_running and (tokens_since is None or stats.generation_tokens > tokens_since):
                return
            await asyncio.sleep(0.005)

    asyncio.run_coroutine_threadsafe(poll(), server.loop).result(_PATIENCE)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("moment", ["before headers", "mid-prefill", "mid-decode"])
def test_given_client_when_it_leaves_then_its_request_ends(server: RunningServer, moment: str, stream: bool) -> None:
    before = _generated(server)
    prompt = [5] * (1000 if moment == "mid-prefill" else 8)
    connection = _post(server, prompt=prompt, stream=stream)
    if moment == "mid-prefill":
        _wait_for_running(server)
    if moment == "mid-decode":
        _wait_for_running(server, before)
        if stream:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    connection.close()

    server.wait_until_idle()
    assert _generated(server) - before < _TOKENS, "the request ran to its end although nobody waited for it"


def test_given_client_when_it_left_before_the_stream_began_then_its_request_ends(server: RunningServer) -> None:
    before = _generated(server)
    body = json.dumps({"prompt": [5] * 8, "ignore_eos": True, "max_tokens": _TOKENS, "stream": True}).encode()
    received = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict[str, Any]:
        return next(received, {"type": "http.disconnect"})

    async def send(message: Any) -> None: ...

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "http_version": "1.1",
        "scheme": "http",
    }
    asyncio.run_coroutine_threadsafe(server.server.app(scope, receive, send), server.loop).result(_PATIENCE)
    server.wait_until_idle()
    assert _generated(server) - before < _TOKENS


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_given_several_prompts_and_choices_when_the_client_leaves_then_all_end(
    server: RunningServer, stream: bool
) -> None:
    before = _generated(server)
    connection = _post(server, prompt=[[5] * 8, [6] * 8], n=2, max_tokens=2000, temperature=1, stream=stream)
    _wait_for_running(server, before)
    connection.close()
    server.wait_until_idle()
    assert _generated(server) - before < 4 * 2000


def test_given_a_neighbour_when_a_client_leaves_then_the_neighbour_is_not_disturbed(server: RunningServer) -> None:
    fields = {"prompt": [7] * 8, "temperature": 0, "ignore_eos": True, "max_tokens": 200}
    alone = httpx.post(f"{server.url}/v1/completions", json=fields, timeout=_PATIENCE).json()["choices"][0]["text"]
    before = _generated(server)
    leaving = _post(server, stream=True)
    _wait_for_running(server, before)
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={**fields, "stream": True}, timeout=_PATIENCE
    ) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        leaving.close()
        events = [first, *lines]
    chunks = [json.loads(line[6:]) for line in events if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == alone
    assert events[-2] == "data: [DONE]" or events[-1] == "data: [DONE]"
    server.wait_until_idle()


def test_given_a_storm_of_clients_when_all_leave_then_nothing_is_held(server: RunningServer) -> None:
    for number in range(60):
        connection = _post(server, stream=bool(number % 2), max_tokens=500)
        if number % 3 == 0:
            _wait_for_running(server)
        connection.close()
    server.wait_until_idle()
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "hi", "max_tokens": 2}, timeout=_PATIENCE)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("to-cancel", "cmpl-to-cancel"),
        ("to-cancel", "to-cancel"),
        ("cmpl-1", "cmpl-1"),
        ("cmpl-1", "cmpl-cmpl-1"),
        ("msg_cmpl-1", "cmpl-msg_cmpl-1"),
    ],
)
def test_given_running_stream_when_cancelled_by_id_then_it_ends_as_cut_short(
    server: RunningServer, name: str, asked: str
) -> None:
    fields = {"prompt": "hi", "ignore_eos": True, "max_tokens": _TOKENS, "stream": True, "request_id": name}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=fields, timeout=_PATIENCE) as answer:
        lines = answer.iter_lines()
        next(lines)
        cancelled = httpx.post(f"{server.url}/v1/requests/{asked}/cancel", timeout=_PATIENCE)
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert cancelled.json() == {"request_id": name, "cancelled": True}
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["choices"][0]["stop_reason"] == "abort"
    assert httpx.post(f"{server.url}/v1/requests/unknown/cancel", timeout=_PATIENCE).status_code == 404
    server.wait_until_idle()
