"""Messages as bytes (msgpack, decoded strictly by type) and the sockets that they go through."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_origin

import msgspec
import numpy as np
import zmq

from pellucid.service.messages import Command, Event, Start

# A command that is larger is refused before it is sent; the socket would drop it.
MAX_COMMAND_BYTES = 64 * 2**20

_log = logging.getLogger(__name__)


class CoreStart(msgspec.Struct, frozen=True):
    """What an engine process is told first: what to load, the folder of the sockets, and the pipe that ends with it."""

    start: Start
    folder: str
    lifeline: int


class _Array(msgspec.Struct, array_like=True):
    """float32 values, little endian, and their shape."""

    shape: list[int]
    values: bytes


_PLAIN: dict[type, Callable[[Any], Any]] = {str: str.__str__, int: int.__int__, float: float.__float__}


def _plain(value: Any) -> Any:
    for kind, plain in _PLAIN.items():
        if isinstance(value, kind):  # of a class of its own, such as numpy's texts
            return plain(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return _Array(list(value.shape), value.astype("<f4", copy=False).tobytes())
    raise TypeError(f"a {type(value).__name__} cannot be sent")


def _special(kind: type, value: Any) -> Any:
    """What `_plain` made plain, by the type that is expected in its place."""
    if get_origin(kind) is not np.ndarray:
        raise TypeError(f"a {kind} cannot be read")
    array = msgspec.convert(value, _Array)
    return np.frombuffer(array.values, "<f4").reshape(array.shape)


def decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """Of messages of a type, as `encode` makes them; arrays of float32 included."""
    return msgspec.msgpack.Decoder(kind, dec_hook=_special)


encode = msgspec.msgpack.Encoder(enc_hook=_plain).encode
_COMMANDS: msgspec.msgpack.Decoder[Command] = decoder(Command)
_EVENTS: msgspec.msgpack.Decoder[list[Event]] = decoder(list[Event])
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


_RECONNECT_MS = 5  # until the other side has bound its address: the first command waits as long


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
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
    socket.connect(address)
    return socket
