"""What the front end and the owner of an engine say to each other: typed, plain data, the same in a process and across two.

A command that wants an answer has a `call` number, and the answer names it; 0 asks for none.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from pellucid import errors
from pellucid.api.outputs import EngineCoreOutput, RequestOutput
from pellucid.api.request_options import NO_OPTIONS, RequestOptions
from pellucid.api.sampling_params import SamplingParams
from pellucid.config import EngineConfig
from pellucid.contract.executor import KVCacheSize
from pellucid.contract.facts import ModelFacts
from pellucid.engine.metrics import EngineStats
from pellucid.errors import (
    ABSENT,
    EngineDeadError,
    FieldName,
    InvalidRequestError,
    NativeError,
    PellucidError,
    QueueFullError,
    Quoted,
    Words,
    sendable,
    shown,
)
from pellucid.trace.records import StepRecord

_Words = str | list[tuple[bool, str]]  # whether it is a field's name, and the text


class Refusal(msgspec.Struct, frozen=True):
    """What an `InvalidRequestError` is made of; its value as it is shown."""

    field: str | None
    problem: _Words
    value: str | None
    limit: _Words

    @classmethod
    def of(cls, error: InvalidRequestError) -> Refusal:
        """The data of an error."""
        value = None if error.value is ABSENT else sendable(shown(error.value))
        field = None if error.field is None else sendable(error.field)
        return cls(field, _sent(error.problem), value, _sent(error.limit))

    def to_error(self) -> InvalidRequestError:
        """The error again."""
        value = ABSENT if self.value is None else Quoted(self.value)
        return InvalidRequestError(self.field, _received(self.problem), value, _received(self.limit))


def _sent(words: Words) -> _Words:
    if isinstance(words, str):
        return sendable(words)
    return [(isinstance(part, FieldName), sendable(part)) for part in words]


def _received(words: _Words) -> Words:
    return words if isinstance(words, str) else tuple(FieldName(part) if is_name else part for is_name, part in words)


class ErrorInfo(msgspec.Struct, frozen=True):
    """An error as data: the name of its class, its text, and what else the class carries."""

    kind: str
    text: str
    refusal: Refusal | None = None
    retry_after: float = 0.0
    status: int = 0

    @classmethod
    def of(cls, error: BaseException) -> ErrorInfo:
        """The data of an error."""
        return cls(
            type(error).__name__,
            str(error),
            Refusal.of(error) if isinstance(error, InvalidRequestError) else None,
            getattr(error, "retry_after", 0.0),
            getattr(error, "status", 0) if isinstance(error, NativeError) else 0,
        )

    def to_error(self) -> PellucidError:
        """The error again. One that is not Pellucid's own becomes a `PellucidError` that names its class."""
        kind = _ERRORS.get(self.kind)
        if kind is None:
            return PellucidError(f"{self.kind}: {self.text}" if self.text else self.kind)
        if self.refusal is not None:
            return self.refusal.to_error()
        if kind is QueueFullError:
            return QueueFullError(self.text, self.retry_after)
        if kind is NativeError:
            return NativeError(self.text, self.status)
        return kind(self.text)


_ERRORS: Mapping[str, type[PellucidError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, PellucidError)
}

# ---- to the owner -----------------------------------------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Queue a request -> `Done` or `Refused`. `prompt` is the text that the ids were made from."""

    call: int
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt: str | None = None
    options: RequestOptions = NO_OPTIONS
    stream: bool = True


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End a request -> `Done(is known)`, after the news of its end; with `is_abandoned` there are none, for nobody reads them."""

    call: int
    request_id: str
    is_abandoned: bool = False


class AbortAll(msgspec.Struct, frozen=True, tag=True):
    """End all requests -> `Done(their number)`, after the news of their ends."""

    call: int


class ReadStats(msgspec.Struct, frozen=True, tag=True):
    """-> `Stats`."""

    call: int


class ReadSteps(msgspec.Struct, frozen=True, tag=True):
    """-> `Steps`: the first `limit` records from step `since` on; a negative `since` counts from the newest."""

    call: int
    since: int
    limit: int


class ResetPrefixCache(msgspec.Struct, frozen=True, tag=True):
    """Forget cached blocks -> `Done(it was possible)`."""

    call: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the owner; requests that run are dropped without news."""


Command = Submit | Cancel | AbortAll | ReadStats | ReadSteps | ResetPrefixCache | Shutdown

# ---- from the owner ---------------------------------------------------------------------------------------------------


class LoadProgress(msgspec.Struct, frozen=True, tag=True):
    """Bytes packed so far, and in all."""

    done: int
    total: int


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The engine takes commands."""

    facts: ModelFacts
    kv_cache: KVCacheSize


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine never came to be."""

    error: ErrorInfo


class Done(msgspec.Struct, frozen=True, tag=True):
    """The answer of a command that gives a number or a truth."""

    call: int
    value: int = 1


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The command did nothing."""

    call: int
    error: ErrorInfo


class Stats(msgspec.Struct, frozen=True, tag=True):
    """The answer of `ReadStats`."""

    call: int
    stats: EngineStats


class Steps(msgspec.Struct, frozen=True, tag=True):
    """The answer of `ReadSteps`."""

    call: int
    records: list[StepRecord]


class News(msgspec.Struct, frozen=True, tag=True):
    """What one step brought: chunks, requests that ended, and request id -> status where that changed."""

    chunks: list[EngineCoreOutput]
    finished: list[RequestOutput]
    statuses: dict[str, str]


class Died(msgspec.Struct, frozen=True, tag=True):
    """The owner has ended; nothing comes after this."""

    error: ErrorInfo


Event = LoadProgress | Loaded | LoadFailed | Done | Refused | Stats | Steps | News | Died


class Start(msgspec.Struct, frozen=True):
    """What an owner begins with. `max_waiting`: requests that may wait beyond those that `max_num_seqs` lets run."""

    config: EngineConfig
    max_waiting: int


CLOSED = ErrorInfo(EngineDeadError.__name__, "the engine is closed")
