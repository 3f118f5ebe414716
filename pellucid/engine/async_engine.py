"""`AsyncLLMEngine`: the engine for servers. A thread or a process owns it; callers wait on any asyncio loop."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Lock
from typing import Any

from pellucid.config import EngineConfig
from pellucid.engine.admission import Prompt, RequestChecker, check_options
from pellucid.engine.client import MAX_UNCOLLECTED
from pellucid.engine.messages import (
    CLOSED,
    AbortAll,
    Cancel,
    Died,
    Done,
    ErrorInfo,
    Event,
    Loaded,
    LoadFailed,
    LoadProgress,
    ModelInfo,
    News,
    ReadStats,
    ReadSteps,
    Refused,
    ResetPrefixCache,
    Start,
    Stats,
    Steps,
    Submit,
)
from pellucid.engine.metrics import EngineStats
from pellucid.engine.streams import RequestStream, Wakes
from pellucid.engine.trace import StepRecord
from pellucid.engine.transport import ThreadTransport, Transport
from pellucid.errors import ConfigError, EngineDeadError, EngineDrainingError, InvalidRequestError
from pellucid.hidden import HiddenStatesParams
from pellucid.outputs import RequestOutput, StreamChunk
from pellucid.params import SamplingParams
from pellucid.text.tokenizer import Tokenizer

DEFAULT_MAX_WAITING = 1024
MAX_STEP_RECORDS = 4096
# Outputs that nobody collected are dropped after this many seconds, and sooner when there are MAX_UNCOLLECTED younger ones.
MAX_UNCOLLECTED_SECONDS = 600.0
_NUM_TOKENISERS = 2

Progress = Callable[[int, int], None]


class AsyncLLMEngine:
    """An engine that runs by itself. Every method may be called from any thread, the coroutines from any asyncio loop.

    Made by `start`. What ended is kept until it is released, within `MAX_UNCOLLECTED` and `MAX_UNCOLLECTED_SECONDS`.
    """

    def __init__(self, transport: Transport, loaded: Loaded) -> None:
        self.model: ModelInfo = loaded.model
        self.tokenizer: Tokenizer | None = transport.tokenizer(loaded)
        self._transport = transport
        self._checker = RequestChecker(
            self.tokenizer,
            self.model.vocab_size,
            self.model.max_model_len,
            self.model.eos_token_ids,
            self.model.hidden_states,
        )
        self._tokenisers = ThreadPoolExecutor(_NUM_TOKENISERS, thread_name_prefix="pellucid-tokeniser")
        self._lock = Lock()  # guards all that follows
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._streams: dict[str, RequestStream] = {}
        self._ended_at: OrderedDict[str, float] = OrderedDict()  # of streams that are kept, oldest first
        self._waiting_for_all: list[asyncio.Future[None]] = []
        self._is_draining = False
        self._error: BaseException | None = None

    @classmethod
    def start(
        cls,
        config: EngineConfig,
        *,
        in_process: bool = False,
        max_waiting: int = DEFAULT_MAX_WAITING,
        progress: Progress | None = None,
    ) -> AsyncLLMEngine:
        """Loads a model and returns when it takes requests; call it off the loop.

        Args:
            in_process: the owner is a process of its own rather than a thread of this one.
            max_waiting: how many requests may wait beyond the `max_num_seqs` that run; 0 refuses what would wait for a place.
            progress: `progress(done, total)` is told bytes while the first start packs the weights.

        Raises:
            ConfigError, ModelNotFoundError, UnsupportedModelError, WeightFormatError: what cannot be loaded, and why.
            EngineDeadError: the engine ended while it was loading.
        """
        if isinstance(max_waiting, bool) or not isinstance(max_waiting, int) or not 0 <= max_waiting <= 10**6:
            raise ConfigError(f"max_waiting is {max_waiting!r}; it must be an integer from 0 to 1,000,000")
        transport = _transport(Start(config, max_waiting), in_process)
        link = _Link()
        try:
            transport.start(link.deliver)
            engine = cls(transport, link.wait_for_model(progress))
        except BaseException:
            transport.close()
            raise
        link.connect(engine._take)
        return engine

    # ---- requests -------------------------------------------------------------------------------------------------

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        stream: bool = True,
        hidden_states: HiddenStatesParams | None = None,
    ) -> str:
        """Queues one request and gives its id. Without `stream` its watchers get it whole, when it has ended: that is cheaper.

        Raises:
            InvalidRequestError: naming the field, the value and the limit; nothing was queued.
            QueueFullError: as many wait as may; `retry_after` says when to try again.
            EngineDrainingError, EngineDeadError: nothing more is taken.
        """
        return (await self._submit(prompt, params, request_id, priority, cache_salt, stream, hidden_states)).request_id

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        hidden_states: HiddenStatesParams | None = None,
    ) -> AsyncIterator[StreamChunk]:
        """News of one request as it is made. Leaving early cancels it; nothing of it is kept. Raises as `submit`."""
        stream = await self._submit(prompt, params, request_id, priority, cache_salt, True, hidden_states)
        try:
            async for chunk in self._watch(stream):
                yield chunk
        finally:
            self._abandon(stream)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        hidden_states: HiddenStatesParams | None = None,
    ) -> RequestOutput:
        """The output of one request, of which nothing is kept. A caller who is cancelled cancels it. Raises as `submit`."""
        stream = await self._submit(prompt, params, request_id, priority, cache_salt, False, hidden_states)
        try:
            return await self._wait(stream)
        finally:
            self._abandon(stream)

    def watch_stream(self, request_id: str) -> AsyncIterator[StreamChunk]:
        """All that a request has brought so far, joined to one chunk a choice, then its news; exactly one chunk a choice has a
        finish reason. Leaving does not cancel.

        Raises:
            KeyError: the id is unknown.
            EngineDeadError: while it is read; the engine ended before the request did.
        """
        return self._watch(self._find(request_id))

    async def collect(self, request_id: str) -> RequestOutput | None:
        """The output of a request that has ended; None while it runs.

        Raises:
            KeyError: the id is unknown, or its output was dropped.
            EngineDeadError: the engine ended before the request did.
        """
        stream = self._find(request_id)
        if stream.error is not None:
            raise EngineDeadError(str(stream.error))
        return stream.output

    async def wait(self, request_id: str) -> RequestOutput:
        """The output of a request, when it has ended. Raises as `collect`."""
        return await self._wait(self._find(request_id))

    async def cancel(self, request_id: str) -> bool:
        """Ends a request; its blocks are free then. True also when it had ended, False when it is unknown.

        Raises:
            EngineDeadError: the engine has ended.
        """
        with self._lock:
            stream = self._streams.get(request_id)
            if stream is None or stream.output is not None:
                return stream is not None
        await self._call(lambda call: Cancel(call, request_id))
        return True

    async def is_finished(self, request_id: str) -> bool:
        """True when the request is known and has ended."""
        with self._lock:
            stream = self._streams.get(request_id)
            return stream is not None and stream.output is not None

    async def status(self, request_id: str) -> str | None:
        """Where a request stands; None when it is unknown."""
        with self._lock:
            stream = self._streams.get(request_id)
            return None if stream is None else stream.status

    async def release(self, request_id: str) -> None:
        """Forgets an ended request's output."""
        with self._lock:
            stream = self._streams.get(request_id)
            if stream is not None and stream.has_ended:
                self._forget(stream)

    # ---- the engine -----------------------------------------------------------------------------------------------

    async def stats(self) -> EngineStats:
        """The state of the engine between two steps, and its counters."""
        stats: EngineStats = await self._call(ReadStats)
        return stats

    async def steps(self, since: int = 0, limit: int = 256) -> list[StepRecord]:
        """The first `limit` records in memory from step `since` on, oldest first; a negative `since` counts from the newest.

        Raises:
            InvalidRequestError: `limit` is not in [1, 4,096].
        """
        if not 1 <= limit <= MAX_STEP_RECORDS:
            raise InvalidRequestError(f"limit is {limit}; it must be in [1, {MAX_STEP_RECORDS:,}]", "limit")
        records: list[StepRecord] = await self._call(lambda call: ReadSteps(call, since, limit))
        return records

    async def abort_all(self) -> int:
        """Ends all requests; how many there were."""
        return int(await self._call(AbortAll))

    async def drain(self, timeout: float) -> bool:
        """Takes no new requests and waits for those that run, `timeout` seconds at most. True when all ended by then; the
        others are aborted."""
        with self._lock:
            self._is_draining = True
            if not self._has_living():
                return True
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting_for_all.append(future)
        try:
            await asyncio.wait_for(future, timeout)
        except asyncio.TimeoutError:
            await self.abort_all()
            return False
        return True

    async def reset_prefix_cache(self) -> bool:
        """Forgets all cached blocks; False while requests hold blocks."""
        return bool(await self._call(ResetPrefixCache))

    @property
    def is_alive(self) -> bool:
        """True while requests can be served."""
        return self._error is None and self._transport.is_alive

    @property
    def error(self) -> BaseException | None:
        """Why the engine is dead; None while it is not."""
        return self._error

    def close(self) -> None:
        """Ends the engine and frees its memory; who waits gets an error at once. Harmless when called again."""
        self._die(CLOSED)
        self._tokenisers.shutdown(wait=False, cancel_futures=True)
        self._transport.close()

    # ---- parts ----------------------------------------------------------------------------------------------------

    async def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        cache_salt: str | None,
        is_stream: bool,
        hidden_states: HiddenStatesParams | None,
    ) -> RequestStream:
        params = SamplingParams() if params is None else params
        check_options(request_id, priority, cache_salt)
        self._refuse_when_closed()
        text, token_ids = await self._tokenised(prompt, params, hidden_states)
        stream = self._open_stream(request_id, params.n)
        name = stream.request_id
        try:
            await self._call(
                lambda call: Submit(call, name, token_ids, params, text, priority, cache_salt, is_stream, hidden_states)
            )
        except BaseException:
            self._abandon(stream)
            raise
        return stream

    async def _tokenised(
        self, prompt: Prompt, params: SamplingParams, hidden_states: HiddenStatesParams | None
    ) -> tuple[str | None, list[int]]:
        """Checks and tokenises on a thread that neither the loop nor the owner waits for."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._tokenisers, self._prepare, prompt, params, hidden_states)
        except asyncio.CancelledError:
            self._refuse_when_closed()  # closing cancels what stands in the pool's queue
            raise
        except RuntimeError:
            self._refuse_when_closed()
            raise

    def _prepare(
        self, prompt: Prompt, params: SamplingParams, hidden_states: HiddenStatesParams | None
    ) -> tuple[str | None, list[int]]:
        text, token_ids = self._checker.tokenise(prompt)
        self._checker.check(token_ids, params, hidden_states)
        self._checker.grammar(params)
        return text, token_ids

    def _open_stream(self, request_id: str | None, num_choices: int) -> RequestStream:
        with self._lock:
            self._raise_when_closed()
            name = f"req-{next(self._numbers)}" if request_id is None else request_id
            old = self._streams.get(name)
            if old is not None and not old.has_ended:
                raise InvalidRequestError(f"request_id {name!r} is in use", param="request_id")
            if old is not None:
                self._forget(old)
            stream = self._streams[name] = RequestStream(name, num_choices)
        return stream

    async def _watch(self, stream: RequestStream) -> AsyncIterator[StreamChunk]:
        places, num_open = [0] * stream.num_choices, stream.num_choices
        loop = asyncio.get_running_loop()
        with self._lock:
            stream.num_watchers += 1
        try:
            while num_open:
                with self._lock:
                    chunks = stream.read(places)
                    changed = None if chunks or stream.error else stream.when_changed(loop)
                for chunk in chunks:
                    num_open -= chunk.finish_reason is not None
                    yield chunk
                if changed is not None:
                    await changed
                elif not chunks:
                    raise EngineDeadError(str(stream.error))
        finally:
            with self._lock:
                stream.num_watchers -= 1
                stream.compact()

    async def _wait(self, stream: RequestStream) -> RequestOutput:
        loop = asyncio.get_running_loop()
        while True:
            with self._lock:
                if stream.output is not None:
                    return stream.output
                if stream.error is not None:
                    raise EngineDeadError(str(stream.error))
                ended = stream.when_changed(loop, at_end=True)
            await ended

    def _abandon(self, stream: RequestStream) -> None:
        """Forgets a request, and ends it where it runs. Does not wait for that."""
        with self._lock:
            if self._streams.get(stream.request_id) is not stream:
                return
            self._forget(stream)
            wakes = Wakes()
            self._wake_when_all_ended(wakes)
        wakes.send()
        if not stream.has_ended:
            self._transport.send(Cancel(0, stream.request_id))

    def _find(self, request_id: str) -> RequestStream:
        with self._lock:
            if request_id not in self._streams:
                raise KeyError(f"request {request_id!r} is unknown")
            return self._streams[request_id]

    def _forget(self, stream: RequestStream) -> None:
        self._streams.pop(stream.request_id, None)
        self._ended_at.pop(stream.request_id, None)

    async def _call(self, make: Callable[[int], Any]) -> Any:
        """Sends a command and waits for its answer."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        with self._lock:
            self._raise_when_dead()
            call = next(self._numbers)
            self._calls[call] = future
        try:
            self._transport.send(make(call))
            return await future
        finally:
            self._calls.pop(call, None)

    def _refuse_when_closed(self) -> None:
        with self._lock:
            self._raise_when_closed()

    def _raise_when_closed(self) -> None:
        self._raise_when_dead()
        if self._is_draining:
            raise EngineDrainingError("the engine is ending what it has; it takes no new requests")

    def _raise_when_dead(self) -> None:
        if self._error is not None:
            raise EngineDeadError(str(self._error))

    # ---- events ---------------------------------------------------------------------------------------------------

    def _take(self, events: Sequence[Event]) -> None:
        """Books what the owner says, then wakes each loop once. Called by the transport's thread alone."""
        wakes = Wakes()
        with self._lock:
            for event in events:
                if isinstance(event, News):
                    self._take_news(event, wakes)
                elif isinstance(event, Died):
                    self._fail_all(event.error, wakes)
                else:
                    self._take_answer(event, wakes)
        wakes.send()

    def _take_news(self, news: News, wakes: Wakes) -> None:
        streams = self._streams
        for request_id, status in news.statuses.items():
            if request_id in streams:
                streams[request_id].status = status
        for chunk in news.chunks:
            if chunk.request_id in streams:
                streams[chunk.request_id].add(chunk, wakes)
        for output in news.finished:
            stream = streams.get(output.request_id)
            if stream is not None:
                stream.end(output, wakes)
                self._ended_at[output.request_id] = time.monotonic()
        if news.finished:
            self._drop_uncollected()
            self._wake_when_all_ended(wakes)

    def _take_answer(self, event: Event, wakes: Wakes) -> None:
        if isinstance(event, (Done, Stats, Steps, Refused)):
            future = self._calls.pop(event.call, None)
            if future is not None:
                wakes.add(future, _value(event))

    def _drop_uncollected(self) -> None:
        oldest_allowed = time.monotonic() - MAX_UNCOLLECTED_SECONDS
        while self._ended_at:
            name, ended_at = next(iter(self._ended_at.items()))
            if len(self._ended_at) <= MAX_UNCOLLECTED and ended_at >= oldest_allowed:
                return
            self._forget(self._streams[name])

    def _has_living(self) -> bool:
        return len(self._streams) > len(self._ended_at)

    def _wake_when_all_ended(self, wakes: Wakes) -> None:
        if self._waiting_for_all and not self._has_living():
            for future in self._waiting_for_all:
                wakes.add(future)
            self._waiting_for_all.clear()

    def _die(self, error: ErrorInfo) -> None:
        wakes = Wakes()
        with self._lock:
            self._fail_all(error, wakes)
        wakes.send()

    def _fail_all(self, info: ErrorInfo, wakes: Wakes) -> None:
        """Everybody who waits gets an error. What had ended before can still be read."""
        if self._error is not None:
            return
        cause = info.to_error()
        self._error = cause if isinstance(cause, EngineDeadError) else EngineDeadError(f"the engine failed: {cause}")
        for future in (*self._calls.values(), *self._waiting_for_all):
            wakes.add(future, EngineDeadError(str(self._error)))
        self._calls.clear()
        self._waiting_for_all.clear()
        for name, stream in self._streams.items():
            if not stream.has_ended:
                stream.fail(self._error, wakes)
                self._ended_at[name] = time.monotonic()


