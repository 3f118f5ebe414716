"""Typed errors. Each carries the value and the limit, so that a person can act on it."""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any, Literal

_MAX_SHOWN = 80
_TOO_LONG = "a number of too many digits to be shown"


def shown(value: object) -> str:
    """`value` as an error quotes it, at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of more than some thousand digits
        text = _TOO_LONG
    except Exception:  # of a class of the caller's own
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def shown_number(value: int) -> str:
    """`value` as an error tells it, with commas."""
    try:
        return f"{value:,}"
    except ValueError:
        return _TOO_LONG


def items_of(field: str, value: object, what: str, limit: int) -> list[Any]:
    """The items of a list-like value: of a list, an array, a generator.

    Raises:
        InvalidRequestError: it is a text, a mapping, or nothing that has items, or has more than `limit` of them.
    """
    try:
        if isinstance(value, (str, bytes, bytearray, memoryview, Mapping)):
            raise TypeError
        items = list(itertools.islice(value, limit + 1))  # type: ignore[call-overload]
    except TypeError:
        raise InvalidRequestError(field, "is", value, f"it must be a list of {what}") from None
    if len(items) > limit:
        count = f"{len(value):,}" if isinstance(value, Sized) else f"more than {limit:,}"
        raise InvalidRequestError(field, f"has {count} entries", limit=f"the limit is {limit:,}")
    return items


class FieldName(str):
    """A field's path within the words of an error."""

    __slots__ = ()


class Quoted(str):
    """A value that was quoted already, as by another process: it is shown as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class Absent(enum.Enum):
    """Says that an error quotes no value, for any value may be one."""

    ABSENT = 0


ABSENT = Absent.ABSENT
# A text, or texts and names of fields that follow each other.
Words = str | tuple[str, ...]


class PellucidError(Exception):
    """The root of all errors that Pellucid raises on purpose."""


# What ends a thread or a process, never one request. A panic of a library in Rust is neither of these nor an `Exception`.
EXITS = (KeyboardInterrupt, SystemExit, GeneratorExit)


def reason_of(error: BaseException) -> str:
    """What a request is told that ends because of an error."""
    text = str(error) if isinstance(error, PellucidError) else f"the request failed: {type(error).__name__}: {error}"
    return sendable(text)


def sendable(text: str) -> str:
    """A text as any encoding can carry it: what other people's code says may hold lone surrogates."""
    return text.encode(errors="backslashreplace").decode()


class InvalidRequestError(PellucidError, ValueError):
    """A request or parameter is refused before it reaches the engine.

    Its text is composed here alone: `field`, `problem`, `value`, and behind a semicolon `limit`.

    Attributes:
        field: path of the field, such as "stop[3]"; None for a request as a whole.
        problem: what is wrong with it: "is" before the value, or ": a whole sentence"; as a tuple it names the field itself.
        value: what was given, where the text quotes it.
        limit: what is allowed.
    """

    def __init__(self, field: str | None, problem: Words, value: object = ABSENT, limit: Words = "") -> None:
        super().__init__(field, problem, value, limit)
        self.field, self.problem, self.value, self.limit = field, problem, value, limit
        begin = "" if field is None or isinstance(problem, tuple) else field
        begin += " " if begin and problem[:1] != ":" else ""
        quoted = "" if value is ABSENT else f" {shown(value)}"
        self._text = begin + _spelled(problem) + quoted + (f"; {_spelled(limit)}" if limit else "")

    def __str__(self) -> str:
        return self._text

    def __reduce__(self) -> tuple[Any, ...]:
        value = self.value if self.value is ABSENT else Quoted(shown(self.value))
        return type(self), (self.field, self.problem, value, self.limit)

    @property
    def param(self) -> str | None:
        """The name of the field that `field` is a part of."""
        found = re.search(r"[^.\[\]]+", self.field or "")
        return found and found[0]

    def named(self, names: Mapping[str, str]) -> InvalidRequestError:
        """The same error where fields are called otherwise: `names` maps paths as they are here to paths as they are there."""
        field = None if self.field is None else renamed_path(self.field, names)
        return InvalidRequestError(field, _renamed(self.problem, names), self.value, _renamed(self.limit, names))


