"""What goes wrong with an asynchronous engine: failing steps, a dying owner, closing, draining, rubbish on its sockets."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zmq
from utils.async_engines import (
    ENDLESS,
    KINDS,
    LONG,
    PATIENCE,
    SETTINGS,
    SHORT,
    Start,
    build_model,
    check_rest,
    joined,
    owner_of,
    owner_process,
    start_engine,
    started,
    transport_of,
    until,
)
from utils.children import child

from pellucid import LLM
from pellucid.api.sampling_params import SamplingParams
from pellucid.errors import (
    ConfigError,
    EngineDeadError,
    EngineDrainingError,
    InvalidRequestError,
    ModelNotFoundError,
    NativeError,
)
from pellucid.service.async_engine import AsyncLLMEngine
from pellucid.service.messages import Cancel, ReadStats, ReadSteps, Submit
from pellucid.service.wire import MAX_COMMAND_BYTES, address, encode

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def start(model: Path) -> Iterator[Start]:
    with started() as start:
        yield lambda kind, **settings: start(kind, model, **settings)


def fail_once(executor: Any, error: Exception, *, before: bool) -> None:
    """The executor's next step raises, before anything of it is booked or behind its computation."""
    execute = executor.execute

    def failing(plan: Any) -> Any:
        executor.execute = execute
        if not before:
            execute(plan)
        raise error

    executor.execute = failing


# ---- a step fails -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"async_scheduling": True}, {"speculative_method": "ngram"}], ids=str)
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("error", [ValueError("a cosmic ray"), NativeError("a cosmic ray", -2)], ids=["any", "core"])
async def test_executor_when_it_raises_once_then_its_requests_end_with_an_error_and_the_rest_goes_on(
    start: Start, settings: dict[str, Any], before: bool, error: Exception
) -> None:
    engine = start("thread", **settings)
    llm_engine = owner_of(engine).engine
    wanted = await engine.generate("hello world", LONG)
    hit = [await engine.submit("hello world", ENDLESS) for _ in range(SETTINGS["max_num_seqs"])]
    rest = [await engine.submit("hello world", LONG) for _ in range(3)]
    watcher = engine.watch_stream(hit[0])
    await anext(watcher)
    fail_once(llm_engine.executor, error, before=before)
    outputs = [await engine.wait(name) for name in hit]
    assert {choice.finish_reason for output in outputs for choice in output.outputs} == {"error"}
    assert all("a cosmic ray" in (output.outputs[0].error or "") for output in outputs)
    last = [chunk async for chunk in watcher][-1]
    assert last.finish_reason == "error"
    assert "a cosmic ray" in (last.error or "")
    for name in rest:
        assert (await engine.wait(name)).outputs[0].token_ids == wanted.outputs[0].token_ids
    await check_rest(engine)
    assert (await engine.stats()).finished["error"] == len(hit)
    for _ in range(3):  # nothing of the failed step is left with the executor
        await engine.generate("hello world", SHORT)
    runner = llm_engine.executor.runner
    assert len(runner._requests) <= 1, "only the last one, whose end the next plan tells"


async def test_executor_when_it_raises_once_inline_then_the_next_call_works(model: Path) -> None:
    with LLM(model, **SETTINGS) as llm:
        fail_once(llm.engine.executor, RuntimeError("once"), before=True)
        outputs = llm.generate(["hello world", "the quick"], SHORT)
        assert [output["status"] for output in outputs] == ["finished_error"] * 2
        assert outputs[0].outputs[0].error == "the step failed: RuntimeError: once"
        assert llm.kv_cache_stats()["used_blocks"] == 0
        llm.engine.scheduler.check_invariants()
        assert llm.generate("hello world", SHORT)[0]["status"] == "finished_length"


async def test_trace_when_the_disk_is_full_then_serving_goes_on_without_it(start: Start) -> None:
    engine = start("thread", trace_path="/dev/full")
    assert len((await engine.generate("hello world", SHORT))["token_ids"]) == 5
    assert len(await engine.steps(-5)) == 5
    await check_rest(engine)


# ---- the owner dies ---------------------------------------------------------------------------------------------------


