"""Messages as bytes (msgpack, decoded strictly by type) and the sockets that they go through."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import zmq

from pellucid.engine.messages import Command, Event, Start

# A command that is larger is refused before it is sent; the socket would drop it.
MAX_COMMAND_BYTES = 64 * 2**20

_log = logging.getLogger(__name__)


class CoreStart(msgspec.Struct, frozen=True):
    """What an engine process is told first: what to load, the folder of the sockets, and the pipe that ends with it."""

    start: Start
    folder: str
    lifeline: int


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} cannot be sent")


encode = msgspec.msgpack.Encoder(enc_hook=_plain).encode
_COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_EVENTS: msgspec.msgpack.Decoder[list[Event]] = msgspec.msgpack.Decoder(list[Event])
_START = msgspec.msgpack.Decoder(CoreStart)


def decode_start(frame: bytes) -> CoreStart:
    """Raises `msgspec.DecodeError` where it is none."""
    return _START.decode(frame)


def decode_command(frame: bytes) -> Command | None:
    """None, and a line in the log, for what is no command."""
    try:
        return _COMMANDS.decode(frame)
    except Exception as error:  # whatever a frame does to the decoder, the next one is read
        _log.warning("dropped %s bytes that are no command: %s", f"{len(frame):,}", error)
        return None


def decode_events(frame: bytes) -> Sequence[Event]:
    """Empty, and a line in the log, for what are no events."""
    try:
        return _EVENTS.decode(frame)
    except Exception as error:
        _log.warning("dropped %s bytes that are no events: %s", f"{len(frame):,}", error)
        return []


def address(folder: str, name: str) -> str:
    """Of the socket `commands`, where the owner listens, or `events`, where the front end does."""
    return f"ipc://{folder}/{name}"


def receiver(context: zmq.Context[Any], address: str, max_bytes: int = -1) -> zmq.Socket[bytes]:
    """A bound socket that takes frames of at most `max_bytes` from whoever connects."""
    socket: zmq.Socket[bytes] = context.socket(zmq.PULL)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    socket.bind(address)
    return socket


def sender(context: zmq.Context[Any], address: str, linger_ms: int) -> zmq.Socket[bytes]:
    """A socket whose `send` never blocks: frames are queued until they are taken, at its close for `linger_ms` at most."""
    socket: zmq.Socket[bytes] = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.LINGER, linger_ms)
    socket.connect(address)
    return socket
