"""The outermost layer: ids, access checks, error answers, the access log and the count of answers."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pellucid.server.generate.protocol import REQUEST_ID_PATTERN
from pellucid.server.http.access import Access, values_of
from pellucid.server.http.errors import NO_NAMES, HttpError, as_http_error, internal_error, is_anthropic
from pellucid.server.http.logs import log_access
from pellucid.server.http.metrics import Metrics
from pellucid.server.http.sse import ClientLeftError
from pellucid.server.http.tracing import Tracing

logger = logging.getLogger("pellucid.server")
CLIENT_LEFT = 499  # nginx's status for the log; nobody is there to read it
_REQUEST_ID = re.compile(REQUEST_ID_PATTERN)


class Gate:
    """Wraps the application. `X-Request-Id` is honoured when it is well-formed, and always returned."""

    def __init__(
        self, app: ASGIApp, access: Access, metrics: Metrics, tracing: Tracing, log_requests: bool = True
    ) -> None:
        self._app, self._access, self._metrics = app, access, metrics
        self._tracing, self._log_requests = tracing, log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        answer = _Answer(send, _request_id(scope), scope["path"])
        state["request_id"] = answer.request_id
        began, began_ns = time.perf_counter(), time.time_ns()
        try:
            self._access.check(scope["path"], scope["headers"])
            await self._app(scope, receive, answer.send)
        except Exception as error:
            await answer.fail(error, state.get("field_names", NO_NAMES))
        finally:
            self._note(scope, answer, time.perf_counter() - began, began_ns)

    def _note(self, scope: Scope, answer: _Answer, seconds: float, began_ns: int) -> None:
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.observe_answer(method, route, answer.status)
        client = scope.get("client")
        fields: dict[str, Any] = {
            "method": method,
            "path": scope.get("raw_path", b"").decode("latin-1")[:200],
            "status": answer.status,
            "seconds": seconds,
            "request_id": answer.request_id,
            "client": client[0] if client else "-",
        }
        generation = scope["state"].get("generation")
        generated = {} if generation is None else generation.fields
        self._tracing.note(fields, generated, scope["headers"], began_ns, began_ns + round(seconds * 1e9))
        if self._log_requests:
            log_access(fields)


_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})


class _Answer:
    """One answer on its way out."""

    def __init__(self, send: Send, request_id: str, path: str) -> None:
        self._send, self.request_id, self._path = send, request_id, path
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            names = (b"x-request-id", b"request-id") if is_anthropic(self._path) else (b"x-request-id",)
            value = self.request_id.encode()
            message["headers"] = [*message.get("headers", ()), *((name, value) for name in names)]
        await self._send(message)

    async def fail(self, error: Exception, names: Mapping[str, str]) -> None:
        """Answers an error, its fields under the names that the client knows; a stream that has begun can only end."""
        if isinstance(error, ClientLeftError):
            self.status = CLIENT_LEFT
            return
        known = as_http_error(error, names)
        if known is None:
            logger.error("request %s failed", self.request_id, exc_info=error)
            known = internal_error(self.request_id)
        if not self.status:
            await self._send_error(known)

    async def _send_error(self, error: HttpError) -> None:
        body = error.to_json(self._path, self.request_id)
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": encoded})
        await self._send({"type": "http.response.body", "body": body})


def _request_id(scope: Scope) -> str:
    given = values_of(scope["headers"], b"x-request-id")
    text = given[0].decode("latin-1") if given else ""
    return text if _REQUEST_ID.match(text) else uuid.uuid4().hex
