"""A program that also keeps activations by name, or adds to them: the same ops on the same weights, other buffers.

What is kept is planned anew from the tables of the program file, so no model code is needed. An activation that is the sum of
two terms (the residual stream, whose addition the next norm does) gets an `add` of its own behind the later of them: the same
addition, so the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pellucid.core import abi
from pellucid.errors import InvalidRequestError, WeightFormatError
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
    hidden: int
    places: dict[str, KeptColumns]
    inputs: dict[str, int]  # the buffer of what is added to an activation, by its name

    @property
    def kept(self) -> list[int]:
        """The buffers that outlive a run."""
        return sorted({place.buffer for place in self.places.values()})


def activation_widths(file: ProgramFile) -> dict[str, int]:
    """The names that can be asked for, in the order in which they are computed, and the width of each.

    Raises:
        WeightFormatError: the file's names are damaged.
    """
    return {name: width for name, (_, width) in _first_terms(file).items()}


def steerable(file: ProgramFile) -> dict[str, int]:
    """Those of the names that a vector can be added to, because nothing else lies in their buffer. Raises likewise."""
    widths = file.sections["buffers"].view(abi.BUFFER_DTYPE)["width"]
    return {name: width for name, (buffer, width) in _first_terms(file).items() if widths[buffer] == width}


def _first_terms(file: ProgramFile) -> dict[str, tuple[int, int]]:
    """The buffer and the width of each activation's first term."""
    num_buffers = len(file.sections["buffers"].view(abi.BUFFER_DTYPE))
    try:
        found = {str(name): (int(terms[0][0]), int(terms[0][2])) for name, terms in file.meta["activations"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise WeightFormatError(f"{file.path.name}: the names of activations are damaged: {error}") from None
    for name, (buffer, _) in found.items():
        if not 0 <= buffer < num_buffers:
            raise WeightFormatError(f"{file.path.name}: activation {name!r} lies in buffer {buffer} of {num_buffers}")
    return found


def variant_of(file: ProgramFile, keep: Sequence[str] = (), steer: Sequence[str] = ()) -> Variant:
    """The program with the activations `keep` kept, and with something added to the activations `steer`.

    Raises:
        InvalidRequestError: the model has no activation of that name, or nothing can be added to it.
        WeightFormatError: the file's tables are damaged.
    """
    _check_names("capture", keep, activation_widths(file))
    _check_names("steering", steer, steerable(file))
    tables = _Tables(file)
    inputs = {name: tables.steer(name) for name in steer}
    return tables.variant({name: tables.keep(name) for name in keep}, inputs)


def _check_names(field: str, names: Sequence[str], known: Mapping[str, int]) -> None:
    for name in names:
        if name not in known:
            raise InvalidRequestError(field, f"names {name!r}", limit="the model has no such activation")


class _Tables:
    """A program's tables while sums are added to them."""

    def __init__(self, file: ProgramFile) -> None:
        self._ops = list(file.sections["ops"].view(abi.OP_DTYPE).copy())
        self._buffers = list(file.sections["buffers"].view(abi.BUFFER_DTYPE))
        self._meta, self._name = file.meta, file.path.name
        self._num_forward, self._hidden = int(file.meta["n_forward_ops"]), int(file.meta["hidden"])
        self._steered: dict[int, int] = {}  # buffer -> the one that holds it with what was added

    def _terms(self, name: str) -> list[tuple[int, ...]]:
        """Where an activation stands, in the buffers that took the place of those that were steered."""
        terms = [tuple(map(int, term)) for term in self._meta["activations"][name]]
        self._check(terms)
        return [(self._steered.get(term[0], term[0]), *term[1:]) for term in terms]

    def _check(self, terms: list[tuple[int, ...]]) -> None:
        if not 1 <= len(terms) <= _MAX_TERMS or any(not 0 <= buffer < len(self._buffers) for buffer, _, _ in terms):
            raise WeightFormatError(f"{self._name}: an activation lies in no buffer")

    def _new_buffer(self, like: int, width: int) -> int:
        buffer = np.zeros((), abi.BUFFER_DTYPE)
        buffer["width"], buffer["domain"] = width, self._buffers[like]["domain"]
        self._buffers.append(buffer[()])
        return len(self._buffers) - 1

    def keep(self, name: str) -> KeptColumns:
        """Makes an activation stand alone in a buffer, or finds where it does."""
        terms = self._terms(name)
        if len(terms) == 1:
            return KeptColumns(*terms[0])
        width = terms[0][2]
        target = self._new_buffer(terms[0][0], width)
        self._insert(self._behind(terms), _add(terms, target, width))
        return KeptColumns(target, 0, width)

    def steer(self, name: str) -> int:
        """Adds an input to an activation (to the first of two terms): all that read it behind read the sum."""
        buffer, _, width = term = self._terms(name)[0]
        added, target = self._new_buffer(buffer, width), self._new_buffer(buffer, width)
        place = self._behind([term])
        for op in self._ops[place:]:
            op["in"][op["in"] == buffer] = target
        self._insert(place, _add([term, (added, 0, width)], target, width))
        self._hidden = target if self._hidden == buffer else self._hidden
        self._steered = {
            **{old: target if new == buffer else new for old, new in self._steered.items()},
            buffer: target,
        }
        return added

    def _insert(self, place: int, op: Any) -> None:
        self._ops.insert(place, op)
        self._num_forward += 1

    def _behind(self, terms: list[tuple[int, ...]]) -> int:
        """The place behind the last op that writes one of the terms."""
        wanted = {buffer for buffer, _, _ in terms}
        writers = [index for index, op in enumerate(self._ops) if wanted & set(op["out"].tolist())]
        return writers[-1] + 1

    def variant(self, places: dict[str, KeptColumns], inputs: dict[str, int]) -> Variant:
        ops, buffers = np.array(self._ops, abi.OP_DTYPE), np.array(self._buffers, abi.BUFFER_DTYPE)
        outlive = {place.buffer for place in places.values()} | {self._hidden, self._meta["logits"]}
        outlive |= set(inputs.values())  # and they are written first, as if by an op in front
        reads = [[], *([buffer for buffer in row if buffer >= 0] for row in ops["in"].tolist())]
        writes = [[*inputs.values()], *([buffer for buffer in row if buffer >= 0] for row in ops["out"].tolist())]
        uses = Uses(reads, writes, buffers["width"].tolist(), buffers["domain"].tolist(), outlive)
        buffers["slot"] = assign_slots(uses)
        return Variant(ops, buffers, self._num_forward, self._hidden, places, inputs)


def _add(terms: list[tuple[int, ...]], target: int, width: int) -> Any:
    op = np.zeros((), abi.OP_DTYPE)
    op["kind"], op["in"], op["out"], op["weight"] = OP_KINDS["add"], -1, -1, -1
    for index, (buffer, column, columns) in enumerate(terms):
        op["in"][index], op["in_col"][index], op["in_width"][index] = buffer, column, columns
    op["out"][0], op["out_width"][0] = target, width
    return op[()]
