"""A server for tests: a real socket and a real engine, in threads of the test's own process."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from pellucid.config import EngineConfig
from pellucid.server.http.settings import ServerSettings
from pellucid.server.run import Server, bind, url_of
from pellucid.service.async_engine import AsyncLLMEngine

_PATIENCE = 120.0  # the machine may stand still for a while
_SERVER_FIELDS = frozenset(field.name for field in dataclasses.fields(ServerSettings))


@dataclass
class RunningServer:
    """A server that answers at `url` (without /v1)."""

    url: str
    engine: AsyncLLMEngine
    server: Server
    loop: asyncio.AbstractEventLoop

    def used_blocks(self) -> int:
        """Blocks that requests hold at this moment."""
        future = asyncio.run_coroutine_threadsafe(self.engine.stats(), self.loop)
        return int(future.result(_PATIENCE).kv_cache["used_blocks"])

    def wait_until_idle(self) -> None:
        """Returns when no request runs, waits or holds a block; fails when that does not come."""
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            stats = asyncio.run_coroutine_threadsafe(self.engine.stats(), self.loop).result(_PATIENCE)
            if stats.num_running == stats.num_waiting == stats.kv_cache["used_blocks"] == 0:
                return
            time.sleep(0.02)
        raise AssertionError(f"the engine did not become idle: {stats}")


@contextmanager
def running_server(model: str | Path, *, engine_process: bool = False, **settings: Any) -> Iterator[RunningServer]:
    """A server over `model` while the block runs. `settings` are fields of `ServerSettings` or of `EngineConfig`."""
    own = {"port": 0, "log_level": "error", **{name: v for name, v in settings.items() if name in _SERVER_FIELDS}}
    config = {"num_blocks": 256, "num_threads": 1, **{n: v for n, v in settings.items() if n not in _SERVER_FIELDS}}
    chosen = ServerSettings(**own)
    bound = bind(chosen)
    engine = AsyncLLMEngine.start(
        EngineConfig.from_kwargs(model, config),
        engine_process=engine_process,
        max_waiting=chosen.max_waiting,
        hidden_states_total_mb=chosen.hidden_states_total_mb,
    )
    try:
        server = Server(engine, chosen)
    except BaseException:
        engine.close()
        bound.close()
        raise
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_serve, args=(loop, server, bound), name="test-server", daemon=True)
    thread.start()
    try:
        url = url_of(bound, chosen)
        _wait_until_up(url, server, thread)
        yield RunningServer(url, engine, server, loop)
    finally:
        server.force_exit = server.should_exit = True
        engine.close()
        thread.join(_PATIENCE)
        bound.close()
        assert not thread.is_alive()


def _serve(loop: asyncio.AbstractEventLoop, server: Server, bound: Any) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(server.serve(sockets=[bound]))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


def _wait_until_up(url: str, server: Server, thread: threading.Thread) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not server.started and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    if url.startswith("http:"):
        httpx.get(f"{url}/health", timeout=_PATIENCE).raise_for_status()
