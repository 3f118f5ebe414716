"""Request bodies: read under limits, checked before a parser sees them, parsed, validated."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

import anyio
from pydantic import ValidationError
from starlette.requests import Request
from starlette.types import Receive

from pellucid.errors import InvalidRequestError
from pellucid.json_text import check_values
from pellucid.server.generate.protocol import Strict, as_invalid_request
from pellucid.server.http.errors import HttpError

MAX_JSON_DEPTH = 64
MAX_DIGITS = 400  # of a number; none that fits a field has more
# A body that is refused for its length is read on for a while, so that the client gets to read why.
DISCARD_BYTES, DISCARD_SECONDS, DISCARD_PAUSE_SECONDS = 64 << 20, 10.0, 0.5
OFF_LOOP_BYTES = 32 << 10  # bodies from here on are parsed by another thread

_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % MAX_DIGITS)
# What may be read as a text with lone surrogates, or as a number that is not finite.
_SUSPECT = re.compile(rb"\\u[dD]|NaN|Infinity|[0-9][eE]\+?[0-9]{3}|[0-9]{200}")
_BRACKETS = b"[]{}"
_NOT_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))
_Model = TypeVar("_Model", bound=Strict)


async def read_json(request: Request, model: type[_Model], max_bytes: int, timeout: float) -> _Model:
    """The body as a `model`.

    Raises:
        HttpError: 408, 413 or 415.
        InvalidRequestError: not JSON, too deep, not UTF-8, or not what the model allows; names the field.
    """
    _check_media_type(request)
    body = await read_body(request, max_bytes, timeout)
    if len(body) < OFF_LOOP_BYTES:
        return parse(body, model)
    return await anyio.to_thread.run_sync(parse, body, model)


async def read_body(request: Request, max_bytes: int, timeout: float) -> bytes:
    """The whole body, counted while it comes.

    Raises:
        HttpError: 413 it is longer than `max_bytes`, 408 it is not complete after `timeout` seconds, 400 the client left.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > max_bytes:
        await _discard(request.receive)
        raise _too_long(max_bytes)
    parts: list[bytes] = []
    size = 0
    with anyio.move_on_after(timeout):
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise HttpError(400, "the client left before the body was complete", code="client_disconnected")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > max_bytes:
                parts.clear()
                await _discard(request.receive)
                raise _too_long(max_bytes)
            if not message.get("more_body", False):
                return b"".join(parts)
    message_ = f"the body was not complete after {timeout:g} seconds"
    raise HttpError(408, message_, "timeout_error", code="body_timeout", headers={"connection": "close"})


def parse(body: bytes, model: type[_Model]) -> _Model:
    """A body as a `model`. Raises InvalidRequestError as `read_json` does."""
    value = parse_json(body)
    if not isinstance(value, dict):
        raise InvalidRequestError(None, f"the body is a JSON {_json_name(value)}", limit="it must be an object")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise as_invalid_request(error) from None


def parse_json(body: bytes) -> Any:
    """The JSON value of a body.

    Raises:
        InvalidRequestError: empty, not UTF-8, too deep, not JSON, a number too long or not finite, or a lone surrogate.
    """
    if not body.strip():
        raise InvalidRequestError(None, "the body is empty", limit="it must be a JSON object")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            None, f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02X}"
        ) from None
    _check_depth(body)
    if _LONG_NUMBER.search(body) and _LONG_NUMBER.search(_outside_strings(body)):
        raise InvalidRequestError(None, f"the body holds a number of more than {MAX_DIGITS} digits")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f" at line {error.lineno} column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        what = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be read"
        raise InvalidRequestError(None, f"the body is not JSON: {what}{where}") from None
    if _SUSPECT.search(body):
        check_values(value, "the body")
    return value


def _check_depth(body: bytes) -> None:
    """Refuses deep nesting in linear time, before a recursive parser meets it: each round takes the innermost pairs away."""
    rest = _outside_strings(body).translate(None, _NOT_BRACKETS)
    for _ in range(MAX_JSON_DEPTH):
        if not rest:
            return
        shorter = rest.replace(b"[]", b"").replace(b"{}", b"")
        if len(shorter) == len(rest):
            raise InvalidRequestError(None, "the body is not JSON: its brackets do not match")
        rest = shorter
    if rest:
        raise InvalidRequestError(None, f"the body is nested deeper than {MAX_JSON_DEPTH} levels")


def _outside_strings(body: bytes) -> bytes:
    return b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])


async def _discard(receive: Receive) -> None:
    """Reads on until the client pauses, or has sent too much or for too long."""
    left = DISCARD_BYTES
    with anyio.move_on_after(DISCARD_SECONDS):
        while left > 0:
            with anyio.move_on_after(DISCARD_PAUSE_SECONDS) as pause:
                message = await receive()
            if pause.cancelled_caught or message["type"] == "http.disconnect" or not message.get("more_body", False):
                return
            left -= len(message["body"]) + 1


def _too_long(max_bytes: int) -> HttpError:
    message = f"the body is longer than max_body_bytes, {max_bytes:,}"
    return HttpError(413, message, code="body_too_long", headers={"connection": "close"})


def _check_media_type(request: Request) -> None:
    """Browsers send other types to any host without asking it first, so JSON must be called JSON."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise HttpError(
            415, f"content-type is {kind[:80]!r}; it must be application/json", code="unsupported_media_type"
        )
    coding = request.headers.get("content-encoding", "identity").lower()
    if coding != "identity":
        raise HttpError(
            415, f"content-encoding is {coding[:80]!r}; bodies are not decompressed", code="unsupported_media_type"
        )


def _json_name(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
