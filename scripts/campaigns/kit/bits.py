"""An output as bits: what may never depend on the schedule, in a form that is small and can be compared exactly."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from kit.findings import signature_of
from pellucid.api.outputs import CompletionOutput, Logprob, RequestOutput

Row = dict[int, Logprob]


@dataclass(frozen=True)
class ChoiceBits:
    """One choice. Values are kept as digests of their bytes: equal digests are equal bits, NaN included."""

    token_ids: tuple[int, ...]
    logprobs: tuple[bytes, ...] | None  # a digest for each token: candidates, values, ranks
    ending: tuple[Any, ...]  # finish reason, stop reason, error, seed
    text: str
    hidden_states: bytes | None
    captured: bytes | None
    shown: tuple[float, ...] = ()  # the chosen tokens' values, for people


@dataclass(frozen=True)
class OutputBits:
    """A request."""

    choices: tuple[ChoiceBits, ...]
    prompt_logprobs: bytes | None

    @classmethod
    def of(cls, output: RequestOutput) -> OutputBits:
        """The bits of an output."""
        prompt_rows = output.prompt_logprobs
        return cls(
            tuple(_choice(choice) for choice in output.outputs),
            None if prompt_rows is None else _digest(map(_row, prompt_rows)),
        )


def difference(found: OutputBits, expected: OutputBits) -> tuple[str, str] | None:
    """(what differs, in which way); None where all bits are equal."""
    if len(found.choices) != len(expected.choices):
        return "number of choices", f"{len(found.choices)} instead of {len(expected.choices)}"
    for index, (one, other) in enumerate(zip(found.choices, expected.choices, strict=True)):
        told = _choice_difference(one, other)
        if told is not None:
            return told[0], f"choice {index}: {told[1]}"
    if found.prompt_logprobs != expected.prompt_logprobs:
        return "prompt_logprobs differ", "digests of prompt_logprobs differ"
    return None


def begins_like(found: OutputBits, expected: OutputBits) -> tuple[str, str] | None:
    """As `difference`, of a request that was ended early: what it brought must be how the whole one begins."""
    for index, (one, other) in enumerate(zip(found.choices, expected.choices, strict=True)):
        count = len(one.token_ids)
        if one.token_ids != other.token_ids[:count]:
            return "tokens differ", f"choice {index}, cancelled: {_first(one, other)}"
        if one.logprobs is not None and one.logprobs != (other.logprobs or ())[:count]:
            return "logprobs differ", f"choice {index}, cancelled: {_first(one, other)}"
    return None


def _choice_difference(found: ChoiceBits, expected: ChoiceBits) -> tuple[str, str] | None:
    if found.ending[2] != expected.ending[2]:
        return (
            f"error: {signature_of(str(found.ending[2]))}",
            f"ended with {found.ending}, alone with {expected.ending}",
        )
    if found.token_ids != expected.token_ids:
        return "tokens differ", _first(found, expected)
    if found.logprobs != expected.logprobs:
        return "logprobs differ", _first(found, expected)
    for name in ("ending", "text", "hidden_states", "captured"):
        one, other = getattr(found, name), getattr(expected, name)
        if one != other:
            return f"{name} differ", f"{_shown(one)} instead of {_shown(other)}"
    return None


def _shown(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else repr(value)


def _first(found: ChoiceBits, expected: ChoiceBits) -> str:
    """The first token whose id or log-probability differs."""
    pairs = zip(_columns(found), _columns(expected), strict=False)
    for index, (one, other) in enumerate(pairs):
        if one[:2] != other[:2]:
            return f"token {index} is {one[0]} at {one[2]!r}, alone {other[0]} at {other[2]!r}"
    return f"{len(found.token_ids)} tokens, alone {len(expected.token_ids)}"


def _columns(choice: ChoiceBits) -> list[tuple[Any, ...]]:
    count = len(choice.token_ids)
    rows = choice.logprobs or (None,) * count
    return list(zip(choice.token_ids, rows, choice.shown or (None,) * count, strict=False))


def _choice(choice: CompletionOutput) -> ChoiceBits:
    rows = choice.logprobs
    values = (
        () if rows is None else tuple(row[token].logprob for row, token in zip(rows, choice.token_ids, strict=True))
    )
    return ChoiceBits(
        tuple(choice.token_ids),
        None if rows is None else tuple(_digest([_row(row)]) for row in rows),
        (choice.finish_reason, choice.stop_reason, choice.error, choice.seed),
        choice.text,
        _arrays({"": choice.hidden_states}, choice.hidden_states_positions),
        _arrays(choice.captured, None),
        values,
    )


def _row(row: Row | None) -> bytes:
    """Order, ids, values and ranks of the candidates of one position."""
    if row is None:
        return b"-"
    return b"".join(struct.pack("<qdq", token, entry.logprob, entry.rank or 0) for token, entry in row.items())


def _arrays(arrays: dict[str, Any] | None, positions: list[int] | None) -> bytes | None:
    if arrays is None or all(values is None for values in arrays.values()):
        return None
    parts = [repr(positions).encode()]
    for name, values in sorted(arrays.items()):
        rows = np.ascontiguousarray(values)
        parts += [f"{name}{rows.shape}{rows.dtype}".encode(), rows.tobytes()]
    return _digest(parts)


def _digest(parts: Iterable[bytes]) -> bytes:
    found = blake2b(digest_size=12)
    for part in parts:
        found.update(len(part).to_bytes(4, "little") + part)
    return found.digest()
