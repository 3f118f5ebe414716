"""The HTTP/1.1 connection: uvicorn's, with limits on headers, connections and on how long a client may keep silent."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from pellucid.server.http.errors import HttpError
from pellucid.server.http.settings import ServerSettings


class _HeadersTooLongError(Exception):
    pass


class GuardedConnection(HttpToolsProtocol):
    """What uvicorn leaves open: a head without end, a client that sends or takes nothing, connections without number."""

    settings: ServerSettings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    # ---- the transport tells ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > self.settings.max_connections:
            self._refuse(503, f"there are max_connections, {self.settings.max_connections:,}, connections already")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head_timer()
        if self._stall is not None:
            self._stall.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            self._await_head()
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > self.settings.max_header_bytes and not self.transport.is_closing():
            self._refuse_head()  # a single header without end: the parser tells of none

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self.settings.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    # ---- the parser tells -------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._seen = 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._end_head_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """The parser refused the request: for its length, or as malformed."""
        if self._seen > self.settings.max_header_bytes:
            self._refuse_head()
        else:
            self._refuse(400, "the request is not valid HTTP")

    # ---- answers of our own -----------------------------------------------------------------------------------------

    _seen = 0  # bytes of this request's line and headers

    def _count(self, size: int) -> None:
        self._seen += size
        if self._seen > self.settings.max_header_bytes:
            raise _HeadersTooLongError

    def _await_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.settings.header_timeout, self._head_timed_out)

    def _head_timed_out(self) -> None:
        if not self.transport.is_closing():
            seconds = self.settings.header_timeout
            self._refuse(408, f"the headers were not complete after header_timeout, {seconds:g} seconds")

    def _refuse_head(self) -> None:
        limit = self.settings.max_header_bytes
        self._refuse(431, f"request line and headers are longer than max_header_bytes, {limit:,}")

    def _refuse(self, status: int, message: str) -> None:
        """Answers below the application and closes; a client in the middle of another answer is only cut off."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = HttpError(status, message).to_json()
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def _end_head_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def guarded_connection(settings: ServerSettings) -> type[GuardedConnection]:
    """The connection class for these settings."""
    return type("Connection", (GuardedConnection,), {"settings": settings})
