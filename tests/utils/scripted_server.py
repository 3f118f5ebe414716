"""A small OpenAI-compatible HTTP server that plays a script: exact times of chunks, and every fault that a client must survive.

It runs on a thread of its own. Texts are made of the request, so that equal requests get equal texts, with characters of several bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

MODEL = "scripted"
_WORDS = ("river", "café", "lantern", "naïve", "moon🌙", "stone", "über", "violin")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

Event = dict[str, Any] | str
Piece = tuple[float, bytes]  # seconds to wait, bytes to send


@dataclass
class Script:
    """What the server does. Times in seconds; `fault` is a key of FAULTS or of the others named in `_Server`."""

    first_delay: float = 0.0  # from the request to the first token
    gap: float = 0.0  # from token to token
    tokens: int = 12  # of an answer, where max_tokens is not less
    api_key: str | None = None
    fault: str | None = None
    takes_ids: bool = True
    tells_usage: bool = True
    # For faults that concern some requests alone: whether this one.
    concerns: Callable[[dict[str, Any]], bool] = field(default=lambda request: True)


def words_of(request: dict[str, Any], count: int) -> list[str]:
    """The tokens of an answer: they depend on the prompt alone."""
    seed = zlib.crc32(json.dumps(request.get("messages", request.get("prompt"))).encode())
    return [f"{_WORDS[(seed >> (i % 24)) % len(_WORDS)]}{i} " for i in range(count)]


def prompt_tokens(request: dict[str, Any]) -> int:
    """Ids, or words."""
    prompt = request.get("prompt")
    if isinstance(prompt, list):
        return len(prompt)
    texts = [prompt] if isinstance(prompt, str) else [m["content"] for m in request["messages"]]
    return sum(len(text.split()) for text in texts)


def stream_events(request: dict[str, Any], script: Script, number: int) -> list[tuple[float, Event]]:
    """(wait, event) of a correct stream."""
    chat = "messages" in request
    count = min(script.tokens, request.get("max_tokens", script.tokens))
    base = {"id": f"id-{number}", "object": "chat.completion.chunk" if chat else "text_completion", "model": MODEL}

    def event(text: str | None, reason: str | None = None, **delta: Any) -> dict[str, Any]:
        content = {} if text is None else {"content": text}
        inner = {"delta": {**delta, **content}} if chat else {"text": text or ""}
        return {**base, "choices": [{"index": 0, **inner, "finish_reason": reason}]}

    events: list[tuple[float, Event]] = [(0.0, event("", role="assistant"))] if chat else []
    waits = [script.first_delay, *[script.gap] * count]
    events += [(wait, event(word)) for wait, word in zip(waits, words_of(request, count), strict=False)]
    events.append((0.0, event(None, "length" if count < script.tokens else "stop")))
    if request.get("stream_options", {}).get("include_usage") and script.tells_usage:
        events.append((0.0, {**base, "choices": [], "usage": usage_of(request, count)}))
    return [*events, (0.0, "[DONE]")]


def usage_of(request: dict[str, Any], count: int) -> dict[str, int]:
    """OpenAI's usage."""
    read = prompt_tokens(request)
    return {"prompt_tokens": read, "completion_tokens": count, "total_tokens": read + count}


def whole_answer(request: dict[str, Any], script: Script, number: int) -> dict[str, Any]:
    """A correct answer without a stream."""
    count = min(script.tokens, request.get("max_tokens", script.tokens))
    text = "".join(words_of(request, count))
    reason = "length" if count < script.tokens else "stop"
    chat = "messages" in request
    inner = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {
        "id": f"id-{number}",
        "object": "chat.completion" if chat else "text_completion",
        "model": MODEL,
        "choices": [{"index": 0, **inner, "finish_reason": reason}],
        "usage": usage_of(request, count),
    }


def encoded(events: list[tuple[float, Event]]) -> list[Piece]:
    """Events as lines of a stream."""
    made = []
    for wait, event in events:
        data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
        made.append((wait, f"data: {data}\n\n".encode()))
    return made


