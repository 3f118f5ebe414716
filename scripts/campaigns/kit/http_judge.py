"""What an answer over HTTP may be, and what is a fault."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote, urlsplit

from kit.findings import signature_of
from kit.http_client import Answer, _no_constant
from kit.http_requests import Wanted

_PRIVATE = re.compile(r"Traceback|File \"|/site-packages/|/pellucid/\w+\.py|0x[0-9a-f]{6,}")
_MAY_BE = {503, 501, 505}  # of the five hundreds: it is full or ends; HTTP that is not spoken here
Told = tuple[str, str] | None


def judge(wanted: Wanted, answer: Answer) -> Told:
    """(signature, detail) of a fault; None where all is well."""
    if wanted.leave_after is not None:
        return None  # what came before it left was cut by itself
    if answer.status == 0:
        return None if not wanted.is_http else (f"{wanted.path}: no answer", "the connection was closed")
    shown = f"{answer.status} {answer.body[:600]!r}"
    if answer.status >= 500 and answer.status not in _MAY_BE:
        return f"{wanted.path}: status {answer.status}: {_message(answer)}", shown
    if not answer.is_whole and wanted.is_http:
        return f"{wanted.path}: an answer was cut", shown
    if _PRIVATE.search(answer.body.decode("utf-8", "replace")) and answer.status >= 400:
        return f"{wanted.path}: an error tells of the inside", shown
    if answer.status >= 400:
        return _judge_error(wanted, answer, shown)
    if answer.status >= 300 and answer.status != 304 and not _drops_a_slash(wanted, answer):
        return f"{wanted.path}: a redirection", f"{shown} {answer.headers}"
    return _judge_success(wanted, answer, shown)


def _drops_a_slash(wanted: Wanted, answer: Answer) -> bool:
    """The same path without, or with, a slash at its end."""
    asked = unquote(wanted.raw.split(b" ", 2)[1].decode("latin-1")).partition("?")[0]
    told = unquote(urlsplit(answer.headers.get("location", "")).path)
    return asked != told and asked.rstrip("/") == told.rstrip("/")


def _judge_error(wanted: Wanted, answer: Answer, shown: str) -> Told:
    if wanted.method == "HEAD" or not wanted.is_http:
        return None  # no body, or an answer of the connection itself
    problem = error_problem(wanted.path, answer)
    if problem is not None:
        return f"{wanted.path}: an error of status {answer.status} {problem}", shown
    error = answer.json()["error"]
    if answer.status != 400 or wanted.body is None or error.get("param", "none") is not None:
        return None
    message = error["message"]  # of the body as a whole, or of something in it that has no name
    if message.startswith("the body ") and "empty" not in message:
        return None
    return f"{wanted.path}: an error names no field: {signature_of(message)}", shown


def error_problem(path: str, answer: Answer) -> str | None:
    """What is wrong with the body of an error; None where it is the error object of its API."""
    try:
        body = answer.json()
    except ValueError:
        return "is not JSON"
    return problem_of_error(body, is_anthropic=path.startswith("/v1/messages"))


def problem_of_error(body: Any, *, is_anthropic: bool) -> str | None:
    """Of a decoded error object."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str) or not error["message"].strip():
        return "is no error object with a message"
    if not isinstance(error.get("type"), str):
        return "has no type"
    if is_anthropic:
        return None if body.get("type") == "error" else "is not Anthropic's error object"
    return None if error.keys() >= {"param", "code"} else "is not OpenAI's error object"


def _judge_success(wanted: Wanted, answer: Answer, shown: str) -> Told:
    kind = answer.headers.get("content-type", "")
    if kind.startswith("text/event-stream"):
        told = judge_stream(answer.body)
        return None if told is None else (f"{wanted.path}: a stream {told}", shown + repr(answer.body[-600:]))
    if kind.startswith("application/json") and wanted.method != "HEAD":
        try:
            answer.json()
        except ValueError as error:
            return f"{wanted.path}: an answer is not JSON: {signature_of(str(error))}", shown
    return None


def events_of(body: bytes) -> list[Any]:
    """The decoded data of a stream's events; the last may be `[DONE]`."""
    found: list[Any] = []
    for block in body.decode().split("\n\n"):
        lines = [line[5:].strip() for line in block.splitlines() if line.startswith("data:")]
        if lines:
            text = "\n".join(lines)
            found.append(text if text == "[DONE]" else json.loads(text, parse_constant=_no_constant))
    return found


_LAST = ("message_stop", "response.completed", "response.incomplete")


def judge_stream(body: bytes) -> str | None:
    """What is wrong with a stream that came to its end."""
    try:
        events = events_of(body)
    except ValueError as error:
        return f"has an event that is not JSON: {signature_of(str(error))}"
    if not events:
        return "has no events"
    for event in events:
        failed = _failure_in(event)
        if failed is not None:
            return f"tells of an error: {failed}"
    last = events[-1]
    is_ended = last == "[DONE]" or (isinstance(last, dict) and last.get("type") in _LAST)
    return None if is_ended else "does not end as its API says"


def _failure_in(event: Any) -> str | None:
    if not isinstance(event, dict):
        return None
    error = event.get("error")
    if event.get("type") == "response.failed":
        error = event["response"].get("error")
    return signature_of(str(error.get("message"))) if isinstance(error, dict) else None


def _message(answer: Answer) -> str:
    try:
        return signature_of(str(answer.json()["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return "no error object"
