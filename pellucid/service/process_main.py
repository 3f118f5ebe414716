"""`EngineCoreProc`: an engine's owner as a process. Started by `ProcessTransport`, which writes a `CoreStart` to its input."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import struct
import sys
from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, BinaryIO

import zmq

from pellucid.service.inbox import Inbox
from pellucid.service.messages import Event
from pellucid.service.owner import EngineOwner
from pellucid.service.wire import (
    MAX_COMMAND_BYTES,
    CoreStart,
    address,
    decode_command,
    decode_start,
    encode,
    receiver,
    sender,
)

HEADER = struct.Struct("<I")  # bytes of the `CoreStart` that follows
# How long the last events may take to leave.
_LINGER_MS = 5_000


class EngineCoreProc:
    """The sockets around an `EngineOwner`: a thread turns frames into commands, events become frames."""

    def __init__(self, given: CoreStart) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._commands = receiver(self._context, address(given.folder, "commands"), MAX_COMMAND_BYTES)
        self._events = sender(self._context, address(given.folder, "events"), _LINGER_MS)
        self._inbox: Inbox = SimpleQueue()
        self._owner = EngineOwner(given.start, self._inbox, self._emit)

    def run(self) -> None:
        """Until the owner ends; returns when its last event has left."""
        Thread(target=self._receive, name="pellucid-commands", daemon=True).start()
        self._owner.run()
        self._events.close()

    def _emit(self, events: Sequence[Event]) -> None:
        self._events.send(encode(events), zmq.NOBLOCK)

    def _receive(self) -> None:
        while True:
            command = decode_command(self._commands.recv())
            if command is not None:
                self._inbox.put(command)


def main() -> None:
    """The process. It ends with its owner, or when its input ends: then its parent has."""
    # What a signal to the whole group means is for the parent to say.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s engine process: %(message)s")
    given = read_start(sys.stdin.buffer)
    os.set_inheritable(given.lifeline, False)
    Thread(target=_end_with_parent, args=(given.folder,), name="pellucid-parent", daemon=True).start()
    EngineCoreProc(given).run()


def read_start(source: BinaryIO) -> CoreStart:
    """The first message. Raises `struct.error` or `msgspec.DecodeError` where it is none."""
    (size,) = HEADER.unpack(source.read(HEADER.size))
    return decode_start(source.read(size))


def _end_with_parent(folder: str) -> None:
    while os.read(sys.stdin.fileno(), 1):  # the descriptor: a lock on the file would be held when the process ends
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