def _finish_at(events: list[tuple[float, Event]]) -> int:
    return next(
        i
        for i, (_, e) in enumerate(events)
        if isinstance(e, dict) and e["choices"] and e["choices"][0]["finish_reason"]
    )


def _retold(event: Event, **changes: Any) -> Event:
    return {**json.loads(json.dumps(event)), **changes}


def _two_ids(events: list[tuple[float, Event]]) -> list[tuple[float, Event]]:
    middle = len(events) // 2
    wait, event = events[middle]
    return [*events[:middle], (wait, _retold(event, id="id-other")), *events[middle + 1 :]]


def _other_text(events: list[tuple[float, Event]]) -> list[tuple[float, Event]]:
    text = json.dumps([[wait, event] for wait, event in events]).replace("0 ", "0? ", 1)
    return [(wait, event) for wait, event in json.loads(text)]


# Of the events of a stream.
EVENT_FAULTS: dict[str, Callable[[list[tuple[float, Event]]], list[tuple[float, Event]]]] = {
    "no-role": lambda events: events[1:],
    "missing-done": lambda events: events[:-1],
    "after-done": lambda events: [*events, events[-2]],
    "duplicate-finish": lambda events: events[: (i := _finish_at(events)) + 1] + events[i:],
    "no-finish": lambda events: [e for i, e in enumerate(events) if i != _finish_at(events)],
    "two-ids": _two_ids,
    "text-after-finish": lambda events: [*events[: (i := _finish_at(events)) + 1], events[1], *events[i + 1 :]],
    "no-usage": lambda events: [(w, e) for w, e in events if not (isinstance(e, dict) and "usage" in e)],
    "error-event": lambda events: [*events[:3], (0.0, {"error": {"message": "the engine died"}})],
    "other-text": _other_text,
    "not-json": lambda events: [*events[:2], (0.0, "{nonsense"), *events[2:]],
    "one-chunk": lambda events: _joined(events),
}


def _joined(events: list[tuple[float, Event]]) -> list[tuple[float, Event]]:
    i = _finish_at(events)
    whole = _retold(events[1][1])
    assert isinstance(whole, dict)
    texts = [e["choices"][0]["delta"].get("content", "") for _, e in events[:i] if isinstance(e, dict)]
    whole["choices"][0]["delta"]["content"] = "".join(texts)
    return [events[0], (0.0, whole), *events[i:]]


def _resized(pieces: list[Piece], size: int) -> list[Piece]:
    data = b"".join(piece for _, piece in pieces)
    return [(0.0, data[i : i + size]) for i in range(0, len(data), size)]


# Of the bytes of a stream.
BYTE_FAULTS: dict[str, Callable[[list[Piece]], list[Piece]]] = {
    "split-utf8": lambda pieces: _resized(pieces, 3),  # no fault: TCP may cut anywhere
    "not-utf8": lambda pieces: [(wait, data.replace("é".encode(), b"\xff\xfe")) for wait, data in pieces],
    "huge-line": lambda pieces: [*pieces[:2], (0.0, b"data: " + b"x" * (2 * 2**20) + b"\n\n"), *pieces[2:]],
    "endless": lambda pieces: [*pieces[:2], *[(0.01, pieces[1][1])] * 100_000],
}
# What happens to a request before any stream: status, headers, body.
STATUS_FAULTS: dict[str, tuple[int, dict[str, str], Any]] = {
    "status-429": (429, {"retry-after": "7"}, {"error": {"message": "queue full", "type": "rate_limit_error"}}),
    "status-500": (500, {}, {"error": {"message": "broken", "type": "server_error"}}),
}


class _DisconnectError(Exception):
    pass


