"""A packed model that is found damaged while an asynchronous engine serves it, and traces on a full disk."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from utils.async_engines import ENDLESS, KINDS, PATIENCE, SHORT, Start, check_rest, joined, started, until
from utils.children import child
from utils.disks import compile_damaged, names, small_disk
from utils.tiny_models import build_tiny_checkpoint

from pellucid.errors import DamagedFileError, EngineDeadError
from pellucid.program.checksums import BLOCK_BYTES
from pellucid.trace.reader import TraceReader

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 16384}
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama", **sizes)


@pytest.fixture
def start() -> Iterator[Start]:
    with started() as start:
        yield start


@pytest.mark.parametrize("settings", [{}, {"async_scheduling": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
async def test_block_when_bad_then_running_and_later_requests_end_with_its_name(
    start: Start, checkpoint: Path, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    path, block = compile_damaged(checkpoint, tmp_path)
    engine = start(kind, path, **settings)
    running = [
        asyncio.create_task(engine.generate("hello", ENDLESS)),
        asyncio.create_task(joined(engine.stream("world", ENDLESS))),
    ]
    done = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), PATIENCE)
    text = f"m.pld is damaged: block {block} of 1 MiB, at byte {block * BLOCK_BYTES:,}"
    assert [type(one) for one in done] == [EngineDeadError] * 2
    assert all(text in str(one) for one in done)
    with pytest.raises(EngineDeadError, match=f"block {block} "):
        await engine.generate("hello", SHORT)
    assert not engine.is_alive
    assert text in str(engine.error)
    assert path.exists()


@pytest.mark.parametrize("kind", KINDS)
async def test_block_when_bad_and_nothing_runs_then_the_engine_is_dead_all_the_same(
    start: Start, checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    path, block = compile_damaged(checkpoint, tmp_path)
    engine = start(kind, path)

    async def is_dead() -> bool:
        return engine.error is not None

    await until(is_dead)
    assert f"block {block} " in str(engine.error)


@pytest.mark.parametrize("kind", KINDS)
async def test_block_when_bad_and_verify_is_asked_for_then_the_start_fails(
    start: Start, checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    path, block = compile_damaged(checkpoint, tmp_path)
    with pytest.raises(DamagedFileError, match=f"m.pld is damaged: block {block} "):
        start(kind, path, verify=True)


@pytest.mark.parametrize("kind", KINDS)
async def test_trace_when_its_disk_fills_then_requests_go_on_and_what_is_written_is_whole(
    start: Start, checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        engine = start(kind, checkpoint, trace_path=str(disk / "t.jsonl"))
        assert not (await engine.stats()).trace_has_failed
        while not (await engine.stats()).trace_has_failed:
            assert len((await engine.generate("hello", SHORT))["token_ids"]) == 5
        assert len((await engine.generate("hello", SHORT))["token_ids"]) == 5
        await check_rest(engine)
        trace = TraceReader(disk / "t.jsonl")
        assert len(list(trace.lines())) > 10
        assert "cut off" not in trace.end
        assert "no end line" in trace.end
        assert names(disk) == ["t.jsonl"]
        engine.close()


_PARENT = """
import sys, time
from pellucid.config import EngineConfig
from pellucid.service.async_engine import AsyncLLMEngine
config = EngineConfig(sys.argv[1], num_blocks=16, max_model_len=64, num_threads=1)
engine = AsyncLLMEngine.start(config, engine_process=True)
print(engine._transport.process.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Paths of sockets have a limit."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


async def test_folder_of_an_engine_process_when_all_are_killed_then_it_goes_at_the_next_start(
    start: Start, checkpoint: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(short_folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    command = [sys.executable, "-c", _PARENT, str(checkpoint)]
    with child(command) as parent:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        living = start("process", checkpoint)
        assert len(names(short_folder)) == 2, "another start takes nothing from those that live"
        engine.suspend()  # so that it does not tidy up behind its parent
        os.killpg(parent.pid, signal.SIGKILL)
        psutil.wait_procs([engine], timeout=PATIENCE)
    assert len(names(short_folder)) == 2
    start("process", checkpoint)
    assert len(names(short_folder)) == 2, "the dead ones' went, the new one's came"
    assert len((await living.generate("hello", SHORT))["token_ids"]) == 5
