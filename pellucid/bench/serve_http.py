"""A small HTTP/1.1 client whose every read is timed: asyncio's streams, and h11 for the protocol.

Benchmarks of servers need the moment at which bytes came off the socket and very little work in between, for the client shares the
machine with the server. h11 is what uvicorn is built on, so it is there already; which general client huggingface_hub brings (requests,
httpx or httpx2) depends on its version.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11

from pellucid.errors import InvalidRequestError, PellucidError

MAX_BODY_BYTES = 64 * 2**20
_READ_BYTES = 65_536
_PORTS = {"http": 80, "https": 443}


class TransportError(PellucidError, OSError):
    """No connection, or the answer broke off or is no HTTP."""


@dataclass(frozen=True)
class Address:
    """Where a server is; `path` stands before the path of every request and has no slash at its end."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @classmethod
    def parse(cls, url: str) -> Address:
        """Of `http://host:port/prefix`; without a scheme it is http.

        Raises:
            InvalidRequestError: no address can be read from it.
        """
        split = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = split.port
        except ValueError as error:
            raise InvalidRequestError("url", f"is {url!r}: {error}") from None
        if split.scheme not in _PORTS or not split.hostname:
            raise InvalidRequestError("url", f"is {url!r}", limit="it takes http://host:port or https://host:port")
        return cls(split.scheme, split.hostname, port or _PORTS[split.scheme], split.path.rstrip("/"))

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


class _Connection:
    """One socket and the state of its protocol."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._state = h11.Connection(h11.CLIENT)
        self.read_at = 0.0  # time.perf_counter() of the newest bytes
        self.has_read = False  # bytes of the current answer

    async def send(self, request: h11.Request, body: bytes) -> None:
        self.has_read = False
        data = self._state.send(request) or b""
        data += (self._state.send(h11.Data(data=body)) or b"") if body else b""
        self._writer.write(data + (self._state.send(h11.EndOfMessage()) or b""))
        await self._writer.drain()

    async def next_event(self) -> h11.Event:
        while True:
            event = self._state.next_event()
            if event is h11.PAUSED:
                raise TransportError("the server sent more than one answer")
            if event is not h11.NEED_DATA:
                return event  # type: ignore[return-value]
            data = await self._reader.read(_READ_BYTES)
            self.read_at = time.perf_counter()
            self.has_read = self.has_read or bool(data)
            self._state.receive_data(data)

    def renew(self) -> bool:
        """Whether another request may use this socket."""
        if self._state.our_state is not h11.DONE or self._state.their_state is not h11.DONE:
            return False
        self._state.start_next_cycle()
        return True

    async def close(self) -> None:
        self._writer.close()
        with suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(self._writer.wait_closed(), 1.0)


class Response:
    """Status and headers are there; the body comes piece by piece."""

    def __init__(self, connection: _Connection, head: h11.Response) -> None:
        self._connection = connection
        self.status = int(head.status_code)
        self.headers: Mapping[str, str] = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in head.headers
        }

    async def pieces(self) -> AsyncIterator[tuple[float, bytes]]:
        """(`time.perf_counter()` when they were read, bytes) as they come.

        Raises:
            TransportError: the body broke off, is no HTTP, or is larger than MAX_BODY_BYTES.
        """
        total = 0
        while True:
            event = await _guarded(self._connection)
            if not isinstance(event, h11.Data):
                return
            total += len(event.data)
            if total > MAX_BODY_BYTES:
                raise TransportError(f"the body is larger than {MAX_BODY_BYTES:,} bytes")
            yield self._connection.read_at, bytes(event.data)

    async def read(self) -> bytes:
        """The whole body. Raises what `pieces` does."""
        return b"".join([piece async for _, piece in self.pieces()])


async def _guarded(connection: _Connection) -> h11.Event:
    try:
        event = await connection.next_event()
    except h11.RemoteProtocolError as error:
        raise TransportError(f"the connection broke off or is no HTTP: {error}") from None
    except OSError as error:
        raise TransportError(f"the connection broke off: {error}") from None
    if isinstance(event, h11.ConnectionClosed):
        raise TransportError("the server closed the connection without an answer")
    return event


class HttpClient:
    """Requests to one server, over connections that are kept. Used within one event loop."""

    def __init__(self, address: Address, headers: Mapping[str, str] | None = None) -> None:
        self.address = address
        self._headers = {"host": address.authority, "accept": "*/*", "user-agent": "pellucid-bench", **(headers or {})}
        self._idle: list[_Connection] = []
        self._tls = ssl.create_default_context() if address.scheme == "https" else None

    @asynccontextmanager
    async def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[Response]:
        """Sends a request and yields its response; leaving before the body's end closes the connection.

        Raises:
            TransportError: no connection, or no answer on it.
        """
        named = {**self._headers, **(headers or {}), "content-length": str(len(body))}
        named = {name: value for name, value in named.items() if value}
        head = h11.Request(method=method, target=self.address.path + path, headers=list(named.items()))
        connection, response = await self._exchange(head, body)
        try:
            yield response
        except BaseException:
            await connection.close()
            raise
        if connection.renew():
            self._idle.append(connection)
        else:
            await connection.close()

    async def _exchange(self, head: h11.Request, body: bytes) -> tuple[_Connection, Response]:
        """A kept connection that the server has closed meanwhile is replaced by a new one."""
        while self._idle:
            connection = self._idle.pop()
            try:
                return connection, await self._ask(connection, head, body)
            except TransportError:
                if connection.has_read:
                    raise
        connection = await self._connect()
        return connection, await self._ask(connection, head, body)

    async def _ask(self, connection: _Connection, head: h11.Request, body: bytes) -> Response:
        try:
            await connection.send(head, body)
            event = await _guarded(connection)
            while isinstance(event, h11.InformationalResponse):
                event = await _guarded(connection)
        except BaseException as error:
            await connection.close()
            if isinstance(error, OSError) and not isinstance(error, TransportError):
                raise TransportError(f"the connection broke off: {error}") from None
            raise
        if not isinstance(event, h11.Response):
            raise TransportError(f"the server sent {type(event).__name__} in place of a status")
        return Response(connection, event)

    async def _connect(self) -> _Connection:
        address = self.address
        try:
            return _Connection(*await asyncio.open_connection(address.host, address.port, ssl=self._tls))
        except OSError as error:
            raise TransportError(f"no connection to {address.authority}: {error.strerror or error}") from None

    async def close(self) -> None:
        """Closes the connections that are kept."""
        idle, self._idle = self._idle, []
        for connection in idle:
            await connection.close()
