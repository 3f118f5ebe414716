"""The front end's side of an engine process: spawned, spoken to over sockets in a private folder, buried when it is dead."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from threading import RLock, Thread
from typing import Any

import zmq

from pellucid.config import EngineConfig
from pellucid.errors import ConfigError, EngineDeadError, InvalidRequestError
from pellucid.files import hold, identity, is_at, remove_unused
from pellucid.json_text import lone_surrogate
from pellucid.owners import Home
from pellucid.service.messages import Command, Died, ErrorInfo, Event, Loaded, LoadFailed, Shutdown, Start
from pellucid.service.process_main import HEADER
from pellucid.service.thread import Deliver
from pellucid.service.wire import MAX_COMMAND_BYTES, CoreStart, address, decode_events, encode, receiver, sender

# Paths of sockets must fit into sockaddr_un.
_MAX_FOLDER_BYTES = 80
_PREFIX = "pellucid-engine-"
# How long a process that was told to end may go on with its step, and its last events may be under way, in seconds.
_SHUTDOWN_SECONDS = 30.0
_LAST_EVENTS_MS = 200


def _check_names(config: EngineConfig) -> None:
    """A process is told its settings in UTF-8; names of files may be other bytes."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, str) and lone_surrogate(value):
            raise ConfigError(f"{field.name} is {value!r}; an engine process can only be told names that are UTF-8")


class ProcessTransport:
    """The owner as a process. It ends when this process does; this side is told at once when it ends by itself."""

    def __init__(self, start: Start) -> None:
        _check_names(start.config)
        self.folder, held = _private_folder()
        self._home = Home("this engine process")
        self._at_exit = weakref.finalize(self, _remove, self.folder, held, self._home)
        self._start = start
        self._context: zmq.Context[Any] = zmq.Context()
        self._events = receiver(self._context, address(self.folder, "events"))
        self._commands = sender(self._context, address(self.folder, "commands"), linger_ms=0)
        self._sending = RLock()  # the garbage collector may give a request up within it
        self._is_loaded = self._is_closed = False
        self.process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1
        self._receiving: Thread | None = None

    def start(self, deliver: Deliver) -> None:
        """Spawns the process; events come from now on."""
        self._lifeline, theirs = os.pipe()
        given = CoreStart(self._start, self.folder, theirs)
        try:
            self.process = subprocess.Popen(_command(), stdin=subprocess.PIPE, pass_fds=(theirs,))
        finally:
            os.close(theirs)
        self._receiving = Thread(target=self._receive, args=(deliver,), name="pellucid-events", daemon=True)
        self._receiving.start()
        frame = encode(given)
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it is dead already: an event says so
                self.process.stdin.write(HEADER.pack(len(frame)) + frame)
                self.process.stdin.flush()

    def send(self, command: Command) -> None:
        """Hands a command over.

        Raises:
            InvalidRequestError: it is too large, or holds what cannot be sent.
        """
        try:
            frame = encode(command)
        except (UnicodeError, OverflowError, TypeError) as error:
            raise InvalidRequestError(None, f"the request cannot be sent to the engine process: {error}") from None
        if len(frame) > MAX_COMMAND_BYTES:
            raise InvalidRequestError(
                None, f"the request has {len(frame):,} bytes", limit=f"the limit is {MAX_COMMAND_BYTES:,}"
            )
        with self._sending:
            if not self._is_closed:
                self._commands.send(frame, zmq.NOBLOCK)

    def close(self) -> None:
        """Ends the process, behind the step that it is in, or by force when that takes too long or nothing is loaded."""
        if self._home.is_left:
            return
        with self._sending:
            if self._is_closed:
                return
            self._commands.send(encode(Shutdown()), zmq.NOBLOCK)
            self._is_closed = True
        if self.process is not None:
            self._end(self.process)
        if self._receiving is not None:
            self._receiving.join()
        self._commands.close()
        self._events.close()
        self._context.term()
        if self._lifeline >= 0:
            os.close(self._lifeline)
        self._at_exit()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        try:
            process.wait(_SHUTDOWN_SECONDS if self._is_loaded else 0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()

    @property
    def is_alive(self) -> bool:
        """True while the process runs."""
        return not self._home.is_left and self.process is not None and self.process.poll() is None

    # ---- events ---------------------------------------------------------------------------------------------------

    def _receive(self, deliver: Deliver) -> None:
        poller = zmq.Poller()
        poller.register(self._events, zmq.POLLIN)
        poller.register(self._lifeline, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._events in ready:
                if self._deliver(deliver):
                    return
            elif self._lifeline in ready:
                break
        while self._events.poll(_LAST_EVENTS_MS):
            if self._deliver(deliver):
                return
        deliver([Died(ErrorInfo(EngineDeadError.__name__, self._epitaph()))])

    def _deliver(self, deliver: Deliver) -> bool:
        """Delivers one frame of events; True when they were the last."""
        events: list[Event] = list(decode_events(self._events.recv()))
        if not events:
            return False
        self._is_loaded = self._is_loaded or any(isinstance(event, Loaded) for event in events)
        deliver(events)
        return isinstance(events[-1], (Died, LoadFailed))

    def _epitaph(self) -> str:
        if self.process is None:
            return "the engine process was never started"
        code = self.process.wait()
        name = f" ({signal.Signals(-code).name})" if code < 0 and -code in set(signal.Signals) else ""
        return f"the engine process ended with exit code {code}{name}"


def _private_folder() -> tuple[str, int]:
    """A folder, mode 0700, and a descriptor that holds it: those whose processes were all killed are removed."""
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) + len(_PREFIX) + 10 > _MAX_FOLDER_BYTES:
        parent = "/tmp"
    for left in Path(parent).glob(f"{_PREFIX}*"):
        remove_unused(left)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        try:
            held = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # it was removed before it was held
            continue
        hold(held)
        if is_at(folder, identity(os.fstat(held))):
            return str(folder), held
        os.close(held)


def _remove(folder: str, held: int, home: Home) -> None:
    if not home.is_left:
        shutil.rmtree(folder, ignore_errors=True)
    os.close(held)


def _command() -> list[str]:
    """The same interpreter, with this one's search path and nothing of the working folder."""
    program = f"import sys; sys.path[:] = {sys.path!r}; from pellucid.service.process_main import main; main()"
    return [sys.executable, "-I", "-c", program]
