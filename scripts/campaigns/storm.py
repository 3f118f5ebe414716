#!/usr/bin/env python3
"""Many mixed requests, of which a third of the clients leave and some are cancelled: nothing may be left, and memory must stand.

    python scripts/campaigns/storm.py --count 10000

One case is one storm: of `AsyncLLMEngine` on a thread and in a process, and over HTTP with both. At its end no block is held, no request
known, no asyncio task, thread, descriptor, temporary file or process is left; and the memory of all processes concerned is in the last
quarter of the run as it was in the second.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kit.campaign import Campaign, Plant, Report, run
from kit.http_client import call, exchange, request_bytes
from kit.leftovers import Holdings, Memory, left_over, open_files, temporary_folder
from kit.scratch import Scratch
from kit.serving import Process

from pellucid.api.hidden_states import HiddenStatesParams
from pellucid.api.request_options import RequestOptions
from pellucid.api.sampling_params import SamplingParams
from pellucid.config import EngineConfig
from pellucid.service.async_engine import AsyncLLMEngine

KINDS = ("thread", "process", "http", "http-process")
SETTINGS: dict[str, Any] = {
    "max_model_len": 1024,
    "num_blocks": 512,
    "num_threads": 1,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
}
_SERVER_SETTINGS = {"max_stored_responses": 64, "log_requests": False, "drain_timeout": 5.0}
_NUM_CLIENTS = 24
_FEW, _WARM_UP = 40, 0.4  # requests before a storm, and more of them as a part of its size
_LEAVE, _CANCEL = 0.35, 0.15
_PATIENCE = 120.0
_SETTLING = 10.0  # seconds in which what was left has to end
PLANTS = {
    "block": Plant("one of a hundred requests keeps a block", "blocks are held|InvariantError|engine is dead|died"),
    "task": Plant("one of a hundred requests leaves a task", "asyncio tasks"),
    "thread": Plant("one of a hundred requests leaves a thread", "threads are left"),
    "descriptor": Plant("one of a hundred requests leaves a descriptor open", "descriptors are left"),
    "file": Plant("one of a hundred requests leaves a temporary file", "temporary files"),
    "memory": Plant("each request keeps a quarter of a megabyte", "memory grew"),
}


class Storms:
    """Each case is one storm of one kind."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._scratch = Scratch("storm")
        self._model = self._scratch.tiny_model()
        self._seed, self._kinds, self._plant = options.seed, options.kinds, options.plant
        self._size: int = options.requests
        self._percent: float = options.memory_percent
        if options.plant in PLANTS:
            self._kinds = ["thread"]
        self._figures: Counter[str] = Counter()  # of the storm that goes on
        self._told: Counter[str] = Counter()

    def run(self, case: int, report: Report) -> int:
        """Warms up, so that what is made once is made; then the storm, then the count of what is left."""
        kind = self._kinds[case % len(self._kinds)]
        with temporary_folder(self._scratch.folder / "tmp") as list_files:
            play = self._play_http if kind.startswith("http") else self._play_engine
            play(kind, _FEW, Random(0), lambda what, how: None, None)
            self._figures.clear()
            files, before = list_files(), Holdings.of(os.getpid())
            play(kind, self._size, Random(f"{self._seed}/{case}"), report, self._plant)
            for name, told in left_over(os.getpid(), before).items():
                report(f"{name} are left, {kind}", f"{told}: {open_files(os.getpid())}")
            left = sorted(set(list_files()) - set(files))
            if left:
                report(f"temporary files are left, {kind}", ", ".join(left[:40]))
        self._told.update(self._figures)
        return self._size

    # ---- AsyncLLMEngine -------------------------------------------------------------------------------------------------

    def _play_engine(self, kind: str, size: int, draw: Random, report: Report, plant: str | None) -> None:
        config = EngineConfig.from_kwargs(self._model, SETTINGS)
        engine = AsyncLLMEngine.start(config, engine_process=kind == "process")
        try:
            memory, client = Memory(os.getpid()), _EngineClient(engine, _LEAKS.get(plant or ""))
            asyncio.run(self._warm_up(kind, size, report, client.ask))
            asyncio.run(self._storm(kind, size, draw, report, client.ask, memory))
            self._judge_memory(kind, memory, report)
        finally:
            engine.close()

    # ---- HTTP -----------------------------------------------------------------------------------------------------------

    def _play_http(self, kind: str, size: int, draw: Random, report: Report, plant: str | None) -> None:
        settings = {**SETTINGS, **_SERVER_SETTINGS, "engine_process": kind == "http-process"}
        server = Process(self._model, settings)
        pid = server.process.pid
        try:
            client = _HttpClient(server.port)
            asyncio.run(self._warm_up(kind, size, report, client.ask))
            before, memory = Holdings.of(pid), Memory(pid)
            asyncio.run(self._storm(kind, size, draw, report, client.ask, memory))
            for name, told in left_over(pid, before).items():
                if name != "threads":  # of pools that grow to their bound
                    report(f"{name} are left in the server, {kind}", f"{told}: {open_files(pid)}")
            self._judge_memory(kind, memory, report)
        finally:
            for wrong in server.stop():
                report(f"log or end of the server, {kind}", wrong[-2500:])

    # ---- both -----------------------------------------------------------------------------------------------------------

    async def _warm_up(self, kind: str, size: int, report: Report, ask: _Ask) -> None:
        """Until what has a bound, such as the records of steps, is full."""
        figures = self._figures.copy()
        await self._storm(kind, max(_FEW, int(_WARM_UP * size)), Random(1), report, ask, Memory(os.getpid()))
        self._figures = figures

    async def _storm(self, kind: str, size: int, draw: Random, report: Report, ask: _Ask, memory: Memory) -> None:
        """`size` requests from many clients at once; each does what the next number says."""
        numbers = iter(range(size))
        every = max(1, size // 200)

        async def client() -> None:
            for number in numbers:
                own = Random(f"{draw_seed}/{number}")
                try:
                    outcome = await asyncio.wait_for(ask(own, number), _PATIENCE)
                    self._figures[outcome] += 1
                except Exception as error:
                    report(f"a request failed: {type(error).__name__}, {kind}", f"request {number}: {error}")
                if number % every == 0:
                    memory.sample()

        draw_seed = draw.random()
        await asyncio.gather(*[client() for _ in range(_NUM_CLIENTS)])
        told = await _left_in_engine(ask)
        if told:
            report(f"{told[0]}, {kind}", told[1])
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        if left:
            report(f"asyncio tasks are left, {kind}", f"{len(left)}: {left[:5]}")

    def _judge_memory(self, kind: str, memory: Memory, report: Report) -> None:
        percent, second, last = memory.growth()
        self._figures[f"KB of {kind} in quarter 2"] = second >> 10
        self._figures[f"KB of {kind} in quarter 4"] = last >> 10
        if percent > self._percent:
            report(f"memory grew, {kind}", f"{percent:.2f} %: from {second:,} to {last:,} bytes")

    def figures(self) -> Mapping[str, int]:
        """Of what took part."""
        return self._told

    def close(self) -> None:
        """Removes the scratch folder."""
        self._scratch.close()


_Ask = Callable[[Random, int], Awaitable[str]]


async def _left_in_engine(ask: _Ask) -> tuple[str, str] | None:
    """What the engine behind a client still has, once it had time to let go: (what, how)."""
    client: Any = ask.__self__  # type: ignore[attr-defined]  # a bound method of one of the clients below
    end = time.monotonic() + _SETTLING
    while True:
        told: tuple[str, str] | None = await client.left()
        if told is None or time.monotonic() > end:
            return told
        await asyncio.sleep(0.05)


def _manner(draw: Random) -> str:
    """How a client behaves."""
    kind = draw.random()
    return "left" if kind < _LEAVE else "cancelled" if kind < _LEAVE + _CANCEL else "whole"


# ---- clients of an engine -----------------------------------------------------------------------------------------------


class _EngineClient:
    """Asks an `AsyncLLMEngine` in one of the ways in which it can be asked."""

    def __init__(self, engine: AsyncLLMEngine, leak: Callable[[AsyncLLMEngine], Any] | None) -> None:
        self._engine, self._leak = engine, leak
        self._leaked: list[Any] = []

    async def ask(self, draw: Random, number: int) -> str:
        """One request; says how it went."""
        if self._leak is not None and (number % 100 == 50 or self._leak is _leak_memory):
            self._leaked.append(self._leak(self._engine))
        prompt, params, options = _asked(draw)
        manner = _manner(draw)
        if manner == "left":
            await self._leave(draw, prompt, params, options)
        elif manner == "cancelled":
            await self._cancel(draw, prompt, params, options)
        else:
            output = await self._engine.generate(prompt, params, options=options)
            if any(choice.finish_reason not in ("stop", "length") for choice in output.outputs):
                raise RuntimeError(f"ended with {[choice.error for choice in output.outputs]}")
        return manner

    async def _leave(self, draw: Random, prompt: Any, params: SamplingParams, options: RequestOptions) -> None:
        if draw.random() < 0.5:
            waiting = asyncio.create_task(self._engine.generate(prompt, params, options=options))
            await asyncio.sleep(draw.choice((0, 0.001, 0.01, 0.05)))
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            return
        patience = draw.choice((0, 1, 3, 10))
        stream: Any = self._engine.stream(prompt, params, options=options)
        async with aclosing(stream) as chunks:
            async for _ in chunks:
                patience -= 1
                if patience < 0:
                    break

    async def _cancel(self, draw: Random, prompt: Any, params: SamplingParams, options: RequestOptions) -> None:
        engine = self._engine
        name = await engine.submit(prompt, params, options=options, stream=draw.random() < 0.5)
        await asyncio.sleep(draw.choice((0, 0.001, 0.01, 0.05)))
        await engine.cancel(name)
        ends = [chunk.finish_reason async for chunk in engine.watch_stream(name) if chunk.finish_reason]
        await engine.release(name)
        if len(ends) != params.n:
            raise RuntimeError(f"{params.n} choices ended {len(ends)} times: {ends}")

    async def left(self) -> tuple[str, str] | None:
        """What is not as before the first request."""
        engine = self._engine
        if not engine.is_alive:
            return "the engine is dead", str(engine.error)
        stats = await engine.stats()
        if stats.num_running or stats.num_waiting or stats.kv_cache["used_blocks"]:
            return "blocks are held", str(stats.kv_cache)
        if not await engine.reset_prefix_cache():
            return "blocks are held", "the prefix cache cannot be reset"
        known = list(engine._book.streams), list(engine._book.calls)
        return ("requests are known", str(known)) if any(known) else None


def _asked(draw: Random) -> tuple[Any, SamplingParams, RequestOptions]:
    asked: dict[str, Any] = {"max_tokens": draw.choice((1, 3, 8, 20, 60)), "ignore_eos": draw.random() < 0.8}
    asked |= draw.choice(
        (
            {"temperature": 0.0},
            {"temperature": 0.8, "seed": draw.randrange(99), "top_p": 0.9},
            {"logprobs": 3, "n": 2},
            {"stop": ["e"], "repetition_penalty": 1.2},
            {"prompt_logprobs": 1},
            {"structured_outputs": {"regex": "[a-f]{1,20}"}},
            {},
        )
    )
    shared, own = draw.choice(((), (7,) * 32, (9,) * 200)), draw.choices(range(5, 300), k=draw.choice((1, 5, 40)))
    prompt: Any = [*shared, *own] if draw.random() < 0.8 else "the quick brown fox " * draw.choice((1, 4))
    states = HiddenStatesParams((-1, 0)) if draw.random() < 0.1 else None
    return prompt, SamplingParams(**asked), RequestOptions(priority=draw.choice((0, 0, 1)), hidden_states=states)


# ---- clients over HTTP --------------------------------------------------------------------------------------------------


class _HttpClient:
    """Asks a server; leaves by cutting the connection."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def ask(self, draw: Random, number: int) -> str:
        """One request; says how it went."""
        manner, name = _manner(draw), f"storm-{number}-{draw.randrange(10**9)}"
        path, body = _http_asked(draw)
        if path in ("/v1/chat/completions", "/v1/completions"):
            body["request_id"] = name
        elif manner == "cancelled":
            manner = "left"  # it has no name
        raw = request_bytes("POST", path, json_bytes(body))
        if manner == "left":
            leave_after = draw.choice((0, 1, 200, 900)) if body.get("stream") else draw.choice((0, 1))
            await exchange(self._port, raw, leave_after=leave_after)
            return manner
        answering = asyncio.create_task(exchange(self._port, raw))
        if manner == "cancelled":
            await asyncio.sleep(draw.choice((0, 0.005, 0.05)))
            await call(self._port, "POST", f"/v1/requests/{name}/cancel")
        answer = await answering
        if answer.status != 200 or not answer.is_whole:
            raise RuntimeError(f"{path}: {answer.status} {answer.body[:300]!r}")
        return manner

    async def left(self) -> tuple[str, str] | None:
        """What is not as before the first request."""
        if (await call(self._port, "GET", "/health")).status != 200:
            return "the engine is dead", ""
        view = (await call(self._port, "GET", "/debug/live")).json()["stats"]
        stats = (await call(self._port, "GET", "/debug/kv_cache_stats")).json()
        is_idle = not (view["running"] or view["waiting"] or stats["used_blocks"])
        return None if is_idle else ("blocks are held", f"{view} {stats}")


def json_bytes(value: Any) -> bytes:
    """Compact."""
    import json

    return json.dumps(value).encode()


def _http_asked(draw: Random) -> tuple[str, dict[str, Any]]:
    tokens, stream = draw.choice((1, 5, 20, 60)), draw.random() < 0.6
    text = draw.choice(("hello", "the quick brown fox " * 4, "é😀 " * 9))
    path = draw.choice(("/v1/chat/completions",) * 3 + ("/v1/completions",) * 3 + ("/v1/responses", "/v1/messages"))
    if path == "/v1/completions":
        prompt: Any = text if draw.random() < 0.5 else draw.choices(range(5, 300), k=draw.choice((1, 40, 300)))
        extra = draw.choice(({}, {"logprobs": 2}, {"n": 2}, {"ignore_eos": True}, {"return_hidden_states": True}))
        return path, {"prompt": prompt, "max_tokens": tokens, "stream": stream, "seed": 1, **extra}
    messages = [{"role": "user", "content": text}]
    if path == "/v1/responses":
        return path, {"input": text, "max_output_tokens": max(16, tokens), "stream": stream}
    body: dict[str, Any] = {"messages": messages, "max_tokens": tokens, "stream": stream}
    if path == "/v1/messages":
        return path, {**body, "model": "tiny"}
    return path, {**body, **draw.choice(({}, {"logprobs": True}, {"response_format": {"type": "json_object"}}))}


# ---- planted faults -----------------------------------------------------------------------------------------------------


def _leak_block(engine: Any) -> Any:
    engine._transport.owner.engine.block_manager._take_free()


def _leak_task(engine: Any) -> Any:
    return asyncio.create_task(asyncio.sleep(1e6))


def _leak_thread(engine: Any) -> Any:
    import threading

    thread = threading.Thread(target=threading.Event().wait, args=(30.0,), daemon=True)
    thread.start()
    return thread


_KEPT: list[Any] = []


def _leak_descriptor(engine: Any) -> Any:
    _KEPT.append(os.open(os.devnull, os.O_RDONLY))


def _leak_file(engine: Any) -> Any:
    import tempfile

    descriptor, _ = tempfile.mkstemp()
    os.close(descriptor)


def _leak_memory(engine: Any) -> Any:
    return b"x" * (1 << 18)


_LEAKS: dict[str, Callable[[Any], Any]] = {
    "block": _leak_block,
    "task": _leak_task,
    "thread": _leak_thread,
    "descriptor": _leak_descriptor,
    "file": _leak_file,
    "memory": _leak_memory,
}


def _add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of engines (default: all)")
    group.add_argument("--requests", type=int, default=10_000, help="of a storm (default: %(default)s)")
    group.add_argument("--memory-percent", type=float, default=1.0, help="most growth of memory (default: %(default)s)")


CAMPAIGN = Campaign(
    "storm.py",
    "Many mixed requests whose clients leave and cancel: nothing is left, and memory stands.",
    Storms,
    count=40_000,
    plants=PLANTS,
    case_seconds=3600.0,
    add_options=_add_options,
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the campaign; see `kit.campaign` for the exit status."""
    return run(CAMPAIGN, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
