"""`AsyncLLMEngine`: the engine for servers. A thread or a process owns it; callers wait on any asyncio loop."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from queue import SimpleQueue
from threading import Lock, Semaphore
from typing import Any

from pellucid.api.outputs import EngineCoreOutput, RequestOutputDict
from pellucid.api.request_options import NO_OPTIONS, RequestOptions, check_options
from pellucid.api.sampling_params import SamplingParams, integer
from pellucid.config import EngineConfig
from pellucid.engine.admission import Prompt, RequestChecker
from pellucid.engine.metrics import EngineStats
from pellucid.errors import ConfigError, EngineDeadError, QueueFullError
from pellucid.float32 import Range
from pellucid.service.messages import (
    CLOSED,
    AbortAll,
    Cancel,
    Command,
    Died,
    Event,
    Loaded,
    LoadFailed,
    LoadProgress,
    ReadStats,
    ReadSteps,
    ResetPrefixCache,
    Start,
    Submit,
)
from pellucid.service.request_book import RequestBook
from pellucid.service.streams import RequestStream
from pellucid.service.thread import ThreadTransport, Transport
from pellucid.text.tokenizer import Tokenizer
from pellucid.trace.records import StepRecord

DEFAULT_MAX_WAITING = 1024
DEFAULT_HIDDEN_STATES_TOTAL_MB = 1024
MAX_STEP_RECORDS = 4096
_STEPS = Range(-(2**53), 2**53, "in [-2^53, 2^53]")
_LIMITS = Range(1, MAX_STEP_RECORDS, f"in [1, {MAX_STEP_RECORDS:,}]")
_NUM_TOKENISERS = 2
# Structures that wait to be compiled. Each may take seconds: more would wait for longer than a client does.
MAX_COMPILING = 64

Progress = Callable[[int, int], None]


class AsyncLLMEngine:
    """An engine that runs by itself. Every method may be called from any thread, the coroutines from any asyncio loop.

    Made by `start`. What ended is kept until it is released, within `MAX_UNCOLLECTED` and `MAX_UNCOLLECTED_SECONDS`. A coroutine
    or a stream whose loop was closed has its request given up, when it is collected or with the next request. In a process that
    was forked from the engine's, calls raise `ForkedError`.
    """

    def __init__(self, config: EngineConfig, transport: Transport, loaded: Loaded, max_state_bytes: int) -> None:
        self.config, self.model, self.kv_cache = config, loaded.facts, loaded.kv_cache
        self.created = int(time.time())  # unix seconds: when it was loaded
        self.tokenizer: Tokenizer | None = Tokenizer.of(loaded.facts)
        self._transport = transport
        self._checker = RequestChecker.of(config, loaded.facts, loaded.kv_cache, self.tokenizer)
        self._tokenisers = ThreadPoolExecutor(_NUM_TOKENISERS, thread_name_prefix="pellucid-tokeniser")
        # Structures are compiled apart: those that take seconds are waited for by other structures alone.
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="pellucid-compiler")
        self._compile_places = Semaphore(MAX_COMPILING)
        self._loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        self._book = RequestBook(
            max_state_bytes, lambda request_id: transport.send(Cancel(0, request_id, is_abandoned=True))
        )

    @classmethod
    def start(
        cls,
        config: EngineConfig,
        *,
        engine_process: bool = False,
        max_waiting: int = DEFAULT_MAX_WAITING,
        hidden_states_total_mb: int = DEFAULT_HIDDEN_STATES_TOTAL_MB,
        progress: Progress | None = None,
    ) -> AsyncLLMEngine:
        """Loads a model and returns when it takes requests; call it off the loop.

        Args:
            engine_process: the owner is a process of its own rather than a thread of this one.
            max_waiting: how many requests may wait beyond the `max_num_seqs` that run; 0 refuses what would wait for a place.
            hidden_states_total_mb: how much the hidden states and activations of all requests that are known may take together.
            progress: `progress(done, total)` is told bytes while the first start packs the weights.

        Raises:
            ConfigError, ModelNotFoundError, UnsupportedModelError, WeightFormatError: what cannot be loaded, and why.
            EngineDeadError: the engine ended while it was loading.
        """
        if isinstance(max_waiting, bool) or not isinstance(max_waiting, int) or not 0 <= max_waiting <= 10**6:
            raise ConfigError(f"max_waiting is {max_waiting!r}; it must be an integer from 0 to 1,000,000")
        total = hidden_states_total_mb
        if isinstance(total, bool) or not isinstance(total, int) or not 1 <= total <= 10**6:
            raise ConfigError(f"hidden_states_total_mb is {total!r}; it must be an integer from 1 to 1,000,000")
        transport = _transport(Start(config, max_waiting), engine_process)
        link = _Link()
        try:
            transport.start(link.deliver)
            engine = cls(config, transport, link.wait_for_model(progress), total * 1_000_000)
        except BaseException:
            transport.close()
            raise
        link.connect(engine._book.take)
        weakref.finalize(engine, transport.close)  # at exit: the core must not compute while the interpreter goes down
        return engine

    # ---- requests -------------------------------------------------------------------------------------------------

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        options: RequestOptions = NO_OPTIONS,
        stream: bool = True,
    ) -> str:
        """Queues one request and gives its id. Without `stream` its watchers get it whole, when it has ended: that is cheaper.

        Raises:
            InvalidRequestError: naming the field, the value and the limit; nothing was queued.
            QueueFullError: as many wait as may, or hidden states could take more than they may; `retry_after` says when to try again.
            EngineDrainingError, EngineDeadError: nothing more is taken.
        """
        return (await self._submit(prompt, params, request_id, options, stream)).request_id

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        options: RequestOptions = NO_OPTIONS,
    ) -> AsyncIterator[EngineCoreOutput]:
        """News of one request as it is made. Leaving early cancels it; nothing of it is kept. Raises as `submit`."""
        stream = await self._submit(prompt, params, request_id, options, True)
        stream.loop = asyncio.get_running_loop()
        left = _Left(self._book.abandon, stream)  # where the loop is gone, `finally` is never come to
        try:
            async with aclosing(self._watch(stream)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            left.now()

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        options: RequestOptions = NO_OPTIONS,
    ) -> RequestOutputDict:
        """The output of one request, of which nothing is kept. A caller who is cancelled cancels it. Raises as `submit`."""
        stream = await self._submit(prompt, params, request_id, options, False)
        stream.loop = asyncio.get_running_loop()
        try:
            return await self._wait(stream)
        finally:
            self._book.abandon(stream)

    def watch_stream(self, request_id: str) -> AsyncIterator[EngineCoreOutput]:
        """All that a request has brought so far, joined to one chunk a choice, then its news; exactly one chunk a choice has a
        finish reason. Leaving does not cancel.

        Raises:
            KeyError: the id is unknown.
            EngineDeadError: while it is read; the engine ended before the request did.
        """
        return self._watch(self._book.find(request_id))

    async def collect(self, request_id: str) -> RequestOutputDict | None:
        """The output of a request that has ended; None while it runs.

        Raises:
            KeyError: the id is unknown, or its output was dropped.
            EngineDeadError: the engine ended before the request did.
        """
        stream = self._book.find(request_id)
        if stream.error is not None:
            raise EngineDeadError(str(stream.error))
        return stream.output

    async def wait(self, request_id: str) -> RequestOutputDict:
        """The output of a request, when it has ended. Raises as `collect`."""
        return await self._wait(self._book.find(request_id))

    async def cancel(self, request_id: str) -> bool:
        """Ends a request; its blocks are free then. True also when it had ended, False when it is unknown.

        Raises:
            EngineDeadError: the engine has ended.
        """
        with self._book.lock:
            stream = self._book.streams.get(request_id)
            if stream is None or stream.output is not None:
                return stream is not None
        await self._call(lambda call: Cancel(call, request_id))
        return True

    async def is_finished(self, request_id: str) -> bool:
        """True when the request is known and has ended."""
        with self._book.lock:
            stream = self._book.streams.get(request_id)
            return stream is not None and stream.output is not None

    async def status(self, request_id: str) -> str | None:
        """Where a request stands; None when it is unknown."""
        with self._book.lock:
            stream = self._book.streams.get(request_id)
            return None if stream is None else stream.status

    async def release(self, request_id: str) -> None:
        """Forgets an ended request's output."""
        with self._book.lock:
            stream = self._book.streams.get(request_id)
            if stream is not None and stream.has_ended:
                self._book.forget(stream)

    # ---- the engine -----------------------------------------------------------------------------------------------

    async def stats(self) -> EngineStats:
        """The state of the engine between two steps, and its counters."""
        stats: EngineStats = await self._call(ReadStats)
        return stats

    async def steps(self, since: int = 0, limit: int = 256) -> list[StepRecord]:
        """The first `limit` records in memory from step `since` on, oldest first; a negative `since` counts from the newest.

        Raises:
            InvalidRequestError: `since` is no number of a step, or `limit` is not in [1, 4,096].
        """
        since, limit = integer("since", since, _STEPS), integer("limit", limit, _LIMITS)
        records: list[StepRecord] = await self._call(lambda call: ReadSteps(call, since, limit))
        return records

    async def abort_all(self) -> int:
        """Ends all requests; how many there were."""
        return int(await self._call(AbortAll))

    async def drain(self, timeout: float) -> bool:
        """Takes no new requests and waits for those that run, `timeout` seconds at most. True when all ended by then; the
        others are aborted."""
        all_ended = self._book.drain(asyncio.get_running_loop())
        if all_ended.done():
            return True
        try:
            await asyncio.wait_for(all_ended, timeout)
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
        return self._book.error is None and self._transport.is_alive

    @property
    def error(self) -> BaseException | None:
        """Why the engine is dead; None while it is not."""
        return self._book.error

    def close(self) -> None:
        """Ends the engine and frees its memory; who waits gets an error at once. Harmless when called again."""
        if self._book.is_left:
            return  # it belongs to the process that this one was forked from
        self._book.die(CLOSED)
        for pool in (self._tokenisers, self._compiler):
            pool.shutdown(wait=False, cancel_futures=True)
        self._transport.close()

    # ---- parts ----------------------------------------------------------------------------------------------------

    async def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None,
        options: RequestOptions,
        is_stream: bool,
    ) -> RequestStream:
        params = SamplingParams() if params is None else params
        check_options(request_id, options)
        self._book.refuse_when_closed()
        self._loops.add(asyncio.get_running_loop())
        self._book.give_up(looks_for_orphans=len(self._loops) > 1)
        text, token_ids, num_state_bytes = await self._tokenised(prompt, params, options)
        stream = self._book.open(request_id, params.n, num_state_bytes)
        name = stream.request_id
        try:
            await self._call(lambda call: Submit(call, name, token_ids, params, text, options, is_stream), stream)
        except BaseException:
            self._book.abandon(stream)
            raise
        return stream

    async def _tokenised(
        self, prompt: Prompt, params: SamplingParams, options: RequestOptions
    ) -> tuple[str | None, list[int], int]:
        """Checks, tokenises and compiles on threads that neither the loop nor the owner waits for."""
        loop = asyncio.get_running_loop()
        try:
            text, token_ids, num_state_bytes, is_compiled = await loop.run_in_executor(
                self._tokenisers, self._prepare, prompt, params, options
            )
            if not is_compiled:
                await self._compile(params)
            return text, token_ids, num_state_bytes
        except (asyncio.CancelledError, RuntimeError):  # closing cancels what stands in the pool's queue
            self._book.refuse_when_dead()
            raise

    def _prepare(
        self, prompt: Prompt, params: SamplingParams, options: RequestOptions
    ) -> tuple[str | None, list[int], int, bool]:
        text, token_ids = self._checker.tokenise(prompt)
        num_state_bytes = self._checker.check(token_ids, params, options).num_state_bytes
        is_compiled = self._checker.has_grammar(params)
        if is_compiled:
            self._checker.grammar(params)  # what was refused before is refused again
        return text, token_ids, num_state_bytes, is_compiled

    async def _compile(self, params: SamplingParams) -> None:
        """A caller who is cancelled leaves the queue."""
        if not self._compile_places.acquire(blocking=False):
            raise QueueFullError(f"{MAX_COMPILING} structures wait to be compiled; that is the limit", 1.0)
        try:
            await asyncio.get_running_loop().run_in_executor(self._compiler, self._checker.grammar, params)
        finally:
            self._compile_places.release()

    async def _watch(self, stream: RequestStream) -> AsyncGenerator[EngineCoreOutput, None]:
        places, num_open = [0] * stream.num_choices, stream.num_choices
        loop = asyncio.get_running_loop()
        with self._book.lock:
            stream.num_watchers += 1
        try:
            while num_open:
                with self._book.lock:
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
            with self._book.lock:
                stream.num_watchers -= 1
                stream.compact()

    async def _wait(self, stream: RequestStream) -> RequestOutputDict:
        loop = asyncio.get_running_loop()
        while True:
            with self._book.lock:
                if stream.output is not None:
                    return stream.output
                if stream.error is not None:
                    raise EngineDeadError(str(stream.error))
                ended = stream.when_changed(loop, at_end=True)
            await ended

    async def _call(self, make: Callable[[int], Command], queued: RequestStream | None = None) -> Any:
        """Sends a command and waits for its answer. `queued`: the stream of a request that it queues."""
        call, future = self._book.open_call(asyncio.get_running_loop(), queued)
        try:
            self._transport.send(make(call))
            return await future
        finally:
            self._book.close_call(call)


class _Left:
    """Gives a request up, once: when it is told to, or when it is collected."""

    def __init__(self, abandon: Callable[[RequestStream], None], stream: RequestStream) -> None:
        self._abandon, self._streams = abandon, [stream]

    def now(self) -> None:
        while self._streams:
            self._abandon(self._streams.pop())

    __del__ = now


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


def _transport(start: Start, engine_process: bool) -> Transport:
    if not engine_process:
        return ThreadTransport(start)
    from pellucid.service.process import ProcessTransport  # brings the sockets

    return ProcessTransport(start)
