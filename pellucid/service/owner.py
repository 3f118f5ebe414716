"""`EngineOwner`: the one thread that touches an `LLMEngine`. Commands in through a queue, events out, never waiting for readers."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from pellucid.engine.engine import LLMEngine, StepOutputs
from pellucid.engine.factory import load_engine
from pellucid.errors import DamagedFileError, EngineDeadError, InvalidRequestError, PellucidError, QueueFullError
from pellucid.service.compiling import Compiling
from pellucid.service.inbox import Compiled, Failed, Inbox, Word
from pellucid.service.messages import (
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
    News,
    ReadStats,
    ReadSteps,
    Refused,
    ResetPrefixCache,
    Shutdown,
    Start,
    Stats,
    Steps,
    Submit,
)
from pellucid.trace.records import StepRecord

Emit = Callable[[Sequence[Event]], None]

_log = logging.getLogger(__name__)
# `retry_after` is between these, in seconds, and is made from the times of this many endings.
_RETRY_BOUNDS = (1.0, 60.0)
_NUM_ENDINGS = 64


class EngineOwner:
    """Loads an engine and runs it until it is told to shut down, or fails.

    Between two steps it carries out the commands that have come; with nothing to compute it sleeps until one comes. Its last
    event is `Died` or `LoadFailed`.
    """

    def __init__(self, start: Start, inbox: Inbox, emit: Emit) -> None:
        self.engine: LLMEngine | None = None
        self._start, self._inbox, self._emit = start, inbox, emit
        self._is_open = True
        self._endings: deque[float] = deque(maxlen=_NUM_ENDINGS)
        self._compiling = Compiling(inbox)
        self._handlers: dict[type[Any], Callable[[LLMEngine, Any], Iterable[Event]]] = {
            Submit: self._submit,
            Compiled: self._compiled,
            Cancel: self._cancel,
            AbortAll: self._abort_all,
            ReadStats: lambda engine, command: [Stats(command.call, engine.stats())],
            ReadSteps: lambda engine, command: [Steps(command.call, _records(engine, command))],
            ResetPrefixCache: self._reset_prefix_cache,
            Shutdown: self._shutdown,
            Failed: self._failed,
        }

    def run(self) -> None:
        """Until the end. Raises nothing."""
        try:
            self.engine = load_engine(
                self._start.config,
                lambda done, total: self._emit([LoadProgress(done, total)]),
                lambda error: self._inbox.put(Failed(error)),
            )
        except BaseException as error:
            self._emit([LoadFailed(ErrorInfo.of(error))])
            return
        self._emit([Loaded(self.engine.executor.facts, self.engine.executor.kv_cache)])
        last = Died(CLOSED)
        try:
            while self._is_open:
                self._turn(self.engine)
        except (DamagedFileError, EngineDeadError) as error:  # the log has it
            last = Died(ErrorInfo.of(error))
        except BaseException as error:
            _log.critical("the engine's owner failed", exc_info=error)
            last = Died(ErrorInfo.of(error))
        self._emit([last])
        self._free(self.engine)

    def _turn(self, engine: LLMEngine) -> None:
        """Commands, then one step."""
        events: list[Event] = []
        if not engine.has_unfinished:
            events += self._handle(engine, self._inbox.get())
        for _ in range(self._inbox.qsize()):
            events += self._handle(engine, self._inbox.get())
        if events:
            self._emit(events)
        if self._is_open and engine.has_unfinished:
            news = self._news(engine, engine.step())
            if news:
                self._emit(news)

    def _handle(self, engine: LLMEngine, command: Word) -> Iterable[Event]:
        return self._handlers[type(command)](engine, command)

    def _news(self, engine: LLMEngine, outputs: StepOutputs) -> list[Event]:
        moved = {state.request_id: state.status for state in engine.output.take_moved()}
        if not (moved or outputs.chunks or outputs.finished):
            return []
        if outputs.finished:
            self._endings.extend([time.monotonic()] * len(outputs.finished))
        return [News(outputs.chunks, outputs.finished, moved)]

    def _free(self, engine: LLMEngine) -> None:
        self._compiling.close()
        try:
            engine.close()
        except Exception as error:
            _log.error("the engine could not be freed", exc_info=error)

    # ---- commands -------------------------------------------------------------------------------------------------

    def _submit(self, engine: LLMEngine, command: Submit) -> Iterable[Event]:
        if engine.checker.has_grammar(command.params):
            return self._add(engine, command)
        self._compiling.put(command, partial(engine.checker.grammar, command.params))
        return []

    def _compiled(self, engine: LLMEngine, compiled: Compiled) -> Iterable[Event]:
        return self._add(engine, compiled.submit) if self._compiling.take(compiled) else []

    def _add(self, engine: LLMEngine, command: Submit) -> Iterable[Event]:
        try:
            self._refuse_when_full(engine)
            engine.add_request(
                command.prompt_token_ids,
                command.params,
                request_id=command.request_id,
                options=command.options,
                stream=command.stream,
                prompt_text=command.prompt,
            )
        except Exception as error:
            if not isinstance(error, PellucidError):  # a bug, but nothing was queued: no reason to end all others
                _log.error("request %r could not be added", command.request_id, exc_info=error)
            return [Refused(command.call, ErrorInfo.of(error))]
        return [Done(command.call)]

    def _refuse_when_full(self, engine: LLMEngine) -> None:
        scheduler, limit = engine.scheduler, self._start.max_waiting
        num_beyond = scheduler.num_running + scheduler.num_waiting - scheduler.config.max_num_seqs
        if num_beyond >= limit:
            raise QueueFullError(
                f"{scheduler.num_running:,} requests run and {scheduler.num_waiting:,} wait; beyond max_num_seqs "
                f"{scheduler.config.max_num_seqs:,} at most max_waiting {limit:,} may",
                self._retry_after(),
            )

    def _retry_after(self) -> float:
        """Seconds in which half of the queue will have ended, as fast as requests ended lately."""
        low, high = _RETRY_BOUNDS
        if len(self._endings) < 2:
            return low
        rate = len(self._endings) / max(1e-3, time.monotonic() - self._endings[0])
        return min(high, max(low, self._start.max_waiting / 2 / rate))

    def _cancel(self, engine: LLMEngine, command: Cancel) -> Iterable[Event]:
        dropped = self._dropped(command.request_id)
        is_known = engine.cancel(command.request_id) or bool(dropped)
        ended = engine.take_ended()
        if command.is_abandoned:  # an answer may be large, and is not made for nobody
            ended = ended.without(command.request_id)
        return [*dropped, *self._news(engine, ended), Done(command.call, int(is_known))]

    def _abort_all(self, engine: LLMEngine, command: AbortAll) -> Iterable[Event]:
        ids = list(engine.output.requests)
        for request_id in ids:
            engine.cancel(request_id)
        dropped = self._dropped()
        return [*dropped, *self._news(engine, engine.take_ended()), Done(command.call, len(ids) + len(dropped))]

    def _dropped(self, request_id: str | None = None) -> list[Event]:
        """Refuses what is not queued yet."""
        error = ErrorInfo.of(InvalidRequestError("request_id", ("the request was cancelled before it was queued",)))
        return [Refused(submit.call, error) for submit in self._compiling.drop(request_id)]

    @staticmethod
    def _reset_prefix_cache(engine: LLMEngine, command: ResetPrefixCache) -> Iterable[Event]:
        return [Done(command.call, int(engine.reset_prefix_cache()))]

    @staticmethod
    def _failed(engine: LLMEngine, failed: Failed) -> Iterable[Event]:
        raise failed.error

    def _shutdown(self, engine: LLMEngine, command: Shutdown) -> Iterable[Event]:
        self._is_open = False
        return []


def _records(engine: LLMEngine, command: ReadSteps) -> list[StepRecord]:
    records = engine.trace.records
    if command.since < 0:
        records = records[command.since :]
    else:
        records = [record for record in records if record.step >= command.since]
    return records[: command.limit]
