"""Clients of the Responses and the Messages API that leave, are cancelled, or come to a server that goes down."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from utils.http_server import RunningServer, running_server
from utils.waiting import until

_PATIENCE = 120.0
_TOKENS = 7000  # of an answer that nobody waits for
_LONG = {"temperature": 0, "ignore_eos": True}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": "dog", "max_output_tokens": _TOKENS, **_LONG},
    "/v1/messages": {"messages": [{"role": "user", "content": "dog"}], "max_tokens": _TOKENS, **_LONG},
}


@pytest.fixture(scope="module")
def server(roomy_model: Any) -> Iterator[RunningServer]:
    with running_server(roomy_model, num_blocks=1100) as running:
        yield running


def _stats(server: RunningServer) -> Any:
    return asyncio.run_coroutine_threadsafe(server.engine.stats(), server.loop).result(_PATIENCE)


def _wait_for_tokens(server: RunningServer, since: int) -> None:
    until(lambda: _stats(server).generation_tokens > since, "a token")


def _post(server: RunningServer, path: str, **fields: Any) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    body = json.dumps({**BODIES[path], **fields}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection((host, int(port)), timeout=_PATIENCE)
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", BODIES)
def test_given_client_when_it_leaves_then_its_request_ends(server: RunningServer, path: str, stream: bool) -> None:
    before = _stats(server).generation_tokens
    connection = _post(server, path, stream=stream)
    _wait_for_tokens(server, before)
    if stream:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    connection.close()
    server.wait_until_idle()
    assert _stats(server).generation_tokens - before < _TOKENS
    assert len(server.server.context.responses) == 0, "nothing is stored of an answer that was not made"


@pytest.mark.parametrize("path", BODIES)
def test_given_running_stream_when_cancelled_by_the_answers_id_then_it_ends_as_cut_short(
    server: RunningServer, path: str
) -> None:
    with httpx.stream("POST", server.url + path, json={**BODIES[path], "stream": True}, timeout=_PATIENCE) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: "))
        first = json.loads(next(lines)[6:])
        name = first["response" if path == "/v1/responses" else "message"]["id"]
        httpx.post(f"{server.url}/v1/requests/{name}/cancel", timeout=_PATIENCE).raise_for_status()
        events = [json.loads(line[6:]) for line in lines]
    if path == "/v1/responses":
        assert events[-1]["response"]["status"] == "cancelled"
    else:
        assert events[-2]["delta"]["stop_reason"] == "max_tokens"
    server.wait_until_idle()


def test_given_requests_when_answered_then_metrics_and_limits_are_those_of_all_paths(server: RunningServer) -> None:
    for path, body in BODIES.items():
        small = {**body, **{name: 3 for name in body if name.startswith("max_")}, "request_id": "mine"}
        answer = httpx.post(server.url + path, json=small, timeout=_PATIENCE)
        assert answer.json()["request_id"] == "mine"
        large = httpx.post(server.url + path, content=b"x" * (5 << 20), timeout=_PATIENCE)
        assert large.status_code == 413
        told = large.json()["error"]["type"]
        assert told == ("request_too_large" if path == "/v1/messages" else "invalid_request_error")
    text = httpx.get(f"{server.url}/metrics", timeout=_PATIENCE).text
    for path in BODIES:
        assert f'method="POST",model_name="{server.engine.model.name}",path="{path}",status="200"' in text


def test_given_engine_that_dies_when_streams_run_then_each_is_told_in_its_own_words(roomy_model: Any) -> None:
    with running_server(roomy_model, num_blocks=1100) as running:
        answers: dict[tuple[str, bool], httpx.Response] = {}

        def ask(path: str, stream: bool) -> None:
            body = {**BODIES[path], "stream": stream}
            answers[path, stream] = httpx.post(running.url + path, json=body, timeout=_PATIENCE)

        threads = [
            threading.Thread(target=ask, args=(path, stream), daemon=True)
            for path in BODIES
            for stream in (False, True)
        ]
        for thread in threads:
            thread.start()
        until(lambda: _stats(running).num_running == len(threads), "the last request")
        running.engine.close()
        for thread in threads:
            thread.join(_PATIENCE)
    last = {path: json.loads(answers[path, True].text.splitlines()[-2][6:]) for path in BODIES}
    assert last["/v1/responses"]["type"] == "response.failed"
    assert last["/v1/responses"]["response"]["status"] == "failed"
    assert last["/v1/messages"]["error"]["type"] == "overloaded_error"
    assert {answers[path, False].status_code for path in BODIES} == {503}
    assert answers["/v1/responses", False].json()["error"]["code"] == "engine_dead"
    assert answers["/v1/messages", False].json()["error"]["type"] == "overloaded_error"
