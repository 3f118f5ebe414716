"""Servers for campaigns, on loopback: the application in this process, or `pellucid serve` in one of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from pellucid.config import EngineConfig
from pellucid.server.http.settings import ServerSettings
from pellucid.server.run import Server, bind
from pellucid.service.async_engine import AsyncLLMEngine

_PATIENCE = 120.0
_FIELDS = frozenset(one.name for one in dataclasses.fields(ServerSettings))
_MAIN = "import sys; from pellucid.cli import main; sys.exit(main())"


def _many(name: str, value: Any) -> Any:
    """One value of a setting that takes several."""
    return (value,) if name in ("api_key", "allowed_origins", "allowed_hosts") else value


class Served(Protocol):
    """A server that answers on `port` of the loopback address."""

    port: int

    def stop(self) -> list[str]:
        """Ends it; gives what is wrong with its end and its log."""


class Application:
    """The application over an engine, on threads of this process. `prepare` may change the engine before anybody asks."""

    def __init__(
        self,
        model: Path,
        settings: dict[str, Any],
        *,
        engine_process: bool,
        prepare: Callable[[Any], None] | None = None,
    ) -> None:
        self._log = _Records()
        logging.getLogger("pellucid").addHandler(self._log)
        own = {"port": 0, "log_requests": False, **{n: _many(n, v) for n, v in settings.items() if n in _FIELDS}}
        chosen = ServerSettings(**own)
        self._bound = bind(chosen)
        self.port: int = self._bound.getsockname()[1]
        config = EngineConfig.from_kwargs(model, {n: v for n, v in settings.items() if n not in _FIELDS})
        self.engine = AsyncLLMEngine.start(config, engine_process=engine_process, max_waiting=chosen.max_waiting)
        if prepare is not None:
            prepare(self.engine)
        self._server = Server(self.engine, chosen)
        self._thread = threading.Thread(target=self._serve, name="campaign-server")
        self._thread.start()
        deadline = time.monotonic() + _PATIENCE
        while not self._server.started and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)

    def _serve(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._bound]))

    def stop(self) -> list[str]:
        """Ends it; gives what its log has of errors."""
        self._server.should_exit = True
        self._thread.join(_PATIENCE)
        wrong = ["the server did not end"] if self._thread.is_alive() else []
        self.engine.close()
        self._bound.close()
        logging.getLogger("pellucid").removeHandler(self._log)
        return wrong + self._log.wrong


class _Records(logging.Handler):
    """Keeps what should not be logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.wrong: list[str] = []
        self._plain = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.exc_info:
            self.wrong.append(self._plain.format(record))


_WRONG = re.compile(
    r"Traceback \(most recent call last\)|\b(ERROR|CRITICAL)\b|Task exception|never retrieved|Exception ignored"
)


class Process:
    """`pellucid serve` and its log."""

    def __init__(self, model: Path, settings: dict[str, Any]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `stop`
        command = [sys.executable, "-c", _MAIN, "serve", str(model), "--port", "0"]
        for name, value in settings.items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                command.append(flag if value else f"--no-{flag[2:]}")
            else:
                command += [flag, str(value)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log)
        stdout = self.process.stdout
        line = b"" if stdout is None else stdout.readline()
        found = re.search(rb":(\d+)/v1", line)
        if found is None:
            self.process.kill()
            self.process.wait()
            raise RuntimeError(f"the server did not start: {self._said()[-2000:]}")
        self.port = int(found[1])
        self._wait_until_up()

    def _wait_until_up(self) -> None:
        import socket

        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
                return
            except OSError:
                time.sleep(0.02)

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def stop(self) -> list[str]:
        """SIGTERM; gives what is wrong with its end and what its log has of errors."""
        wrong: list[str] = []
        if self.process.poll() is not None:
            wrong.append(f"the server had ended with status {self.process.returncode}")
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(_PATIENCE)
            wrong += [f"the server ended with status {status}"] if status and not wrong else []
        except subprocess.TimeoutExpired:
            wrong.append("the server did not end on SIGTERM")
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        said = self._said()
        self._log.close()
        places = [match.start() for match in _WRONG.finditer(said) if not _begins_traceback(said, match.start())]
        return wrong + [_around(said, place) for place in places[:20]]


def _begins_traceback(text: str, place: int) -> bool:
    """The line at `place` is the heading of a traceback, which is told by itself."""
    return text[text.find("\n", place) + 1 :].startswith("Traceback")


def _around(text: str, place: int) -> str:
    """The lines at a place of a log: to the error itself where a traceback begins."""
    begin = text.rfind("\n", 0, text.rfind("\n", 0, place) + 1) + 1 if place else 0
    found: list[str] = []
    for line in text[max(0, begin) :].splitlines():
        found.append(line)
        is_end = bool(re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line))
        if is_end or len(found) > 200 or (len(found) > 3 and "Traceback" not in text[place : place + 40]):
            break
    return "\n".join(found)
