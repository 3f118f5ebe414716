"""Requests to an OpenAI-compatible server, each recorded whole: text, times, tokens, and every breach of the protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pellucid.bench.serve_events import EventParser, StreamError
from pellucid.bench.serve_http import Address, HttpClient, Response, TransportError
from pellucid.errors import PellucidError
from pellucid.json_text import encode, loads

FINISH_REASONS = frozenset({"stop", "length", "tool_calls", "function_call", "content_filter", "abort", "error"})
_DONE = "[DONE]"
_MAX_PROBLEMS = 20  # of one answer; a server that gets every chunk wrong is told once in a while
_ERROR_CHARS = 300


class ServerError(PellucidError, OSError):
    """The server did not do what a command needs of it."""


@dataclass
class Answer:
    """One request as it was answered. Times in seconds; chunk times since `started`.

    A chunk is an event of a stream that carries text or tokens: a first one with the role alone is none.
    """

    started: float = 0.0  # time.perf_counter()
    seconds: float = 0.0  # until the last byte
    status: int = 0
    error: str = ""  # why there is no whole answer; empty when there is one
    text: str = ""
    chunk_times: list[float] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    body: Any = None  # of an answer that is no stream, as JSON
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def ttft(self) -> float | None:
        """Seconds to the first text or token; of an answer that is no stream, None."""
        return self.chunk_times[0] if self.chunk_times else None

    @property
    def latency(self) -> float:
        """Seconds to the last text or token of a stream; to the end of another answer."""
        return self.chunk_times[-1] if self.chunk_times else self.seconds

    @property
    def itls(self) -> list[float]:
        """Seconds from each chunk to the next."""
        return [after - before for before, after in zip(self.chunk_times, self.chunk_times[1:], strict=False)]

    @property
    def finish_reason(self) -> str | None:
        """The first that was given."""
        return self.finish_reasons[0] if self.finish_reasons else None

    def tokens(self, name: str) -> int | None:
        """`prompt_tokens` or `completion_tokens` of the usage; None where the server told none."""
        value = self.usage.get(name)
        return value if isinstance(value, int) else None

    @property
    def faults(self) -> list[str]:
        """The error, if any, and the breaches of the protocol."""
        return ([self.error] if self.error else []) + self.problems

    def complain(self, problem: str) -> None:
        """Notes a breach once."""
        if problem not in self.problems and len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(problem)


@dataclass(frozen=True)
class Dialect:
    """What differs between chat and plain completions."""

    path: str
    whole: str  # `object` of an answer
    chunk: str  # `object` of an event
    has_role: bool
    piece: Callable[[dict[str, Any]], str]  # the text of an event's choice
    content: Callable[[dict[str, Any]], Any]  # the text of an answer's choice


# In the order in which streams send them. Some servers send the same reasoning under two names: it counts once.
_DELTA_TEXTS = ("reasoning_content", "reasoning", "content", "refusal")


def _delta_text(choice: dict[str, Any]) -> str:
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return ""
    texts = [delta[name] for name in _DELTA_TEXTS if isinstance(delta.get(name), str)]
    return "".join(dict.fromkeys(texts)) or "".join(map(_call_text, delta.get("tool_calls") or []))


def _call_text(call: Any) -> str:
    function = call.get("function") if isinstance(call, dict) else None
    return str(function.get("arguments") or function.get("name") or "") if isinstance(function, dict) else ""


def _plain_text(choice: dict[str, Any]) -> str:
    text = choice.get("text")
    return text if isinstance(text, str) else ""


def _message_text(choice: dict[str, Any]) -> Any:
    message = choice.get("message")
    if not isinstance(message, dict) or message.get("role") != "assistant":
        return None
    return _delta_text({"delta": message})


CHAT = Dialect("/v1/chat/completions", "chat.completion", "chat.completion.chunk", True, _delta_text, _message_text)
COMPLETIONS = Dialect(
    "/v1/completions", "text_completion", "text_completion", False, _plain_text, lambda choice: choice.get("text")
)


class _StreamRecord:
    """Fills an answer from the events of a stream and checks their order."""

    def __init__(self, answer: Answer, dialect: Dialect, wants_usage: bool) -> None:
        self._answer, self._dialect, self._wants_usage = answer, dialect, wants_usage
        self._texts: list[str] = []
        self._seen_choice = self._done = False

    def add(self, data: str, at: float) -> None:
        answer = self._answer
        if self._done:
            answer.complain("something follows [DONE]")
        if data == _DONE:
            self._done = True
            return
        try:
            event = loads(data)
        except ValueError:
            answer.complain(f"an event is not JSON: {data[:60]!r}")
            return
        if not isinstance(event, dict):
            answer.complain(f"an event is no object: {data[:60]!r}")
        elif event.get("error"):
            answer.error = answer.error or f"the stream tells an error: {error_text(event)}"
        else:
            self._event(event, at)

    def _event(self, event: dict[str, Any], at: float) -> None:
        answer = self._answer
        if event.get("id") not in answer.ids:
            answer.ids.append(event.get("id"))  # type: ignore[arg-type]
        if event.get("object") != self._dialect.chunk:
            answer.complain(f"object of an event is {event.get('object')!r}, not {self._dialect.chunk!r}")
        if event.get("usage"):
            answer.usage = event["usage"]
        choices = event.get("choices")
        if not isinstance(choices, list):
            answer.complain("an event has no choices")
            return
        for choice in choices:
            if isinstance(choice, dict) and choice.get("index", 0) == 0:
                self._choice(choice, at)
            else:
                answer.complain("an event has a choice other than number 0")

    def _choice(self, choice: dict[str, Any], at: float) -> None:
        answer = self._answer
        if self._dialect.has_role and not self._seen_choice:
            delta = choice.get("delta")
            if not isinstance(delta, dict) or delta.get("role") != "assistant":
                answer.complain("the first event does not have the role")
        self._seen_choice = True
        text = self._dialect.piece(choice)
        if text or choice.get("token_ids"):
            if answer.finish_reasons:
                answer.complain("text follows the finish reason")
            self._texts.append(text)
            answer.chunk_times.append(at - answer.started)
        reason = choice.get("finish_reason")
        if reason is not None:
            answer.finish_reasons.append(str(reason))

    def end(self, is_whole: bool) -> None:
        """What can be told only at the end."""
        answer = self._answer
        answer.text = "".join(self._texts)
        if answer.error or not is_whole:
            return
        if not self._done:
            answer.complain("the stream ends without [DONE]")
        if len(answer.ids) != 1 or not isinstance(answer.ids[0], str):
            answer.complain(f"the stream has not one id but {answer.ids[:4]}")
        if self._wants_usage and not answer.usage:
            answer.complain("no event has the usage that was asked for")
        check_finish(answer)


def check_finish(answer: Answer) -> None:
    """One finish reason of those that exist, and sums that are right."""
    if len(answer.finish_reasons) != 1:
        answer.complain(f"there is not one finish reason but {answer.finish_reasons[:4]}")
    for reason in answer.finish_reasons:
        if reason not in FINISH_REASONS:
            answer.complain(f"finish reason {reason!r} is unknown")
    if not answer.usage:
        return
    counts = [answer.tokens(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    if None in counts or sum(counts[:2]) != counts[2]:  # type: ignore[arg-type]
        answer.complain(f"the usage does not add up: {answer.usage}")


def error_text(body: Any) -> str:
    """The message of OpenAI's error object, else the body itself, short."""
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and error.get("message"):
        return str(error["message"])[:_ERROR_CHARS]
    return str(error or body)[:_ERROR_CHARS]