class ScriptedServer:
    """`with ScriptedServer(script) as server:` listens on `server.url`; `server.requests` are the bodies that came, with their times."""

    def __init__(self, script: Script | None = None, port: int = 0) -> None:
        self.script, self._port = script or Script(), port
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.open = self.most_open = 0
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._tasks: set[asyncio.Task[Any]] = set()

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)

    def _serve(self) -> None:
        async def serve() -> None:
            self._stop = asyncio.Event()
            server = await asyncio.start_server(self._connection, "127.0.0.1", self._port)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            self._ready.set()
            await self._stop.wait()
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self._loop.run_until_complete(serve())
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
        except (_DisconnectError, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        arrived = self._loop.time()
        with self._counted():
            await self._answer(method, path, headers, body, writer, arrived)
        return True

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            yield
        finally:
            self.open -= 1

    async def _answer(
        self, method: str, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter, arrived: float
    ) -> None:
        script = self.script
        if script.api_key and headers.get("authorization") != f"Bearer {script.api_key}":
            return await self._json(writer, 401, _error("no such key"))
        if (method, path) == ("GET", "/health"):
            return await self._json(writer, 200, {})
        if (method, path) == ("GET", "/v1/models"):
            return await self._json(writer, 200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        if method != "POST" or path not in (CHAT, COMPLETIONS):
            return await self._json(writer, 404, _error("no such path"))
        try:
            request = json.loads(body)
        except ValueError:
            return await self._refuse_malformed(writer)
        refused = self._refused(request)
        if refused:
            return await self._json(writer, *refused)
        self.requests.append(request)
        self.times.append(arrived)
        fault = script.fault if script.concerns(request) else None
        if fault == "never-answers":
            await asyncio.sleep(3600)
        if fault in STATUS_FAULTS:
            status, extra, answer = STATUS_FAULTS[fault]
            return await self._json(writer, status, answer, extra)
        number = len(self.requests) if fault != "same-id" else 1
        if not request.get("stream"):
            answer = whole_answer(request, script, number)
            await asyncio.sleep(script.first_delay)
            return await self._json(writer, 200, answer)
        return await self._stream(writer, request, fault, number, arrived)

    async def _refuse_malformed(self, writer: asyncio.StreamWriter) -> None:
        if self.script.fault == "dies-of-malformed":
            raise _DisconnectError
        plain = self.script.fault == "plain-errors"
        await self._json(writer, 400, "bad request" if plain else _error("the body is not JSON"))

    def _refused(self, request: dict[str, Any]) -> tuple[int, Any] | None:
        if request.get("model") != MODEL and self.script.fault != "any-model":
            return 404, _error("no such model")
        if not isinstance(request.get("temperature"), (int, float)):
            return 400, _error("temperature must be a number")
        if isinstance(request.get("prompt"), list) and not self.script.takes_ids:
            return 422, _error("prompt must be a text")
        if not isinstance(request.get("messages", []), list) or not ("messages" in request or "prompt" in request):
            return 400, _error("messages must be a list")
        return None

    async def _json(
        self, writer: asyncio.StreamWriter, status: int, body: Any, extra: dict[str, str] | None = None
    ) -> None:
        data = json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(data)}"]
        lines += [f"{name}: {value}" for name, value in (extra or {}).items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        await writer.drain()

    async def _stream(
        self, writer: asyncio.StreamWriter, request: dict[str, Any], fault: str | None, number: int, arrived: float
    ) -> None:
        if fault == "not-http":
            writer.write(b"hello there\r\n\r\n")
            raise _DisconnectError
        events = stream_events(request, self.script, number)
        pieces = encoded(EVENT_FAULTS[fault](events) if fault in EVENT_FAULTS else events)
        if fault in BYTE_FAULTS:
            pieces = BYTE_FAULTS[fault](pieces)
        kind = "application/json" if fault == "wrong-content-type" else "text/event-stream; charset=utf-8"
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        due = arrived
        async for i, data in _timed(pieces, due):
            if fault == "disconnect" and i == 4:
                raise _DisconnectError
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()


async def _timed(pieces: list[Piece], due: float) -> AsyncIterator[tuple[int, bytes]]:
    """Pieces at their times: waits add up, whatever sending took."""
    loop = asyncio.get_running_loop()
    for i, (wait, data) in enumerate(pieces):
        due += wait
        if due > loop.time():
            await asyncio.sleep(due - loop.time())
        yield i, data


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