def renamed_path(path: str, names: Mapping[str, str]) -> str:
    """A path whose longest beginning that `names` has is called otherwise."""
    begins = [end for end in range(len(path), 0, -1) if path[end : end + 1] in ("", ".", "[")]
    return next((names[path[:end]] + path[end:] for end in begins if path[:end] in names), path)


def _spelled(words: Words) -> str:
    return words if isinstance(words, str) else "".join(map(str, words))


def _renamed(words: Words, names: Mapping[str, str]) -> Words:
    if isinstance(words, str):
        return words
    return tuple(FieldName(renamed_path(part, names)) if isinstance(part, FieldName) else part for part in words)


class ConfigError(PellucidError, ValueError):
    """An engine or model configuration cannot be honoured."""


class ModelNotFoundError(PellucidError, FileNotFoundError):
    """No model at this path or by this name; the text says where was looked."""


class UnsupportedModelError(PellucidError, ValueError):
    """The architecture, tensor type or tokenizer kind is not implemented; the text lists what is."""


class ForeignOperationError(UnsupportedModelError):
    """A module uses an operation outside `pellucid.ops`: it cannot become a program, and runs eagerly. The text names the operation."""


class WeightFormatError(PellucidError, ValueError):
    """A weight file contradicts its format (truncated, overlapping, overflowing, wrong types)."""


class DamagedFileError(WeightFormatError):
    """A packed file is not as it was written; the text names the file, the block of 1 MiB and where it begins."""


class StorageError(PellucidError, OSError):
    """A file or folder could not be written; the text names it, and where room was missing how much is needed and free."""


class TokenizerError(PellucidError, ValueError):
    """A vocabulary, tokenizer file or chat template cannot be used."""


class TraceError(PellucidError, ValueError):
    """A trace cannot be read or run again: the text names the file, the line and what is wrong."""


class DownloadError(PellucidError, OSError):
    """A model could not be fetched; the text says whether the network, the checksum or the disk failed."""


ErrorItem = Literal["token", "sequence", "logit_row", "sample_row"]


class NativeError(PellucidError, RuntimeError):
    """The native core refused a call. `status` is the pld_status. Where the call would have been good without one token,
    sequence or row of it, `item` says which of them, and `index` its place in the caller's arrays."""

    def __init__(self, message: str, status: int, item: ErrorItem | None = None, index: int = -1) -> None:
        super().__init__(message)
        self.status, self.item, self.index = status, item, index


class RowError(PellucidError, RuntimeError):
    """A batch cannot be computed because of one of its rows, which stand for its tokens."""

    def __init__(self, message: str, row: int = -1) -> None:
        super().__init__(message)
        self.row = row


class ActivationsError(PellucidError, RuntimeError):
    """A batch cannot be computed because activations of these names cannot be kept, or added to."""

    def __init__(self, message: str, names: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.names = frozenset(names)


class RequestFailedError(PellucidError, RuntimeError):
    """The engine ended a request before its output was whole; the text says why."""


class QueueFullError(PellucidError, RuntimeError):
    """As many requests wait as may. `retry_after` is the number of seconds after which trying again makes sense."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineDrainingError(PellucidError, RuntimeError):
    """The engine ends what it has and takes no new requests."""


class EngineDeadError(PellucidError, RuntimeError):
    """The engine was closed or its owner failed; nothing more can be submitted."""


class ForkedError(EngineDeadError):
    """The process was forked from the one that loaded the model, and has none of its threads."""


class WrongThreadError(PellucidError, RuntimeError):
    """An object that is for one thread at a time was used by another: the text names both. Nothing was done."""


class InvariantError(PellucidError, RuntimeError):
    """A self-check of the engine failed: a bug in Pellucid, never the caller's fault."""


_OF_FILES = (ConfigError, ModelNotFoundError, UnsupportedModelError, WeightFormatError, TokenizerError, TraceError)


@contextmanager
def about(origin: str) -> Iterator[None]:
    """Puts the name of a file or a model before the text of an error that a file caused, unless it stands there already."""
    try:
        yield
    except _OF_FILES as error:
        if origin in str(error):
            raise
        raise type(error)(f"{origin}: {error}") from error
