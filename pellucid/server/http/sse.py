"""Server-sent events, and work that ends when its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pellucid.json_text import encode

DONE = b"data: [DONE]\n\n"
_Result = TypeVar("_Result")


class ClientLeftError(Exception):
    """The client closed its connection; nobody reads an answer."""


def event(value: Any) -> bytes:
    """One event of an OpenAI stream."""
    return b"data: " + encode(value) + b"\n\n"


async def unless_gone(receive: Receive, work: Awaitable[_Result]) -> _Result:
    """The result of `work`, which is cancelled, and waited for, when the client leaves.

    Raises:
        ClientLeftError: it left first.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeftError
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class JsonResponse(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)


class EventStream(Response):
    """An answer of server-sent events, which are given encoded. Errors are their maker's business: it must turn them into events.

    `source` is what they are made from; it is closed at the end, also of a client that left before the first event was asked for.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        source: AbstractAsyncContextManager[Any],
        headers: dict[str, str] | None = None,
    ) -> None:
        self._events, self._source = events, source
        self.status_code, self.background = 200, None
        self.init_headers(
            {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **(headers or {})}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._source, aclosing(self._events):
            await unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for one in self._events:
            await send({"type": "http.response.body", "body": one, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
