"""One generation request, whatever its API: prompts in, news of each choice and whole outputs out. All endpoints share it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from types import TracebackType

from pellucid.api.outputs import EngineCoreOutput, RequestOutput
from pellucid.errors import PellucidError, RequestFailedError
from pellucid.server.generate.job import Job
from pellucid.server.http.errors import RequestTimeoutError
from pellucid.server.http.logs import generation_fields, log_generation
from pellucid.server.http.metrics import Metrics
from pellucid.service.async_engine import AsyncLLMEngine

# Deltas of several prompts that wait for a slow reader; the engine coalesces behind them.
_MERGE_LIMIT = 16


@dataclass(frozen=True)
class Usage:
    """Tokens of a whole job."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def to_dict(self) -> dict[str, object]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Generator:
    """Submits jobs to the engine and knows those that run."""

    def __init__(self, engine: AsyncLLMEngine, metrics: Metrics, request_timeout: float | None = None) -> None:
        self.engine, self.metrics, self.request_timeout = engine, metrics, request_timeout
        self._running: dict[str, Generation] = {}

    async def submit(self, job: Job) -> Generation:
        """Queues all prompts of a job, or none.

        Raises:
            InvalidRequestError, QueueFullError, EngineDrainingError, EngineDeadError: as the engine says.
        """
        generation = Generation(self, job)
        self._running[job.request_id] = generation
        self.metrics.observe_params(job.params)
        try:
            await generation.submit()
        except BaseException:
            await generation.close()
            raise
        return generation

    def is_running(self, request_id: str) -> bool:
        """True while a job of this name runs."""
        return request_id in self._running

    async def cancel(self, request_id: str) -> bool:
        """Ends a job; its caller gets what there is. True also when it had ended, False when it is unknown."""
        generation = self._running.get(request_id)
        if generation is None:
            return await self.engine.cancel(request_id)
        for engine_id in generation.job.engine_ids:
            await self.engine.cancel(engine_id)
        return True

    def forget(self, generation: Generation) -> None:
        """A generation has closed."""
        if self._running.get(generation.job.request_id) is generation:
            del self._running[generation.job.request_id]


class Generation:
    """A job that was submitted. `async with generation:` cancels what still runs when the block is left.

    Read either `deltas()`, once, or `wait()`; behind them `outputs` has the whole output of each prompt.
    """

    def __init__(self, generator: Generator, job: Job) -> None:
        self.job = job
        self.outputs: list[RequestOutput] = []
        self.fields: dict[str, object] = {}  # for logs and spans, once it has closed
        self._generator, self._engine = generator, generator.engine
        self._submitted: list[str] = []
        self._num_tokens = 0
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None  # of a request that took too long

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def submit(self) -> None:
        """Queues every prompt."""
        job = self.job
        for engine_id, prompt, options in zip(job.engine_ids, job.prompts, job.options, strict=True):
            await self._engine.submit(prompt, job.params, request_id=engine_id, options=options, stream=job.stream)
            self._submitted.append(engine_id)
        timeout = self._generator.request_timeout
        if timeout is not None:
            left = max(0.0, timeout - (time.perf_counter() - job.arrived))
            self._timer = asyncio.get_running_loop().call_later(left, self._time_out)

    async def wait(self) -> list[RequestOutput]:
        """The output of each prompt, when all have ended.

        Raises:
            RequestFailedError: a choice ended with an error.
            RequestTimeoutError: it took longer than the server allows.
            EngineDeadError: the engine died.
        """
        for engine_id in self._submitted:
            await self._engine.wait(engine_id)
        return await self._finish()

    async def deltas(self) -> AsyncIterator[EngineCoreOutput]:
        """News in the order in which they come; raises as `wait`."""
        async for delta in self._merged():
            self._num_tokens += len(delta.token_ids)
            if delta.finish_reason == "error":
                await self._finish()
            yield delta
        await self._finish()

    @property
    def usage(self) -> Usage:
        """Tokens so far; exact at the end."""
        if self.outputs:
            return Usage(
                sum(len(output.prompt_token_ids) for output in self.outputs),
                sum(output.usage["completion_tokens"] for output in self.outputs),
                sum(output.num_cached_tokens for output in self.outputs),
            )
        return Usage(sum(map(len, self.job.prompts)), self._num_tokens)

    async def close(self) -> None:
        """Cancels what still runs and forgets the rest, also while the caller is being cancelled."""
        if not self._closed:
            self._closed = True
            await asyncio.shield(self._close())

    async def _close(self) -> None:
        self._generator.forget(self)
        self.fields = generation_fields(self.job, self.outputs)
        log_generation(self.fields)
        if self._timer is not None:
            self._timer.cancel()
        if not self.outputs:
            await self._cancel()
        for engine_id in self._submitted:
            with contextlib.suppress(PellucidError, KeyError):
                await self._engine.release(engine_id)

    async def _cancel(self) -> None:
        for engine_id in self._submitted:
            with contextlib.suppress(PellucidError, KeyError):
                await self._engine.cancel(engine_id)

    def _time_out(self) -> None:
        self._ending = asyncio.ensure_future(self._cancel())

    async def _finish(self) -> list[RequestOutput]:
        outputs: list[RequestOutput] = [await self._engine.wait(engine_id) for engine_id in self._submitted]
        self.outputs = outputs
        if self._ending is not None:
            raise RequestTimeoutError(f"the request took longer than {self._generator.request_timeout:g} seconds")
        errors = [choice.error for output in outputs for choice in output.outputs if choice.finish_reason == "error"]
        if errors:
            raise RequestFailedError(errors[0] or "the engine could not process the request")
        return outputs

    async def _merged(self) -> AsyncIterator[EngineCoreOutput]:
        if len(self._submitted) == 1:
            async for chunk in self._engine.watch_stream(self._submitted[0]):
                yield chunk
            return
        queue: asyncio.Queue[EngineCoreOutput | BaseException | None] = asyncio.Queue(_MERGE_LIMIT)
        pumps = [asyncio.ensure_future(self._pump(number, queue)) for number in range(len(self._submitted))]
        try:
            left = len(pumps)
            while left:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, number: int, queue: asyncio.Queue[EngineCoreOutput | BaseException | None]) -> None:
        try:
            async for chunk in self._engine.watch_stream(self._submitted[number]):
                first = number * self.job.params.n
                await queue.put(replace(chunk, index=first + chunk.index) if first else chunk)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)
