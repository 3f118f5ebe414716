"""From exceptions to OpenAI's error object. One table says which error becomes which answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pellucid.errors import (
    EngineDeadError,
    EngineDrainingError,
    InvalidRequestError,
    PellucidError,
    QueueFullError,
    TokenizerError,
)

# What an error's text must not carry out of the house: paths and addresses in memory.
_PRIVATE = re.compile(r"(?<![\w<])(?:/[\w.+-]+){2,}/?|\b0x[0-9a-fA-F]{4,}\b")


class RequestFailedError(PellucidError, RuntimeError):
    """The engine ended a request with an error; the text says why."""


class RequestTimeoutError(PellucidError, TimeoutError):
    """A request took longer than the server allows."""


@dataclass
class HttpError(PellucidError):
    """An answer other than 200: OpenAI's error object with its status and headers."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def to_dict(self) -> dict[str, object]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def to_json(self) -> bytes:
        """The body. Only ASCII, so that a lone surrogate quoted from the request is no trouble."""
        return json.dumps(self.to_dict()).encode()


# (error, status, type, code), the most special first.
TABLE: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (InvalidRequestError, 400, "invalid_request_error", None),
    (TokenizerError, 400, "invalid_request_error", None),
    (QueueFullError, 429, "rate_limit_error", "queue_full"),
    (EngineDrainingError, 503, "service_unavailable_error", "draining"),
    (EngineDeadError, 503, "service_unavailable_error", "engine_dead"),
    (RequestTimeoutError, 504, "timeout_error", "request_timeout"),
    (RequestFailedError, 500, "server_error", "request_failed"),
)
_CODES = {401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed"}


def as_http_error(error: BaseException) -> HttpError | None:
    """The answer to an error that is known; None for a bug."""
    if isinstance(error, HttpError):
        return error
    for kind, status, type_, code in TABLE:
        if isinstance(error, kind):
            headers = {"retry-after": str(_retry_after(error))} if status in (429, 503) else {}
            return HttpError(status, sanitised(str(error)), type_, getattr(error, "param", None), code, headers)
    return None


def internal_error(request_id: str) -> HttpError:
    """The answer to a bug: says nothing but where the log has it."""
    message = f"the server failed; its log has the reason under request {request_id}"
    return HttpError(500, message, "server_error", code="internal_error")


def plain_error(status: int, message: str) -> HttpError:
    """An answer of the routing: unknown path, wrong method."""
    return HttpError(status, message, code=_CODES.get(status))


def sanitised(message: str) -> str:
    """`message` without file paths and addresses in memory, at most 1,000 characters."""
    return _PRIVATE.sub("…", message)[:1000]


def _retry_after(error: BaseException) -> int:
    """Whole seconds, at least 1."""
    return max(1, round(getattr(error, "retry_after", 1)))