def _fail_in_a_step(engine: AsyncLLMEngine) -> None:
    def schedule() -> None:
        raise MemoryError("no room for a plan")

    owner_of(engine).engine.scheduler.schedule = schedule


def _fail_outside_a_step(engine: AsyncLLMEngine) -> None:
    def stats() -> None:
        raise KeyError("no room for a plan")

    owner_of(engine).engine.stats = stats


def _kill_thread(engine: AsyncLLMEngine) -> None:
    ident: Any = ctypes.c_ulong(engine._transport._owning.ident)  # type: ignore[attr-defined]
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit)) == 1


def _kill_process(engine: AsyncLLMEngine) -> None:
    owner_process(engine).kill()


@pytest.mark.parametrize(
    ("kind", "kill", "text"),
    [
        ("thread", _fail_in_a_step, "MemoryError: no room for a plan"),
        ("thread", _fail_outside_a_step, "KeyError: 'no room for a plan'"),
        ("thread", _kill_thread, "SystemExit"),
        ("process", _kill_process, r"exit code -9 \(SIGKILL\)"),
    ],
)
async def test_owner_when_it_dies_then_everybody_who_waits_is_told_and_what_had_ended_can_be_read(
    start: Start, kind: str, kill: Callable[[AsyncLLMEngine], None], text: str
) -> None:
    engine = start(kind)
    ended = await engine.submit("hello", SHORT)
    output = await engine.wait(ended)
    running = await engine.submit("hello world", ENDLESS)
    waiting = [
        asyncio.create_task(engine.wait(running)),
        asyncio.create_task(joined(engine.watch_stream(running))),
        asyncio.create_task(joined(engine.stream("the quick", ENDLESS))),
        asyncio.create_task(engine.generate("jumps over", ENDLESS)),
    ]
    await until(lambda: _has_streams(engine, 4))
    waiting.append(asyncio.create_task(engine.drain(PATIENCE)))
    await asyncio.sleep(0)
    kill(engine)
    waiting.append(asyncio.create_task(engine.stats()))
    done = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), PATIENCE)
    assert [type(one) for one in done[:-1]] == [EngineDeadError] * 5, "the last one may have come before the end"
    with pytest.raises(EngineDeadError, match=text):
        raise done[0]  # type: ignore[misc]
    assert not engine.is_alive
    assert isinstance(engine.error, EngineDeadError)
    assert await engine.collect(ended) == output
    for asked in (engine.collect(running), engine.wait(running), engine.submit("x"), engine.abort_all()):
        with pytest.raises(EngineDeadError, match=text):
            await asked
    with pytest.raises(EngineDeadError, match=text):
        await joined(engine.stream("x"))


async def _has_streams(engine: AsyncLLMEngine, count: int) -> bool:
    return len(engine._book.streams) == count


async def test_idle_owner_when_its_process_is_killed_then_the_engine_knows_at_once(start: Start) -> None:
    engine = start("process")
    folder = Path(transport_of(engine).folder)
    owner_process(engine).kill()
    end = time.monotonic() + PATIENCE
    while engine.error is None:
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
    assert "SIGKILL" in str(engine.error)
    engine.close()
    assert not folder.exists()


