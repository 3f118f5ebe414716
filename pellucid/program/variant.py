"""A program that also keeps activations by name: the same ops on the same weights, with longer lives for some buffers.

What is kept is planned anew from the tables of the program file, so no model code is needed. An activation that is the sum of
two terms (the residual stream, whose addition the next norm does) gets an `add` of its own behind the later of them: the same
addition, so the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pellucid.errors import InvalidRequestError, WeightFormatError
from pellucid.ops import abi
from pellucid.ops.spec import OP_KINDS
from pellucid.program.file import ProgramFile
from pellucid.program.planner import Uses, assign_slots

_MAX_TERMS = 2


@dataclass(frozen=True)
class KeptColumns:
    """Where an activation stands after a run."""

    buffer: int
    column: int
    width: int


@dataclass(frozen=True)
class Variant:
    """Tables for the core, and where it keeps what was asked for."""

    ops: abi.AnyArray
    buffers: abi.AnyArray
    n_forward_ops: int
    places: dict[str, KeptColumns]

    @property
    def kept(self) -> list[int]:
        """The buffers that outlive a run."""
        return sorted({place.buffer for place in self.places.values()})


def activation_widths(file: ProgramFile) -> dict[str, int]:
    """The names that can be asked for, in the order in which they are computed, and the width of each."""
    try:
        return {str(name): int(terms[0][2]) for name, terms in file.meta["activations"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise WeightFormatError(f"{file.path.name}: the names of activations are damaged: {error}") from None


def keeping(file: ProgramFile, names: Sequence[str]) -> Variant:
    """The program with `names` kept.

    Raises:
        InvalidRequestError: the model has no activation of that name.
        WeightFormatError: the file's tables are damaged.
    """
    known = activation_widths(file)
    for name in names:
        if name not in known:
            raise InvalidRequestError(f"capture names {name!r}; the model has no such activation", "capture")
    tables = _Tables(file)
    places = {name: tables.keep([tuple(map(int, term)) for term in file.meta["activations"][name]]) for name in names}
    return tables.variant(places)


class _Tables:
    """A program's tables while sums are added to them."""

    def __init__(self, file: ProgramFile) -> None:
        self._ops = list(file.sections["ops"].view(abi.OP_DTYPE))
        self._buffers = list(file.sections["buffers"].view(abi.BUFFER_DTYPE))
        self._meta, self._name = file.meta, file.path.name
        self._num_forward = int(file.meta["n_forward_ops"])

    def keep(self, terms: list[tuple[int, ...]]) -> KeptColumns:
        if not 1 <= len(terms) <= _MAX_TERMS or any(not 0 <= buffer < len(self._buffers) for buffer, _, _ in terms):
            raise WeightFormatError(f"{self._name}: an activation lies in no buffer")
        if len(terms) == 1:
            return KeptColumns(*terms[0])
        width = terms[0][2]
        target = len(self._buffers)
        buffer = np.zeros((), abi.BUFFER_DTYPE)
        buffer["width"], buffer["domain"] = width, self._buffers[terms[0][0]]["domain"]
        self._buffers.append(buffer[()])
        self._ops.insert(self._behind(terms), _add(terms, target, width))
        self._num_forward += 1
        return KeptColumns(target, 0, width)

    def _behind(self, terms: list[tuple[int, ...]]) -> int:
        """The place behind the last op that writes one of the terms."""
        wanted = {buffer for buffer, _, _ in terms}
        writers = [index for index, op in enumerate(self._ops) if wanted & set(op["out"].tolist())]
        return writers[-1] + 1

    def variant(self, places: dict[str, KeptColumns]) -> Variant:
        ops, buffers = np.array(self._ops, abi.OP_DTYPE), np.array(self._buffers, abi.BUFFER_DTYPE)
        outlive = {place.buffer for place in places.values()} | {self._meta["hidden"], self._meta["logits"]}
        reads = [[buffer for buffer in row if buffer >= 0] for row in ops["in"].tolist()]
        writes = [[buffer for buffer in row if buffer >= 0] for row in ops["out"].tolist()]
        uses = Uses(reads, writes, buffers["width"].tolist(), buffers["domain"].tolist(), outlive)
        buffers["slot"] = assign_slots(uses)
        return Variant(ops, buffers, self._num_forward, places)


def _add(terms: list[tuple[int, ...]], target: int, width: int) -> Any:
    op = np.zeros((), abi.OP_DTYPE)
    op["kind"], op["in"], op["out"], op["weight"] = OP_KINDS["add"], -1, -1, -1
    for index, (buffer, column, columns) in enumerate(terms):
        op["in"][index], op["in_col"][index], op["in_width"][index] = buffer, column, columns
    op["out"][0], op["out_width"][0] = target, width
    return op[()]
