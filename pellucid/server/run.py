"""The server's life: a socket, a loop, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn

from pellucid.errors import ConfigError, PellucidError
from pellucid.server.app import create_app
from pellucid.server.generate.context import ServerContext
from pellucid.server.http.connection import guarded_connection
from pellucid.server.http.settings import ServerSettings
from pellucid.service.async_engine import AsyncLLMEngine

logger = logging.getLogger("pellucid.server")
BACKLOG = 2048
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAST_WORDS_SECONDS = 5.0  # for answers on their way out when nothing runs any more
DEAD_SECONDS = 5.0  # in which /health says why the engine died, before the process ends


class PortTakenError(PellucidError, OSError):
    """The address cannot be listened on."""


def bind(settings: ServerSettings) -> socket.socket:
    """A bound socket; done before a model is loaded, so that a mistake shows at once.

    Raises:
        PortTakenError: the port is in use, or not allowed.
        ConfigError: the host is no address of this machine.
    """
    host, port = settings.host, settings.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"host is {host!r}: {error.strerror}") from None
    bound = socket.socket(family, kind, protocol)  # asyncio sends at once (no Nagle) only where the protocol is named
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTakenError(f"port {port} on {host} is taken: choose another with --port") from None
        raise PortTakenError(f"cannot listen on port {port} of {host}: {error.strerror}") from None
    return bound


def url_of(bound: socket.socket, settings: ServerSettings) -> str:
    """Where a bound socket is reached."""
    host, port = bound.getsockname()[:2]
    scheme = "https" if settings.ssl_certfile else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn with our connections and our end: SIGTERM and SIGINT drain, a second one ends at once. When the engine dies the
    server follows it a little later: whoever looks after it starts it anew.

    `exit_status` is 0 after a drain, 1 after a second signal or when the engine died.

    Raises:
        ConfigError: the certificate or its key cannot be used.
    """

    def __init__(self, engine: AsyncLLMEngine, settings: ServerSettings) -> None:
        self.app = create_app(engine, settings)
        self.context: ServerContext = self.app.state.context
        self.exit_status = 0
        self._ending: asyncio.Task[None] | None = None
        self._dead_until: float | None = None
        config = _uvicorn_config(self.app, settings)
        try:
            config.load()
        except OSError as error:
            names = f"ssl_certfile is {settings.ssl_certfile!r} and ssl_keyfile {settings.ssl_keyfile!r}"
            raise ConfigError(f"{names}; they cannot be used: {error.strerror or error}") from None
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """Ours, on the loop; uvicorn's would raise the signal again at the end, and the exit status would not be 0."""
        loop, handled = asyncio.get_running_loop(), []
        for number in _SIGNALS:
            with contextlib.suppress(ValueError, RuntimeError):  # not the main thread: its owner calls `drain`
                loop.add_signal_handler(number, self._on_signal, number)
                handled.append(number)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)
            self.context.close()

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; True ends the server."""
        if not self.context.engine.is_alive and self._ending is None:
            self._follow_engine()
        return await super().on_tick(counter)

    def _follow_engine(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._dead_until is None:
            self._dead_until, self.exit_status = now + DEAD_SECONDS, 1
            reason = self.context.engine.error or "the engine is dead"
            logger.critical("%s; the server ends in %g seconds", reason, DEAD_SECONDS)
        self.should_exit = self.should_exit or now >= self._dead_until

    async def drain(self) -> None:
        """Takes no new requests, lets those that run end within the deadline, then leaves the loop."""
        context, timeout = self.context, self.context.settings.drain_timeout
        context.draining = True
        logger.info("draining: requests that run may go on for %g seconds", timeout)
        try:
            if not await context.engine.drain(timeout):
                logger.warning("the deadline passed: the remaining requests were aborted")
        except PellucidError as error:
            self.exit_status = 1
            logger.error("the engine is gone: %s", error)
        await self._last_words()
        self.should_exit = True

    async def _last_words(self) -> None:
        """Answers that are being written."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _LAST_WORDS_SECONDS
        while self.server_state.tasks and loop.time() < deadline:
            await asyncio.sleep(0.02)

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._ending is None:
            logger.info("%s", name)
            self._ending = asyncio.get_running_loop().create_task(self.drain())
            return
        logger.warning("%s again: ending at once", name)
        self.exit_status, self.force_exit, self.should_exit = 1, True, True
        for task in list(self.server_state.tasks):
            task.cancel()


def _uvicorn_config(app: object, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=guarded_connection(settings),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=settings.keep_alive_timeout,  # type: ignore[arg-type]
        timeout_graceful_shutdown=int(_LAST_WORDS_SECONDS),
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
    )