_PARENT = """
import os, sys, time
from pellucid.config import EngineConfig
from pellucid.service.async_engine import AsyncLLMEngine
config = EngineConfig(sys.argv[1], num_blocks=16, max_model_len=64, num_threads=1)
engine = AsyncLLMEngine.start(config, engine_process=True)
print(engine._transport.process.pid, engine._transport.folder, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
async def test_engine_process_when_its_parent_ends_then_it_ends_too_and_its_folder_is_gone(
    model: Path, end: signal.Signals
) -> None:
    with child([sys.executable, "-c", _PARENT, model]) as parent:
        assert parent.stdout is not None
        pid, folder = parent.stdout.readline().split()
        engine = psutil.Process(int(pid))
        assert engine.is_running()
        parent.send_signal(end)
        parent.wait(PATIENCE)
        psutil.wait_procs([engine], timeout=PATIENCE)
        assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
        assert not Path(folder).exists()


# ---- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_load_when_it_fails_then_the_error_is_typed_and_nothing_is_left(
    tmp_path: Path, model: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    children = len(psutil.Process().children())
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        start_engine(kind, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="max_model_len is 50,000"):
        start_engine(kind, model, max_model_len=50_000)
    with pytest.raises(ConfigError, match="max_waiting is -1"):
        start_engine(kind, model, max_waiting=-1)
    assert len(psutil.Process().children()) == children
    assert not list(tmp_path.glob("pellucid-*"))


@pytest.mark.parametrize("kind", KINDS)
async def test_load_when_the_weights_are_packed_then_progress_is_told(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PELLUCID_CACHE", str(tmp_path / "cache"))
    told: list[tuple[int, int]] = []
    config = _config(build_model(tmp_path / "model"))
    engine = AsyncLLMEngine.start(
        config, engine_process=kind == "process", progress=lambda done, total: told.append((done, total))
    )
    engine.close()
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0


def _config(model: Path) -> Any:
    from pellucid.config import EngineConfig

    return EngineConfig.from_kwargs(model, SETTINGS)


# ---- draining and closing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_drain_when_there_is_time_then_all_end_whole_and_nothing_new_is_taken(start: Start, kind: str) -> None:
    engine = start(kind)
    running = [asyncio.create_task(engine.generate("hello world", LONG)) for _ in range(12)]
    await until(lambda: _has_streams(engine, 12))
    draining = asyncio.create_task(engine.drain(PATIENCE))
    await asyncio.sleep(0)
    with pytest.raises(EngineDrainingError):
        await engine.submit("hello world", SHORT)
    assert await draining
    assert {len((await one)["token_ids"]) for one in running} == {450}
    await check_rest(engine)
    assert await engine.drain(0), "nothing is left to wait for"


@pytest.mark.parametrize("kind", KINDS)
async def test_drain_when_time_is_up_then_the_rest_is_aborted(start: Start, kind: str) -> None:
    engine = start(kind)
    running = [asyncio.create_task(engine.generate("hello world", ENDLESS)) for _ in range(20)]
    await until(lambda: _has_streams(engine, 20))
    assert not await engine.drain(0.02)
    assert {(await one)["finish_reason"] for one in running} == {"abort"}
    await check_rest(engine)


@pytest.mark.parametrize("kind", KINDS)
async def test_engine_when_closed_then_who_waits_is_told_at_once_and_its_thread_and_process_are_gone(
    start: Start, kind: str
) -> None:
    engine = start(kind)
    process = None if kind == "thread" else owner_process(engine)
    folder = None if kind == "thread" else Path(transport_of(engine).folder)
    if folder is not None:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    await engine.submit("hello world", ENDLESS, request_id="it")
    waiting = [
        asyncio.create_task(joined(engine.watch_stream("it"))),
        asyncio.create_task(engine.wait("it")),
        asyncio.create_task(engine.generate("the quick", ENDLESS)),
    ]
    await until(lambda: _has_streams(engine, 2))
    waiting.append(asyncio.create_task(engine.drain(PATIENCE)))
    await asyncio.sleep(0)
    await asyncio.to_thread(engine.close)
    done = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), PATIENCE)
    assert {(type(one), str(one)) for one in done} == {(EngineDeadError, "the engine is closed")}
    engine.close()
    assert not engine.is_alive
    with pytest.raises(EngineDeadError, match="closed"):
        await engine.submit("hello")
    if process is not None and folder is not None:
        assert not process.is_running()
        assert not folder.exists()
    else:
        assert owner_of(engine).engine._closed
        assert not engine._transport._owning.is_alive()  # type: ignore[attr-defined]


# ---- rubbish ----------------------------------------------------------------------------------------------------------


def _rubbish() -> dict[str, bytes]:
    submit = encode(Submit(1, "x", [1, 2], SamplingParams()))
    fields = {"call": 1, "request_id": "x", "prompt_token_ids": [1], "params": {}}
    return {
        "nothing": b"",
        "random": os.urandom(1000),
        "text": b"GET / HTTP/1.1\r\n\r\n",
        "an array of 4 billion": b"\xdd\xff\xff\xff\xff",
        "a map of 4 billion": b"\xdf\xff\xff\xff\xff" + b"\xa1a" * 10,
        "a text of 4 billion": b"\xdb\xff\xff\xff\xff" + b"a" * 10,
        "deep": b"\x81\xa4type" + b"\x91" * 100_000,
        "deep in an unknown field": b"\x82\xa4type\xa9ReadStats\xa1x" + b"\x91" * 100_000,
        "truncated": submit[:-3],
        "with a tail": submit + b"\x00",
        "unknown type": encode({"type": "Explode", "call": 1}),
        "no type": encode(fields),
        "wrong type of a number": encode({"type": "Cancel", "call": "1", "request_id": "x"}),
        "missing field": encode({"type": "Cancel", "call": 1}),
        "number too large": b"\x82\xa4type\xa9ReadStats\xa4call\xcf" + b"\xff" * 8,
        "a token that is a fraction": encode({**fields, "type": "Submit", "prompt_token_ids": [1.5]}),
        "parameters out of range": encode({**fields, "type": "Submit", "params": {"n": 10**6}}),
        "parameters not finite": encode({**fields, "type": "Submit", "params": {"temperature": float("nan")}}),
        "bad utf-8": submit.replace(b"\xa1x", b"\xa1\xff"),
        "too large": b"\x00" * (MAX_COMMAND_BYTES + 1),
        # well formed, but not what the front end would send
        "a step from far away": encode(ReadSteps(0, -(2**62), -5)),
        "stats for nobody": encode(ReadStats(2**40)),
        "cancel of an unknown id": encode(Cancel(0, "\x00" * 1000)),
        "tokens that are none": encode(Submit(0, "x", [2**40, -1], SamplingParams())),
        "an empty id": encode(Submit(0, "", [1], SamplingParams())),
    }


@pytest.fixture(scope="module")
def process_engine(model: Path) -> Iterator[AsyncLLMEngine]:
    engine = start_engine("process", model)
    yield engine
    engine.close()


@pytest.mark.parametrize(
    "given", [(10**30,), (-(10**30),), ("a",), (None,), (1.5,), (True,), (0, 0), (0, "a"), (0, 4097)]
)
async def test_records_when_asked_for_by_what_is_no_number_then_refused_by_name(
    process_engine: AsyncLLMEngine, given: tuple[Any, ...]
) -> None:
    with pytest.raises(InvalidRequestError, match="limit is" if len(given) == 2 else "since is"):
        await process_engine.steps(*given)
    assert await process_engine.steps(np.int64(-1), np.int64(1)) == await process_engine.steps(-1, 1)


@pytest.mark.parametrize("name", list(_rubbish()))
async def test_rubbish_when_it_comes_to_a_socket_then_nothing_changes(
    process_engine: AsyncLLMEngine, name: str
) -> None:
    engine, frame = process_engine, _rubbish()[name]
    running = asyncio.create_task(engine.generate("hello world", SHORT))
    with zmq.Context() as context:
        for socket_name in ("commands", "events"):
            with context.socket(zmq.PUSH) as socket:
                socket.setsockopt(zmq.LINGER, 2_000)
                socket.connect(address(transport_of(engine).folder, socket_name))
                socket.send(frame)
                socket.send_multipart([frame, b"\xc1"])
    assert len((await running)["token_ids"]) == 5
    assert len((await engine.generate("hello world", SHORT))["token_ids"]) == 5
    await check_rest(engine)
    assert not engine._book.streams


async def test_socket_when_spoken_to_in_no_protocol_then_nothing_changes(process_engine: AsyncLLMEngine) -> None:
    import socket

    for name in ("commands", "events"):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(f"{transport_of(process_engine).folder}/{name}")
            raw.sendall(os.urandom(4096) + struct.pack("<Q", 2**63))
    await process_engine.generate("hello world", SHORT)
    await check_rest(process_engine)


async def test_request_when_it_is_too_large_for_the_socket_then_it_is_refused(
    process_engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pellucid.service.process.MAX_COMMAND_BYTES", 100)
    with pytest.raises(InvalidRequestError, match="the limit is 100"):
        await process_engine.submit("hello world", SHORT)
    assert not process_engine._book.streams
