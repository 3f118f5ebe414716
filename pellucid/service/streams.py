"""Where readers find what the owner of an engine made: a log a request, and futures that are settled one loop at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pellucid.api.outputs import EngineCoreOutput, RequestOutput, RequestOutputDict


class Wakes:
    """Futures to settle, handed over with one call a loop, whatever their number."""

    def __init__(self) -> None:
        self._of_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}

    def add(self, future: asyncio.Future[Any], result: Any = None) -> None:
        """Settles a future with a result, or with an error where the result is one."""
        self._of_loop.setdefault(future.get_loop(), []).append((future, result))

    def send(self) -> None:
        """Hands them over. A loop that is closed has nobody left who waits."""
        for loop, settled in self._of_loop.items():
            try:
                loop.call_soon_threadsafe(_settle, settled)
            except RuntimeError:
                continue


def _settle(settled: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, result in settled:
        if future.done():
            continue
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)


class RequestStream:
    """What came of one request so far. Guarded by its engine's lock.

    Chunks are kept as they came, so that a watcher who comes late has them all; they take as much memory as the request has
    tokens. A watcher is a place in each choice's log, and what lies between its place and the end is read as one chunk.
    """

    def __init__(self, request_id: str, num_choices: int, num_state_bytes: int = 0) -> None:
        self.num_state_bytes = num_state_bytes  # that its hidden states and activations may take
        self.request_id = request_id
        self.status = "waiting"
        self.is_queued = False  # the owner has it: what comes under its name is its own
        self.output: RequestOutputDict | None = None
        self.error: BaseException | None = None
        self.num_watchers = 0
        self.loop: asyncio.AbstractEventLoop | None = (
            None  # on which its one reader runs, where nobody else may read it
        )
        self._logs: list[list[EngineCoreOutput]] = [[] for _ in range(num_choices)]
        self._waiting_for_news: list[asyncio.Future[None]] = []
        self._waiting_for_end: list[asyncio.Future[None]] = []

    @property
    def num_choices(self) -> int:
        return len(self._logs)

    @property
    def has_ended(self) -> bool:
        """True when nothing more comes."""
        return self.output is not None or self.error is not None

    @property
    def is_orphan(self) -> bool:
        """True when its one reader can never read it: the loop was closed under it."""
        return self.loop is not None and self.loop.is_closed() and not self.has_ended

    def read(self, places: list[int]) -> list[EngineCoreOutput]:
        """News behind a watcher's places, one chunk a choice; moves the places."""
        chunks = []
        for index, log in enumerate(self._logs):
            if places[index] < len(log):
                chunks.append(join_chunks(log[places[index] :]))
                places[index] = len(log)
        return chunks

    def when_changed(self, loop: asyncio.AbstractEventLoop, *, at_end: bool = False) -> asyncio.Future[None]:
        """Settled when something new is there to read; with `at_end` only when the request has ended."""
        waiting = self._waiting_for_end if at_end else self._waiting_for_news
        waiting[:] = [other for other in waiting if not other.done()]  # those who gave up waiting
        waiting.append(loop.create_future())
        return waiting[-1]

    # ---- for the one that has news -------------------------------------------------------------------------------

    def add(self, chunk: EngineCoreOutput, wakes: Wakes) -> None:
        """Takes a chunk in."""
        self._logs[chunk.index].append(chunk)
        self._wake(self._waiting_for_news, wakes)

    def end(self, output: RequestOutput, wakes: Wakes) -> None:
        """The request has ended, all its chunks have come. Without chunks, its output is one for each choice."""
        self.output, self.status = RequestOutputDict.of(output), output.status
        for choice, log in zip(output.outputs, self._logs, strict=True):
            if not log:
                log.append(
                    EngineCoreOutput(
                        self.request_id,
                        choice.index,
                        choice.text,
                        choice.token_ids,
                        choice.logprobs,
                        choice.finish_reason,
                        choice.stop_reason,
                        choice.error,
                        choice.hidden_states,
                        choice.hidden_states_positions,
                        choice.captured,
                    )
                )
        self.compact()
        self._wake(self._waiting_for_news, wakes)
        self._wake(self._waiting_for_end, wakes)

    def fail(self, error: BaseException, wakes: Wakes) -> None:
        """Nothing more will come."""
        self.error = error
        self._wake(self._waiting_for_news, wakes)
        self._wake(self._waiting_for_end, wakes)

    def compact(self) -> None:
        """Joins what is kept of an ended request that nobody reads."""
        if self.output is not None and not self.num_watchers:
            self._logs = [[join_chunks(log)] for log in self._logs]

    @staticmethod
    def _wake(waiting: list[asyncio.Future[None]], wakes: Wakes) -> None:
        for future in waiting:
            wakes.add(future)
        waiting.clear()


def join_chunks(chunks: Sequence[EngineCoreOutput]) -> EngineCoreOutput:
    """Consecutive chunks of one choice as one."""
    last = chunks[-1]
    if len(chunks) == 1:
        return last
    logprobs = None if last.logprobs is None else [entry for chunk in chunks for entry in chunk.logprobs or ()]
    return EngineCoreOutput(
        last.request_id,
        last.index,
        "".join([chunk.text for chunk in chunks]),
        [token for chunk in chunks for token in chunk.token_ids],
        logprobs,
        last.finish_reason,
        last.stop_reason,
        last.error,
        _joined_states(chunks),
        last.hidden_states_positions,
        last.captured,
    )


def _joined_states(chunks: Sequence[EngineCoreOutput]) -> npt.NDArray[np.float32] | None:
    """Rows of several chunks one behind the other; those of the last alone stay as they are."""
    found = [chunk.hidden_states for chunk in chunks if chunk.hidden_states is not None]
    return np.concatenate(found) if len(found) > 1 else found[0] if found else None
