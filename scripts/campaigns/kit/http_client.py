"""A small HTTP client that can misbehave: any bytes may be sent, and it may leave at any time. To this machine alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from dataclasses import dataclass, field
from typing import Any

import h11

HOST = "127.0.0.1"
_PATIENCE = 60.0  # seconds that an answer may take
_BLOCK = 1 << 16


@dataclass
class Answer:
    """What came back. `status` 0: nothing before the connection was closed. `is_whole`: to its end."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_whole: bool = False

    def json(self) -> Any:
        """The body as strict JSON: NaN and Infinity are none."""
        return json.loads(self.body, parse_constant=_no_constant)


class NoAnswerError(Exception):
    """The server took longer than anything may take."""


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def request_bytes(method: str, path: str, body: bytes | None, headers: dict[str, str] | None = None) -> bytes:
    """One request, closed behind its answer."""
    given = {"host": HOST, "connection": "close", **(headers or {})}
    if "upgrade" in given:
        given["connection"] = "close, Upgrade"
    if body is not None:
        given.setdefault("content-type", "application/json")
    if body is not None and not {"content-length", "transfer-encoding"} & {name.lower() for name in given}:
        given["content-length"] = str(len(body))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + (body or b"")


async def exchange(port: int, raw: bytes, *, leave_after: int | None = None, half_close: bool = False) -> Answer:
    """Sends `raw` and reads the answer. `leave_after`: bytes of the body behind which the connection is cut; 0: at once.

    Raises:
        NoAnswerError: it did not come to its end in time.
    """
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(raw)
            await writer.drain()
            if half_close:
                writer.write_eof()
        if leave_after == 0:
            return Answer()
        return await asyncio.wait_for(_read(reader, leave_after, raw.startswith(b"HEAD ")), _PATIENCE)
    except asyncio.TimeoutError:
        raise NoAnswerError(f"no answer within {_PATIENCE:g} s") from None
    finally:
        if leave_after is not None:
            _reset(writer)
        writer.close()
        with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
            await asyncio.wait_for(writer.wait_closed(), 5)


def _reset(writer: asyncio.StreamWriter) -> None:
    """The connection ends without a word, as of a client that is gone."""
    plug = writer.get_extra_info("socket")
    if plug is not None:
        with contextlib.suppress(OSError):  # the server has closed it already
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def _read(reader: asyncio.StreamReader, leave_after: int | None, is_head: bool) -> Answer:
    answer, connection = Answer(), h11.Connection(h11.CLIENT)
    # What was sent is our own business: it only has to expect an answer.
    connection.send(h11.Request(method="HEAD" if is_head else "GET", target="/", headers=[("host", HOST)]))
    connection.send(h11.EndOfMessage())
    parts: list[bytes] = []
    size = 0
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            try:
                block = await reader.read(_BLOCK)
            except ConnectionError:
                break
            try:
                connection.receive_data(block)
            except RuntimeError:  # more behind the end
                break
            if not block and answer.status == 0:
                break
        elif isinstance(event, h11.Response):
            answer.status = event.status_code
            answer.headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
        elif isinstance(event, h11.Data):
            parts.append(bytes(event.data))
            size += len(event.data)
            if leave_after is not None and size >= leave_after:
                break
        elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)) or event is h11.PAUSED:
            answer.is_whole = isinstance(event, h11.EndOfMessage)
            break
    answer.body = b"".join(parts)
    return answer


async def call(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    """A well-formed request with a JSON body."""
    encoded = None if body is None else json.dumps(body).encode()
    return await exchange(port, request_bytes(method, path, encoded, headers))
