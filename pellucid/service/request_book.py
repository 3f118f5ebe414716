"""`RequestBook`: what a front end knows of its requests, and who waits for what. Callers read it, events are booked into it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

from pellucid.engine.client import MAX_UNCOLLECTED
from pellucid.errors import EngineDeadError, EngineDrainingError, InvalidRequestError, QueueFullError
from pellucid.owners import Home, uninterrupted
from pellucid.service.messages import Died, Done, ErrorInfo, Event, News, Refused, Stats, Steps
from pellucid.service.streams import RequestStream, Wakes

# Outputs that nobody collected are dropped, as others end, after this many seconds or behind MAX_UNCOLLECTED younger ones.
MAX_UNCOLLECTED_SECONDS = 600.0
# The lock is held for less than a millisecond: who waits for longer waits for itself.
_LOCK_SECONDS = 1.0

_log = logging.getLogger(__name__)


class RequestBook:
    """Requests by id, calls that wait for an answer, and whether the engine still takes any.

    Used from many threads. `lock` guards all of it, and the streams; methods say where the caller has to hold it. `cancel` is
    told of requests that were abandoned where it could not be done at once.
    """

    def __init__(self, max_state_bytes: int, cancel: Callable[[str], None] = lambda request_id: None) -> None:
        self._home, self._lock, self._cancel = Home("this AsyncLLMEngine"), Lock(), cancel
        self._left: deque[RequestStream] = deque()  # whose readers the garbage collector has ended
        self.streams: dict[str, RequestStream] = {}
        self.calls: dict[int, asyncio.Future[Any]] = {}
        self._queued: dict[int, RequestStream] = {}  # by the call that queues it
        self.ended_at: OrderedDict[str, float] = OrderedDict()  # of streams that are kept, oldest first
        self.error: BaseException | None = None  # why the engine is dead
        self._numbers = itertools.count(1)
        self._waiting_for_all: list[asyncio.Future[None]] = []
        self._is_draining = False
        self._num_state_bytes, self._max_state_bytes = 0, max_state_bytes

    @property
    def lock(self) -> Lock:
        """Guards everything here. Raises `ForkedError` in a forked process, where it may be locked for ever."""
        self._home.check()
        return self._lock

    @property
    def is_left(self) -> bool:
        """True in a process that was forked from the engine's."""
        return self._home.is_left

    # ---- for callers ----------------------------------------------------------------------------------------------

    def open(self, request_id: str | None, num_choices: int, num_state_bytes: int = 0) -> RequestStream:
        """A stream for a new request. An ended one of the same id makes room.

        Raises:
            InvalidRequestError: the id is in use, or hidden states could take more than those of all requests may.
            QueueFullError: they could together with those of others.
            EngineDrainingError, EngineDeadError: nothing more is taken.
        """
        with self.lock:
            self._refuse_when_closed()
            name = f"req-{next(self._numbers)}" if request_id is None else request_id
            old = self.streams.get(name)
            if old is not None and not old.has_ended:
                raise InvalidRequestError("request_id", f"{name!r} is in use")
            if num_state_bytes:
                self._reserve(num_state_bytes)
            if old is not None:
                self.forget(old)
            stream = self.streams[name] = RequestStream(name, num_choices, num_state_bytes)
        return stream

    def find(self, request_id: str) -> RequestStream:
        """The stream of a request.

        Raises:
            KeyError: the id is unknown.
        """
        with self.lock:
            if request_id not in self.streams:
                raise KeyError(f"request {request_id!r} is unknown")
            return self.streams[request_id]

    def _reserve(self, num_bytes: int) -> None:
        taken, most = self._num_state_bytes, self._max_state_bytes
        told = f"the hidden states and activations of this request take up to {num_bytes:,} bytes"
        if num_bytes > most:
            raise InvalidRequestError("return_hidden_states", (told,), limit=f"hidden_states_total_mb allows {most:,}")
        if taken + num_bytes > most:
            raise QueueFullError(f"{told}, those of others {taken:,}; hidden_states_total_mb allows {most:,}", 1.0)
        self._num_state_bytes = taken + num_bytes

    def forget(self, stream: RequestStream) -> None:
        """Keeps nothing of a request. The caller holds the lock."""
        if self.streams.pop(stream.request_id, None) is not None:
            self._num_state_bytes -= stream.num_state_bytes
        self.ended_at.pop(stream.request_id, None)

    def abandon(self, stream: RequestStream) -> None:
        """Keeps nothing of a request, and ends it where it runs, without waiting for that. Its name is free from now on: whoever
        takes it next is queued behind its end.

        The garbage collector may call it, for a coroutine whose loop is gone, on a thread that holds the lock: it is then done
        behind the next events.
        """
        wakes = Wakes()
        with uninterrupted():
            if self.is_left or not self._lock.acquire(timeout=_LOCK_SECONDS):
                self._left.append(stream)
                return
            try:
                if self.streams.get(stream.request_id) is not stream:
                    return
                self.forget(stream)
                self._wake_when_all_ended(wakes)
                if not stream.has_ended:
                    self._cancel(stream.request_id)
            finally:
                self._lock.release()
            wakes.send()

    def give_up(self, *, looks_for_orphans: bool = False) -> None:
        """Ends requests that nobody can read any more."""
        orphans: list[RequestStream] = []
        if looks_for_orphans:
            with self.lock:
                orphans = [stream for stream in self.streams.values() if stream.is_orphan]
        while self._left:
            orphans.append(self._left.popleft())
        for stream in orphans:
            self.abandon(stream)

    def open_call(
        self, loop: asyncio.AbstractEventLoop, queued: RequestStream | None = None
    ) -> tuple[int, asyncio.Future[Any]]:
        """A number for a command, and what its answer settles. `queued`: the stream whose request the command queues.

        Raises:
            EngineDeadError: there will be none.
        """
        with self.lock:
            self._refuse_when_dead()
            call, future = next(self._numbers), loop.create_future()
            self.calls[call] = future
            if queued is not None:
                self._queued[call] = queued
        return call, future

    def close_call(self, call: int) -> None:
        """Nobody waits for this answer any more."""
        with self.lock:
            self.calls.pop(call, None)
            self._queued.pop(call, None)

    def drain(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """Takes no requests from now on; settled when all have ended.

        Raises:
            EngineDeadError: the engine has ended.
        """
        future: asyncio.Future[None] = loop.create_future()
        with self.lock:
            self._refuse_when_dead()
            self._is_draining = True
            if self._has_living():
                self._waiting_for_all.append(future)
            else:
                future.set_result(None)
        return future

    def refuse_when_closed(self) -> None:
        """Raises `EngineDrainingError` or `EngineDeadError` when nothing more is taken."""
        with self.lock:
            self._refuse_when_closed()

    def refuse_when_dead(self) -> None:
        """Raises `EngineDeadError` when the engine has ended."""
        with self.lock:
            self._refuse_when_dead()

    def _refuse_when_closed(self) -> None:
        self._refuse_when_dead()
        if self._is_draining:
            raise EngineDrainingError("the engine is ending what it has; it takes no new requests")

    def _refuse_when_dead(self) -> None:
        if self.error is not None:
            raise EngineDeadError(str(self.error))

    # ---- for the transport's thread -------------------------------------------------------------------------------

    def take(self, events: Sequence[Event]) -> None:
        """Books what the owner says, then wakes each loop once. Raises nothing."""
        wakes = Wakes()
        with self.lock:
            try:
                for event in events:
                    self._take(event, wakes)
            except Exception as error:
                _log.critical("events could not be booked", exc_info=error)
                self._fail_all(ErrorInfo.of(error), wakes)
        wakes.send()
        if self._left:
            self.give_up()

    def die(self, info: ErrorInfo) -> None:
        """Everybody who waits gets an error. What had ended before can still be read."""
        wakes = Wakes()
        with self.lock:
            self._fail_all(info, wakes)
        wakes.send()

    def _take(self, event: Event, wakes: Wakes) -> None:
        if isinstance(event, News):
            self._take_news(event, wakes)
        elif isinstance(event, Died):
            self._fail_all(event.error, wakes)
        elif isinstance(event, (Done, Stats, Steps, Refused)):
            future, stream = self.calls.pop(event.call, None), self._queued.pop(event.call, None)
            if stream is not None:
                stream.is_queued = True
            if future is not None:
                wakes.add(future, _value(event))

    def _take_news(self, news: News, wakes: Wakes) -> None:
        for request_id, status in news.statuses.items():
            if stream := self._queued_stream(request_id):
                stream.status = status
        for chunk in news.chunks:
            if stream := self._queued_stream(chunk.request_id):
                stream.add(chunk, wakes)
        for output in news.finished:
            if stream := self._queued_stream(output.request_id):
                stream.end(output, wakes)
                self.ended_at[output.request_id] = time.monotonic()
        if news.finished:
            self._drop_uncollected()
            self._wake_when_all_ended(wakes)

    def _queued_stream(self, request_id: str) -> RequestStream | None:
        """The stream of a request that the owner has queued. Before that, news under its name are of an abandoned one."""
        stream = self.streams.get(request_id)
        return stream if stream is not None and stream.is_queued else None

    def _drop_uncollected(self) -> None:
        oldest_allowed = time.monotonic() - MAX_UNCOLLECTED_SECONDS
        while self.ended_at:
            name, ended_at = next(iter(self.ended_at.items()))
            if len(self.ended_at) <= MAX_UNCOLLECTED and ended_at >= oldest_allowed:
                return
            self.forget(self.streams[name])

    def _has_living(self) -> bool:
        return len(self.streams) > len(self.ended_at)

    def _wake_when_all_ended(self, wakes: Wakes) -> None:
        if self._waiting_for_all and not self._has_living():
            for future in self._waiting_for_all:
                wakes.add(future)
            self._waiting_for_all.clear()

    def _fail_all(self, info: ErrorInfo, wakes: Wakes) -> None:
        if self.error is not None:
            return
        cause = info.to_error()
        self.error = cause if isinstance(cause, EngineDeadError) else EngineDeadError(f"the engine failed: {cause}")
        for future in (*self.calls.values(), *self._waiting_for_all):
            wakes.add(future, EngineDeadError(str(self.error)))
        self.calls.clear()
        self._waiting_for_all.clear()
        for name, stream in self.streams.items():
            if not stream.has_ended:
                stream.fail(self.error, wakes)
                self.ended_at[name] = time.monotonic()


def _value(answer: Done | Stats | Steps | Refused) -> Any:
    """What the caller of a command gets; an error is raised for it."""
    if isinstance(answer, Refused):
        return answer.error.to_error()
    if isinstance(answer, Done):
        return answer.value
    return answer.stats if isinstance(answer, Stats) else answer.records
