"""`AsyncLLMEngine` called from several threads, each with a loop of its own, and by loops that have ended."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from utils.async_engines import ENDLESS, KINDS, build_model, start_engine
from utils.lone_runs import JOBS, check_chunks, check_same, lone_runs
from utils.together import PATIENCE, together

from pellucid import LLM
from pellucid.api.outputs import RequestOutput, StreamChunk
from pellucid.engine.metrics import EngineStats
from pellucid.errors import EngineDeadError
from pellucid.service.async_engine import AsyncLLMEngine

pytestmark = pytest.mark.timeout(180)
_NUMBERS = [index for index, job in enumerate(JOBS) if not job.options]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("async_threads"))


@pytest.fixture(scope="module")
def alone(model: Path) -> list[RequestOutput]:
    with LLM(model, max_model_len=256, num_blocks=200, block_size=4, num_threads=1) as llm:
        return lone_runs(llm)


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, model: Path) -> Iterator[AsyncLLMEngine]:
    engine = start_engine(request.param, model)
    yield engine
    engine.close()


def check_rest(engine: AsyncLLMEngine) -> None:
    """Soon nothing runs, and nothing is kept."""
    end = time.monotonic() + PATIENCE
    while True:
        stats: EngineStats = asyncio.run(engine.stats())
        is_idle = not (stats.num_running or stats.num_waiting or stats.kv_cache["used_blocks"])
        if is_idle and not engine._book.streams and not engine._book.calls:
            return
        assert time.monotonic() < end, (stats, engine._book.streams)
        time.sleep(0.01)


def in_loops(*works: Coroutine[Any, Any, None]) -> None:
    together([partial(asyncio.run, work) for work in works])


async def call(engine: AsyncLLMEngine, alone: list[RequestOutput], seed: int) -> None:
    """Does all kinds of things, several at once."""
    random_ = random.Random(seed)

    async def generate() -> None:
        index = random_.choice(_NUMBERS)
        check_same(await engine.generate(JOBS[index].prompt, JOBS[index].params), alone[index])

    async def stream() -> None:
        index = random_.choice(_NUMBERS)
        check_chunks([chunk async for chunk in engine.stream(JOBS[index].prompt, JOBS[index].params)], alone[index])

    async def leave() -> None:
        index = random_.choice(_NUMBERS)
        async for _ in engine.stream(JOBS[index].prompt, JOBS[index].params):
            break

    async def cancel() -> None:
        request_id = await engine.submit([5, 6, 7], ENDLESS)
        assert await engine.cancel(request_id)
        assert (await engine.wait(request_id))["finish_reason"] == "abort"
        await engine.release(request_id)

    async def be_cancelled() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(engine.generate([5, 6], ENDLESS), 0.01)

    async def ask() -> None:
        await engine.stats()
        await engine.steps(-3, 3)
        await engine.reset_prefix_cache()

    things = (generate, generate, stream, stream, leave, cancel, be_cancelled, ask)
    for _ in range(4):
        await asyncio.gather(*[random_.choice(things)() for _ in range(4)])


def test_threads_when_each_has_a_loop_of_its_own_then_each_output_is_what_it_is_alone(
    engine: AsyncLLMEngine, alone: list[RequestOutput]
) -> None:
    in_loops(*[call(engine, alone, seed) for seed in range(4)])
    gc.collect()
    check_rest(engine)


def test_request_when_made_on_one_loop_then_another_can_watch_and_cancel_it(engine: AsyncLLMEngine) -> None:
    async def submit() -> None:
        await engine.submit([5, 6, 7], ENDLESS, request_id="shared")

    async def watch() -> None:
        chunks = []
        async for chunk in engine.watch_stream("shared"):
            chunks.append(chunk)
            started.set()
        ends.append(chunks[-1].finish_reason)

    async def cancel() -> None:
        assert await asyncio.to_thread(started.wait, PATIENCE)
        assert await engine.cancel("shared")
        assert (await engine.wait("shared"))["finish_reason"] == "abort"

    started, ends = threading.Event(), list[object]()
    asyncio.run(submit())  # its loop has ended when the others begin
    in_loops(watch(), watch(), cancel())
    assert ends == ["abort", "abort"]
    asyncio.run(engine.release("shared"))
    check_rest(engine)


def test_loop_when_it_ends_under_its_requests_then_they_are_given_up_with_the_next_request(
    engine: AsyncLLMEngine, alone: list[RequestOutput]
) -> None:
    def leave_behind() -> None:
        loop = asyncio.new_event_loop()
        stream: AsyncIterator[StreamChunk] = engine.stream([5, 6], ENDLESS)
        generating = engine.generate([7, 8], ENDLESS)
        task = loop.create_task(generating)
        loop.run_until_complete(anext(stream))
        assert not task.done()
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.close()

    for _ in range(3):
        leave_behind()
    gc.collect()
    in_loops(call(engine, alone, 7))
    check_rest(engine)


def test_request_when_given_up_by_the_thread_that_holds_the_lock_then_it_is_ended_behind_the_next_events(
    engine: AsyncLLMEngine,
) -> None:
    async def submit() -> None:
        request_id = await engine.submit([5, 6], ENDLESS)
        stream = engine._book.find(request_id)
        with engine._book.lock:
            engine._book.abandon(stream)  # as the collector may
        await asyncio.sleep(0)

    asyncio.run(submit())
    check_rest(engine)


def test_engine_when_closed_while_loops_of_several_threads_wait_then_all_are_told(model: Path) -> None:
    engine = start_engine("thread", model)

    async def wait() -> None:
        ready.append(1)
        with pytest.raises(EngineDeadError):
            await engine.generate([5, 6], ENDLESS)

    async def close() -> None:
        while len(ready) < 3 or not (await engine.stats()).num_running:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.close)

    ready: list[int] = []
    in_loops(wait(), wait(), wait(), close())
    assert not engine.is_alive
