"""From exceptions to OpenAI's error object. One table says which error becomes which answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pellucid.errors import (
    EngineDeadError,
    EngineDrainingError,
    InvalidRequestError,
    PellucidError,
    QueueFullError,
    RequestFailedError,
    TokenizerError,
)
from pellucid.json_text import encode

# What an error's text must not carry out of the house: paths and addresses in memory.
_PRIVATE = re.compile(r"(?<![\w<])(?:/[\w.+-]+){2,}/?|\b0x[0-9a-fA-F]{4,}\b")


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

    def to_json(self, path: str = "", request_id: str = "") -> bytes:
        """The body, as the API of the path has it."""
        return encode(anthropic_error(self, request_id) if is_anthropic(path) else self.to_dict())


def is_anthropic(path: str) -> bool:
    """True for paths of the Messages API."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


# Anthropic's error types, by status; others are an invalid_request_error up to 499 and an api_error beyond.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(error: HttpError, request_id: str) -> dict[str, object]:
    """Anthropic's error object, which is an event of its streams too."""
    type_ = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": type_, "message": error.message}, "request_id": request_id}


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
NO_NAMES: Mapping[str, str] = {}
_CODES = {401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed"}


def as_http_error(error: BaseException, names: Mapping[str, str] = NO_NAMES) -> HttpError | None:
    """The answer to an error that is known; None for a bug. `names` is what the client calls the fields of the request."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, InvalidRequestError):
        error = error.named(names)
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