class _Link:
    """Between a transport and its engine: keeps events until the engine is made."""

    def __init__(self) -> None:
        self._early: SimpleQueue[Event] = SimpleQueue()
        self._take: Callable[[Sequence[Event]], None] | None = None
        self._lock = Lock()

    def deliver(self, events: Sequence[Event]) -> None:
        with self._lock:
            if self._take is None:
                for event in events:
                    self._early.put(event)
                return
        self._take(events)

    def wait_for_model(self, progress: Progress | None) -> Loaded:
        while True:
            event = self._early.get()
            if isinstance(event, Loaded):
                return event
            if isinstance(event, (LoadFailed, Died)):
                raise event.error.to_error()
            if isinstance(event, LoadProgress) and progress is not None:
                progress(event.done, event.total)

    def connect(self, take: Callable[[Sequence[Event]], None]) -> None:
        with self._lock:
            early = []
            while not self._early.empty():
                early.append(self._early.get())
            take(early)
            self._take = take


def _value(answer: Done | Stats | Steps | Refused) -> Any:
    """What the caller of a command gets; an error is raised for it."""
    if isinstance(answer, Refused):
        return answer.error.to_error()
    if isinstance(answer, Done):
        return answer.value
    return answer.stats if isinstance(answer, Stats) else answer.records


def _transport(start: Start, in_process: bool) -> Transport:
    if not in_process:
        return ThreadTransport(start)
    from pellucid.engine.process import ProcessTransport  # brings the sockets

    return ProcessTransport(start)
