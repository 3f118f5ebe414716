"""`pellucid serve` on a damaged model, and with a trace that meets a full disk."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import pytest
from utils.children import child, finished
from utils.disks import compile_damaged, small_disk
from utils.http_server import running_server
from utils.tiny_models import build_tiny_checkpoint

from pellucid.program.checksums import BLOCK_BYTES
from pellucid.server.run import DEAD_SECONDS

_PATIENCE = 120.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 8192}
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama", **sizes)


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> tuple[Path, int]:
    return compile_damaged(checkpoint, tmp_path)


def _command(model: Path, *options: str) -> list[str]:
    engine = ["--num-blocks", "600", "--num-threads", "1", "--port", "0"]
    return [sys.executable, "-m", "pellucid.cli", "serve", str(model), *engine, *options]


@contextmanager
def _serving(model: Path, *options: str) -> Iterator[tuple[Popen[str], str]]:
    with child(_command(model, *options), errors="replace") as process:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line, process.stderr and process.stderr.read()
        yield process, line.removesuffix("/v1")


def _until_dead(url: str) -> httpx.Response:
    """The first answer of /health that is not 200."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        try:
            answer = httpx.get(f"{url}/health", timeout=_PATIENCE)
        except httpx.ConnectError:
            continue  # it does not listen yet
        if answer.status_code != 200:
            return answer
        time.sleep(0.02)
    pytest.fail("the engine lives with damaged weights")


@pytest.mark.parametrize("options", [(), ("--engine-process",)], ids=["thread", "process"])
@pytest.mark.slow
def test_given_damaged_model_when_found_then_callers_and_health_are_told_and_the_status_is_1(
    damaged: tuple[Path, int], options: tuple[str, ...]
) -> None:
    path, block = damaged
    text = f"m.pld is damaged: block {block} of 1 MiB, at byte {block * BLOCK_BYTES:,}"
    answers: list[Any] = []
    with _serving(path, *options) as (process, url):

        def ask() -> None:
            body = {"prompt": [5] * 8, "temperature": 0, "ignore_eos": True, "max_tokens": 8000}
            answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=_PATIENCE))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        health = _until_dead(url)
        late = httpx.post(f"{url}/v1/completions", json={"prompt": "hi"}, timeout=_PATIENCE)
        asking.join(_PATIENCE)
        assert process.wait(_PATIENCE) == 1, "it ends by itself"
        errors = process.stderr.read() if process.stderr else ""
    assert (health.status_code, health.json()["status"]) == (503, "dead")
    assert text in health.json()["reason"]
    for answer in (late, *answers):
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_dead"
        assert text in answer.json()["error"]["message"]
    assert text in errors
    assert str(path) in errors, "the log may say where it lies"
    assert str(path.parent) not in health.text + late.text
    assert "Traceback" not in errors
    assert path.exists()


def test_given_dead_engine_when_terminated_then_the_server_does_not_wait_and_the_status_is_1(
    damaged: tuple[Path, int],
) -> None:
    with _serving(damaged[0]) as (process, url):
        _until_dead(url)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(_PATIENCE) == 1
        assert time.monotonic() - began < _PATIENCE / 2


def test_given_damaged_model_when_served_with_verify_then_it_is_refused_before_it_serves(
    damaged: tuple[Path, int],
) -> None:
    done = finished(_command(damaged[0], "--verify"))
    assert done.returncode == 2
    assert f"m.pld is damaged: block {damaged[1]} " in done.stderr.splitlines()[-1]
    assert done.stdout == ""


@pytest.mark.slow
def test_given_engine_that_was_closed_when_time_passes_then_the_server_ends(checkpoint: Path) -> None:
    with running_server(checkpoint) as running:
        running.engine.close()
        end = time.monotonic() + DEAD_SECONDS + 60
        while not running.server.should_exit:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert running.server.exit_status == 1


def _failed(url: str) -> float:
    text = httpx.get(f"{url}/metrics", timeout=_PATIENCE).text
    line = next(line for line in text.splitlines() if line.startswith("pellucid:trace_failed{"))
    return float(line.split()[-1])


def test_given_trace_when_its_disk_fills_then_metrics_say_so_and_requests_go_on(
    checkpoint: Path, tmp_path: Path
) -> None:
    with (
        small_disk(tmp_path / "disk", 64) as disk,
        running_server(checkpoint, trace_path=str(disk / "t.jsonl")) as running,
    ):
        assert _failed(running.url) == 0
        for _ in range(200):
            body = {"prompt": "hi", "max_tokens": 16, "ignore_eos": True}
            answer = httpx.post(f"{running.url}/v1/completions", json=body, timeout=_PATIENCE)
            assert answer.status_code == 200
            if _failed(running.url):
                break
        assert _failed(running.url) == 1
        assert httpx.post(f"{running.url}/v1/completions", json=body, timeout=_PATIENCE).status_code == 200
        assert httpx.get(f"{running.url}/health", timeout=_PATIENCE).status_code == 200
        running.engine.close()