class OpenAIClient:
    """Talks to one server. Every method ends within `timeout` seconds, and tells failures in the answer."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 600.0) -> None:
        headers = {"content-type": "application/json"}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        self.http = HttpClient(Address.parse(url), headers)
        self.timeout = timeout

    async def close(self) -> None:
        """Closes its connections."""
        await self.http.close()

    async def stream(
        self, dialect: Dialect, payload: Mapping[str, Any], path: str | None = None, wants_usage: bool = True
    ) -> Answer:
        """Sends `payload` with `stream`, and `stream_options` for the usage."""
        asked = {**payload, "stream": True}
        if wants_usage:
            asked["stream_options"] = {"include_usage": True}

        async def read(response: Response, answer: Answer) -> None:
            await self._read_stream(response, answer, _StreamRecord(answer, dialect, wants_usage))

        return await self._send("POST", path or dialect.path, encode(asked), read)

    async def whole(self, dialect: Dialect, payload: Mapping[str, Any]) -> Answer:
        """Sends `payload` and checks the one answer."""

        async def read(response: Response, answer: Answer) -> None:
            await _read_json(response, answer)
            _take_whole(answer, dialect)

        return await self._send("POST", dialect.path, encode(payload), read)

    async def raw(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Answer:
        """Any request; the answer has the status and the body, whatever they are."""
        return await self._send(method, path, body, _read_json, headers, any_status=True)

    async def models(self) -> list[dict[str, Any]]:
        """The entries of /v1/models.

        Raises:
            ServerError: there are none, or no answer.
        """
        answer = await self.raw("GET", "/v1/models")
        entries = answer.body.get("data") if isinstance(answer.body, dict) else None
        if answer.error or answer.status != 200 or not isinstance(entries, list):
            why = answer.error or f"status {answer.status}: {error_text(answer.body)}"
            raise ServerError(f"GET /v1/models: {why}")
        found = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
        if not found:
            raise ServerError("GET /v1/models: the list is empty")
        return found

    async def _send(
        self,
        method: str,
        path: str,
        body: bytes,
        read: Callable[[Response, Answer], Any],
        headers: Mapping[str, str] | None = None,
        any_status: bool = False,
    ) -> Answer:
        answer = Answer(started=time.perf_counter())

        async def exchange() -> None:
            async with self.http.request(method, path, body, headers) as response:
                answer.status, answer.headers = response.status, response.headers
                if any_status or response.status == 200:
                    await read(response, answer)
                else:
                    await _read_json(response, answer)
                    answer.error = _refusal(answer)

        try:
            await asyncio.wait_for(exchange(), self.timeout)
        except asyncio.TimeoutError:
            what = "end of the answer" if answer.status else "answer"
            answer.error = f"no {what} within {self.timeout:g} s"
        except (TransportError, StreamError) as error:
            answer.error = str(error)
        finally:
            answer.seconds = time.perf_counter() - answer.started
        return answer

    async def _read_stream(self, response: Response, answer: Answer, record: _StreamRecord) -> None:
        kind = response.headers.get("content-type", "")
        if kind.partition(";")[0].strip() != "text/event-stream":
            answer.complain(f"content-type of the stream is {kind!r}, not 'text/event-stream'")
        parser, is_whole = EventParser(), False
        try:
            async for at, piece in response.pieces():
                for data in parser.feed(piece):
                    record.add(data, at)
            parser.end()
            is_whole = True
        finally:
            for problem in parser.problems:
                answer.complain(problem)
            record.end(is_whole)


def _refusal(answer: Answer) -> str:
    after = answer.headers.get("retry-after")
    return f"status {answer.status}{f' (Retry-After: {after})' if after else ''}: {error_text(answer.body)}"


async def _read_json(response: Response, answer: Answer) -> None:
    data = await response.read()
    try:
        answer.body = loads(data)
    except ValueError:
        answer.body = data.decode(errors="replace")


def _take_whole(answer: Answer, dialect: Dialect) -> None:
    body = answer.body
    if not isinstance(body, dict):
        answer.error = f"the answer is no JSON object: {str(body)[:60]!r}"
        return
    if body.get("object") != dialect.whole:
        answer.complain(f"object of the answer is {body.get('object')!r}, not {dialect.whole!r}")
    answer.ids = [body["id"]] if isinstance(body.get("id"), str) else []
    if not answer.ids:
        answer.complain("the answer has no id")
    answer.usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
    if not answer.usage:
        answer.complain("the answer has no usage")
    choices = body.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        answer.complain("the answer does not have one choice")
        return
    text = dialect.content(choices[0])
    if not isinstance(text, str):
        answer.complain("the choice has no text of the assistant")
    else:
        answer.text = text
    if choices[0].get("finish_reason") is not None:
        answer.finish_reasons = [str(choices[0]["finish_reason"])]
    check_finish(answer)
