"""`pellucid serve` as people run it: a process, signals, a port that is taken."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import psutil
import pytest
from utils.children import child, finished
from utils.waiting import until

_PATIENCE = 120.0
_LONG = {"prompt": [5] * 8, "temperature": 0, "ignore_eos": True, "max_tokens": 3000}


def _command(model: Path, *options: str) -> list[str]:
    engine = ["--num-blocks", "600", "--num-threads", "1"]
    return [sys.executable, "-m", "pellucid.cli", "serve", str(model), *engine, *options]


@contextmanager
def _serving(model: Path, *options: str, ignores_interrupts: bool = False) -> Iterator[tuple[Popen[str], str]]:
    """(process, URL without /v1) of a server that is up."""
    command = _command(model, "--port", "0", *options)
    with child(command, ignores_interrupts=ignores_interrupts) as process:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line, process.stderr and process.stderr.read()
        url = line.removesuffix("/v1")
        until(lambda: _is_up(url), "the server")
        yield process, url


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=_PATIENCE).status_code == 200
    except httpx.ConnectError:
        return False


def _ask(url: str, answers: list[Any], **fields: Any) -> threading.Thread:
    def run() -> None:
        try:
            answers.append(httpx.post(f"{url}/v1/completions", json={**_LONG, **fields}, timeout=_PATIENCE))
        except httpx.HTTPError as error:
            answers.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _wait_for_running(url: str, count: int) -> None:
    until(lambda: f" {count}.0" in _running_line(url), f"request {count}")


def _running_line(url: str) -> str:
    text = httpx.get(f"{url}/metrics", timeout=_PATIENCE).text
    return next(line for line in text.splitlines() if line.startswith("pellucid:num_requests_running{"))


@pytest.mark.parametrize("options", [(), ("--engine-process",)], ids=["thread", "process"])
@pytest.mark.slow
def test_given_load_when_terminated_then_running_requests_end_and_the_status_is_0(
    long_model: Path, options: tuple[str, ...]
) -> None:
    with _serving(long_model, *options) as (process, url):
        answers: list[Any] = []
        threads = [_ask(url, answers), _ask(url, answers, stream=True)]
        _wait_for_running(url, 2)
        process.send_signal(signal.SIGTERM)
        health = _health_while_draining(url)
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "hi"}, timeout=_PATIENCE) if health else None
        for thread in threads:
            thread.join(_PATIENCE)
        assert process.wait(_PATIENCE) == 0
    if refused is not None:
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) >= 1
    whole, streamed = sorted(answers, key=lambda answer: answer.headers["content-type"])
    assert whole.json()["usage"]["completion_tokens"] == 3000
    assert streamed.text.endswith("data: [DONE]\n\n")


def _health_while_draining(url: str) -> dict[str, Any] | None:
    """What /health says once the signal has arrived; None when the server ended before it could be asked."""
    while True:
        try:
            answer = httpx.get(f"{url}/health", timeout=_PATIENCE)
        except httpx.TransportError:
            return None
        if answer.status_code == 503:
            assert answer.json()["status"] == "draining"
            return dict(answer.json())


def test_given_deadline_when_it_passes_then_the_rest_is_aborted_and_the_status_is_0(long_model: Path) -> None:
    with _serving(long_model, "--drain-timeout", "0") as (process, url):
        answers: list[Any] = []
        thread = _ask(url, answers, max_tokens=8000)
        _wait_for_running(url, 1)
        process.send_signal(signal.SIGTERM)
        thread.join(_PATIENCE)
        assert process.wait(_PATIENCE) == 0
    choice = answers[0].json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "abort")


def test_given_second_signal_when_draining_then_it_ends_at_once(long_model: Path) -> None:
    with _serving(long_model) as (process, url):
        answers: list[Any] = []
        thread = _ask(url, answers, max_tokens=8000)
        _wait_for_running(url, 1)
        process.send_signal(signal.SIGINT)
        _health_while_draining(url)
        process.send_signal(signal.SIGINT)
        assert process.wait(_PATIENCE) == 1
        thread.join(_PATIENCE)


def test_given_idle_server_when_interrupted_then_the_status_is_0_and_no_trace_is_printed(tiny_model: Path) -> None:
    with _serving(tiny_model, "--log-json") as (process, _):
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=_PATIENCE)
        assert process.returncode == 0
    assert "Traceback" not in errors
    assert all(json.loads(line)["level"] for line in errors.splitlines())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("options", [(), ("--engine-process",)], ids=["thread", "process"])
def test_given_server_that_a_shell_put_into_the_background_when_told_to_end_then_the_status_is_0(
    tiny_model: Path, options: tuple[str, ...], number: signal.Signals
) -> None:
    """Such a shell lets it ignore interrupts. It asked for SIGINT itself, and its engine process ends with it."""
    with _serving(tiny_model, *options, ignores_interrupts=True) as (process, _):
        engines = psutil.Process(process.pid).children()
        assert len(engines) == len(options)
        process.send_signal(number)
        assert process.wait(_PATIENCE) == 0
        assert not psutil.wait_procs(engines, _PATIENCE)[1]


def test_given_taken_port_when_served_then_it_says_so_before_loading(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = finished(_command(tmp_path / "no such model", "--port", str(port)))
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1] == f"error: port {port} on 127.0.0.1 is taken: choose another with --port"
    )


def test_given_key_in_the_environment_when_served_then_it_is_needed(tiny_model: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PELLUCID_API_KEY", "from-environment")
    with _serving(tiny_model) as (_, url):
        assert httpx.get(f"{url}/v1/models", timeout=_PATIENCE).status_code == 401
        headers = {"authorization": "Bearer from-environment"}
        assert httpx.get(f"{url}/v1/models", headers=headers, timeout=_PATIENCE).status_code == 200
    assert "PELLUCID_API_KEY" in os.environ


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--port", "70000"), "port is 70000"),
        (("--host", "no.such.host.invalid"), "no.such.host.invalid"),
        (("--ssl-certfile", "cert.pem"), "ssl_keyfile"),
    ],
)
def test_given_bad_option_when_served_then_it_is_refused_before_loading(
    tiny_model: Path, options: tuple[str, ...], words: str
) -> None:
    done = finished(_command(tiny_model, *options))
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
