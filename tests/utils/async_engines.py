"""Asynchronous engines for tests: the same tests run with a thread and with a process behind them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from utils.tiny_models import build_tiny_checkpoint

from pellucid.api.outputs import StreamChunk
from pellucid.api.sampling_params import SamplingParams
from pellucid.config import EngineConfig
from pellucid.service.async_engine import AsyncLLMEngine
from pellucid.service.process import ProcessTransport
from pellucid.service.thread import ThreadTransport

KINDS = ("thread", "process")
# Long waits: other work on the machine may stop a test for a while.
PATIENCE = 60.0
SETTINGS: dict[str, Any] = {
    "max_model_len": 16384,
    "num_blocks": 8192,
    "block_size": 4,
    "num_threads": 1,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
}

# Runs until it is ended: many seconds longer than any test takes.
ENDLESS = SamplingParams(temperature=0, max_tokens=16_000, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=450, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


def build_model(folder: Path) -> Path:
    """A tiny model with room for `SETTINGS`."""
    return build_tiny_checkpoint(folder, "llama", max_position_embeddings=16384)


def start_engine(kind: str, model: Path, *, max_waiting: int = 1024, **settings: Any) -> AsyncLLMEngine:
    """An engine with small settings."""
    config = EngineConfig.from_kwargs(model, {**SETTINGS, **settings})
    return AsyncLLMEngine.start(config, engine_process=kind == "process", max_waiting=max_waiting)


Start = Callable[..., AsyncLLMEngine]


@contextmanager
def started() -> Iterator[Start]:
    """`start_engine`, whose engines are closed behind the block."""
    with ExitStack() as stack:

        def start(kind: str, model: Path, **settings: Any) -> AsyncLLMEngine:
            engine = start_engine(kind, model, **settings)
            stack.callback(engine.close)
            return engine

        yield start


def owner_of(engine: AsyncLLMEngine) -> Any:
    """The owner of an engine on a thread."""
    transport = engine._transport
    assert isinstance(transport, ThreadTransport)
    return transport.owner


def transport_of(engine: AsyncLLMEngine) -> ProcessTransport:
    """The transport of an engine in a process."""
    transport = engine._transport
    assert isinstance(transport, ProcessTransport)
    return transport


def owner_process(engine: AsyncLLMEngine) -> psutil.Process:
    """The process in which the engine runs: this one or its own."""
    transport = engine._transport
    if isinstance(transport, ProcessTransport):
        assert transport.process is not None
        return psutil.Process(transport.process.pid)
    return psutil.Process()


async def until(question: Callable[[], Awaitable[bool]]) -> None:
    """Returns when the answer is yes; fails when it never is."""
    end = time.monotonic() + PATIENCE
    while not await question():
        assert time.monotonic() < end, "it never came to be"
        await asyncio.sleep(0.002)


async def joined(chunks: AsyncIterator[StreamChunk]) -> dict[int, tuple[str, list[int], str | None]]:
    """Each choice's text, token ids and finish reason, of which there is exactly one, in its last chunk."""
    found: dict[int, tuple[str, list[int], str | None]] = {}
    async for chunk in chunks:
        text, token_ids, reason = found.get(chunk.index, ("", [], None))
        assert reason is None, "a chunk came behind the last one"
        found[chunk.index] = (text + chunk.text, token_ids + chunk.token_ids, chunk.finish_reason)
    assert all(reason is not None for _, _, reason in found.values())
    return found


async def used_blocks(engine: AsyncLLMEngine) -> int:
    """Blocks that requests hold now."""
    return int((await engine.stats()).kv_cache["used_blocks"])


async def check_rest(engine: AsyncLLMEngine) -> None:
    """Nothing runs, nothing is held, and the engine, which checks its invariants when it comes to rest, lives."""

    async def rests() -> bool:
        stats = await engine.stats()
        return stats.num_running == stats.num_waiting == 0

    await until(rests)
    assert await used_blocks(engine) == 0
    assert engine.is_alive
    assert not engine._book.calls
