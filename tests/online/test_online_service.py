"""The service around the API: keys, full queues, ends, health, ids, metrics, timeouts, browsers."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from utils.children import finished
from utils.http_server import RunningServer, running_server
from utils.waiting import until

from pellucid.errors import ConfigError
from pellucid.server.http.logs import set_up_logging
from pellucid.server.http.settings import ServerSettings

_PATIENCE = 120.0
_LONG = {"prompt": [5] * 8, "temperature": 0, "ignore_eos": True, "max_tokens": 7000}


@pytest.fixture(scope="module")
def keyed(tiny_model: Any) -> Iterator[RunningServer]:
    settings = {"api_key": ("first", "second"), "admin_key": "boss", "allowed_origins": ("https://a.example",)}
    with running_server(tiny_model, served_model_name=("tiny",), **settings) as running:
        yield running


@pytest.fixture(scope="module")
def narrow(long_model: Any) -> Iterator[RunningServer]:
    with running_server(long_model, num_blocks=600, max_num_seqs=1, max_waiting=1, request_timeout=30.0) as running:
        yield running


# path, key -> status
AUTH: list[tuple[str, str | None, int]] = [
    ("/health", None, 200),
    ("/health", "wrong", 200),
    *[
        (path, key, 401)
        for path in ("/v1/models", "/version", "/metrics", "/openapi.json")
        for key in (None, "", "wrong")
    ],
    *[("/v1/models", key, 401) for key in ("firs", "firstt", "First", "first second", "\xe9")],
    *[("/v1/models", key, 200) for key in ("first", "second", "boss")],
    ("/nothing", None, 401),
    ("/nothing", "first", 404),
    *[("/debug/kv_cache_stats", key, 401) for key in (None, "first", "second", "wrong")],
    ("/debug/kv_cache_stats", "boss", 200),
    ("/debug/steps", "boss", 200),
    ("/debug", "first", 401),
]


@pytest.mark.parametrize(("path", "key", "status"), AUTH)
@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_given_keys_when_asked_then_only_their_holders_get_in(
    keyed: RunningServer, path: str, key: str | None, status: int, header: str
) -> None:
    value = "" if key is None else (f"Bearer {key}".strip() if header == "authorization" else key)
    headers = {} if key is None else {header: value.encode("latin-1")}
    answer = httpx.get(keyed.url + path, headers=headers, timeout=_PATIENCE)
    assert answer.status_code == status
    if status == 401:
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"


def test_given_no_admin_key_but_keys_when_debug_is_asked_then_it_is_off(tiny_model: Any) -> None:
    with running_server(tiny_model, api_key=("first",)) as running:
        answer = httpx.get(f"{running.url}/debug/steps", headers={"authorization": "Bearer first"}, timeout=_PATIENCE)
    assert answer.status_code == 403


def test_given_browser_when_it_asks_first_then_only_allowed_origins_may(keyed: RunningServer) -> None:
    def ask(origin: str) -> httpx.Response:
        headers = {"origin": origin, "access-control-request-method": "POST"}
        return httpx.options(f"{keyed.url}/v1/chat/completions", headers=headers, timeout=_PATIENCE)

    assert ask("https://a.example").headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in ask("https://b.example").headers


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://a.example", 200),
        ("https://b.example", 403),
        ("https://a.example.evil", 403),
        ("null", 403),
        ("", 403),
        ("own", 200),
    ],
)
def test_given_page_of_an_origin_when_it_posts_without_asking_then_only_ours_and_allowed_ones_may(
    keyed: RunningServer, origin: str, status: int
) -> None:
    headers = {"origin": keyed.url if origin == "own" else origin, "authorization": "Bearer first"}
    answer = httpx.post(f"{keyed.url}/tokenize", json={"prompt": "hi"}, headers=headers, timeout=_PATIENCE)
    assert answer.status_code == status


def test_given_request_id_when_well_formed_then_it_comes_back(keyed: RunningServer) -> None:
    def returned(given: str) -> str:
        return httpx.get(f"{keyed.url}/health", headers={"x-request-id": given}, timeout=_PATIENCE).headers[
            "x-request-id"
        ]

    assert returned("abc-1.2:3_4") == "abc-1.2:3_4"
    assert re.fullmatch("[0-9a-f]{32}", returned("no good"))
    assert re.fullmatch("[0-9a-f]{32}", returned("x" * 129))


def test_given_metrics_when_requests_have_run_then_their_figures_are_there(keyed: RunningServer) -> None:
    headers = {"authorization": "Bearer first"}
    body = {"prompt": [5] * 40, "max_tokens": 3, "temperature": 0}
    for _ in range(2):
        httpx.post(f"{keyed.url}/v1/completions", json=body, headers=headers, timeout=_PATIENCE).raise_for_status()
    text = httpx.get(f"{keyed.url}/metrics", headers=headers, timeout=_PATIENCE).text
    found = dict(re.findall(r"^(pellucid:\S+?)\{[^}]*\} (\S+)$", text, re.MULTILINE))

    assert float(found["pellucid:prompt_tokens_total"]) == 80
    assert float(found["pellucid:generation_tokens_total"]) == 6
    assert float(found["pellucid:prefix_cache_hits_total"]) == 32
    assert float(found["pellucid:time_to_first_token_seconds_count"]) == 2
    assert float(found["pellucid:inter_token_latency_seconds_count"]) == 4
    assert 'pellucid:request_success_total{finished_reason="length",model_name="tiny"} 2.0' in text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"):
        assert f"pellucid:{name}{{" in text
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert f"pellucid:{name}_seconds_bucket{{" in text


def test_given_full_queue_when_one_more_comes_then_it_is_told_when_to_try_again(narrow: RunningServer) -> None:
    async def run() -> httpx.Response:
        async with httpx.AsyncClient(base_url=narrow.url, timeout=_PATIENCE) as client:
            held = [asyncio.ensure_future(client.post("/v1/completions", json=_LONG)) for _ in range(2)]
            while True:
                stats = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(narrow.engine.stats(), narrow.loop))
                if stats.num_running + stats.num_waiting == 2:
                    break
                await asyncio.sleep(0.01)
            refused = await client.post("/v1/completions", json={**_LONG, "stream": True})
            for one in held:
                one.cancel()
            await asyncio.gather(*held, return_exceptions=True)
            return refused

    refused = asyncio.run(asyncio.wait_for(run(), _PATIENCE))
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    narrow.wait_until_idle()


def test_given_several_prompts_when_not_all_find_a_place_then_none_is_kept(narrow: RunningServer) -> None:
    body = {**_LONG, "prompt": [[5] * 8] * 8}
    refused = httpx.post(f"{narrow.url}/v1/completions", json=body, timeout=_PATIENCE)
    assert refused.status_code == 429
    narrow.wait_until_idle()


def test_given_reader_that_takes_nothing_when_buffers_are_full_then_it_is_dropped(long_model: Any) -> None:
    with running_server(long_model, num_blocks=600, write_timeout=0.5) as running:
        host, _, port = running.url.removeprefix("http://").rpartition(":")
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect((host, int(port)))
        body = json.dumps({**_LONG, "stream": True, "logprobs": 100}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        reader.sendall(head.encode() + body)
        tasks = running.server.server_state.tasks
        deadline = time.monotonic() + _PATIENCE
        while (running.used_blocks() or tasks) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not tasks
        reader.settimeout(_PATIENCE)
        received = b""
        while part := reader.recv(1 << 16):
            received += part
        assert received.startswith(b"HTTP/1.1 200")
        assert b"[DONE]" not in received
        reader.close()


def test_given_certificate_when_served_then_it_speaks_tls(tiny_model: Any, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command = ["openssl", "req", *kind, *subject, "-keyout", str(key), "-out", str(certificate)]
    made = finished(command)
    if made.returncode:
        pytest.skip("openssl cannot make a certificate here")
    with running_server(tiny_model, ssl_keyfile=str(key), ssl_certfile=str(certificate)) as running:
        assert running.url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(f"{running.url}/health", verify=trusting, timeout=_PATIENCE).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{running.url}/health", timeout=_PATIENCE)


@pytest.mark.parametrize("content", [None, b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_given_certificate_that_is_none_when_served_then_typed_error_that_names_the_files(
    tiny_model: Any, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "certificate.pem"
    if content is not None:
        path.write_bytes(content)
    with (
        pytest.raises(
            ConfigError, match=r"ssl_certfile is '.*certificate.pem' and ssl_keyfile '.*'; they cannot be used: "
        ),
        running_server(tiny_model, ssl_keyfile=str(path), ssl_certfile=str(path)),
    ):
        pass


def test_given_json_logs_when_a_request_ends_then_its_lines_carry_its_id(tiny_model: Any, capsys: Any) -> None:
    settings = ServerSettings(log_json=True)
    set_up_logging(settings)
    try:
        with running_server(tiny_model) as running:
            body = {"prompt": "hi", "max_tokens": 2, "request_id": "watched"}
            headers = {"x-request-id": "outer"}
            httpx.post(
                f"{running.url}/v1/completions", json=body, headers=headers, timeout=_PATIENCE
            ).raise_for_status()
            running.wait_until_idle()
    finally:
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
        for name in ("pellucid", "uvicorn"):
            logging.getLogger(name).handlers.clear()
    ended = next(line for line in lines if line["logger"] == "pellucid.requests")
    access = next(line for line in lines if line["logger"] == "pellucid.access" and line["path"] == "/v1/completions")
    assert (ended["request_id"], ended["completion_tokens"], ended["reasons"]) == ("watched", 2, "length")
    assert (access["request_id"], access["status"], access["method"]) == ("outer", 200, "POST")


def test_given_request_timeout_when_it_passes_then_whole_and_streamed_answers_say_so(long_model: Any) -> None:
    with running_server(long_model, num_blocks=600, request_timeout=0.2) as running:
        whole = httpx.post(f"{running.url}/v1/completions", json=_LONG, timeout=_PATIENCE)
        streamed = httpx.post(f"{running.url}/v1/completions", json={**_LONG, "stream": True}, timeout=_PATIENCE)
        running.wait_until_idle()
    assert whole.status_code == 504
    events = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert whole.json()["error"]["code"] == json.loads(events[-2])["error"]["code"] == "request_timeout"
    assert events[-1] == "[DONE]"


def test_given_request_id_in_use_when_given_again_then_it_is_refused(narrow: RunningServer) -> None:
    body = {**_LONG, "stream": True, "request_id": "mine"}
    with httpx.stream("POST", f"{narrow.url}/v1/completions", json=body, timeout=_PATIENCE) as answer:
        lines = answer.iter_lines()
        next(lines)
        again = httpx.post(f"{narrow.url}/v1/completions", json=body, timeout=_PATIENCE)
        assert again.status_code == 400
        assert again.json()["error"]["param"] == "request_id"
        twice = [
            httpx.post(
                f"{narrow.url}/tokenize", json={"prompt": "a"}, headers={"x-request-id": "mine"}, timeout=_PATIENCE
            ).status_code
            for _ in range(2)
        ]
    assert twice == [200, 200]
    narrow.wait_until_idle()


def test_given_dead_engine_when_asked_then_health_says_so_and_callers_are_told(tiny_model: Any) -> None:
    with running_server(tiny_model) as running:
        running.engine.close()
        health = httpx.get(f"{running.url}/health", timeout=_PATIENCE)
        answer = httpx.post(f"{running.url}/v1/completions", json={"prompt": "hi"}, timeout=_PATIENCE)
        metrics = httpx.get(f"{running.url}/metrics", timeout=_PATIENCE)
    assert health.status_code == 503
    assert health.json()["status"] == "dead"
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_dead"
    assert metrics.status_code == 200


def _num_running(running: RunningServer) -> int:
    stats = asyncio.run_coroutine_threadsafe(running.engine.stats(), running.loop).result(_PATIENCE)
    return int(stats.num_running)


def test_given_engine_that_dies_when_callers_wait_then_each_gets_an_error_at_once(long_model: Any) -> None:
    with running_server(long_model, num_blocks=600) as running:
        answers: dict[bool, httpx.Response] = {}

        def ask(stream: bool) -> None:
            body = {**_LONG, "stream": stream}
            answers[stream] = httpx.post(f"{running.url}/v1/completions", json=body, timeout=_PATIENCE)

        threads = [threading.Thread(target=ask, args=(stream,), daemon=True) for stream in (False, True)]
        for thread in threads:
            thread.start()
        until(lambda: _num_running(running) == 2, "the second request")
        running.engine.close()
        for thread in threads:
            thread.join(_PATIENCE)
    assert answers[False].status_code == 503
    events = [line[6:] for line in answers[True].text.splitlines() if line.startswith("data: ")]
    assert json.loads(events[-2])["error"]["code"] == "engine_dead"
    assert events[-1] == "[DONE]"


def test_given_steps_when_read_from_a_number_then_they_follow_it(narrow: RunningServer) -> None:
    httpx.post(f"{narrow.url}/v1/completions", json={"prompt": "hi", "max_tokens": 4}, timeout=_PATIENCE)
    first = httpx.get(f"{narrow.url}/debug/steps?limit=2", timeout=_PATIENCE).json()
    second = httpx.get(f"{narrow.url}/debug/steps?since={first['next']}&limit=1", timeout=_PATIENCE).json()
    assert [record["step"] for record in first["steps"] + second["steps"]] == list(
        range(first["steps"][0]["step"], first["steps"][0]["step"] + 3)
    )
    assert {"kind", "tokens", "n_used_blocks"} <= set(first["steps"][0])
    for query in ("limit=0", "limit=x", "since=-1", "limit=100000"):
        refused = httpx.get(f"{narrow.url}/debug/steps?{query}", timeout=_PATIENCE)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == query.partition("=")[0]


def test_given_a_cached_prompt_when_the_prefix_cache_is_reset_then_nothing_is_hit(narrow: RunningServer) -> None:
    def ask(path: str) -> httpx.Response:
        return httpx.post(narrow.url + path, timeout=_PATIENCE)

    def hits() -> int:
        before = httpx.get(f"{narrow.url}/debug/kv_cache_stats", timeout=_PATIENCE).json()["prefix_hits"]
        body = {"prompt": [9] * 70, "max_tokens": 1, "temperature": 0}
        httpx.post(f"{narrow.url}/v1/completions", json=body, timeout=_PATIENCE).raise_for_status()
        return int(httpx.get(f"{narrow.url}/debug/kv_cache_stats", timeout=_PATIENCE).json()["prefix_hits"] - before)

    assert (hits(), hits() > 0) == (0, True)
    assert (ask("/debug/reset_prefix_cache").status_code, hits(), hits() > 0) == (200, 0, True)
    with httpx.stream("POST", f"{narrow.url}/v1/completions", json={**_LONG, "stream": True}, timeout=_PATIENCE) as one:
        lines = one.iter_lines()  # held: without it the client would leave
        next(lines)
        refused = ask("/debug/reset_prefix_cache")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "blocks_in_use")
    until(lambda: ask("/debug/reset_prefix_cache").json() == {"reset": True}, "blocks that are free again")


def test_given_keys_when_the_prefix_cache_is_reset_then_it_takes_the_admin_key(keyed: RunningServer) -> None:
    def status(key: str) -> int:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.post(f"{keyed.url}/debug/reset_prefix_cache", headers=headers, timeout=_PATIENCE).status_code

    assert (status("first"), status("boss")) == (401, 200)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"port": 70_000}, "port is 70000"),
        ({"port": True}, "port is True"),
        ({"host": ""}, "host"),
        ({"api_key": ("with space",)}, "api_key is not shown"),
        ({"admin_key": ""}, "admin_key is not shown"),
        ({"ssl_certfile": "a.pem"}, "ssl_keyfile"),
        ({"log_level": "loud"}, "log_level is 'loud'"),
        ({"request_timeout": 0}, "request_timeout is 0"),
        ({"max_body_bytes": -1}, "max_body_bytes"),
    ],
)
def test_given_bad_setting_when_made_then_the_error_names_it(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ServerSettings(**settings)
