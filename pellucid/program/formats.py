"""The stored type of every weight of a recording. A fused matrix whose pieces differ becomes one linear op a piece."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from pellucid.core import abi
from pellucid.program.scheme import WeightScheme
from pellucid.program.tracer import RecordedOp, RecordedWeight, Recording, constant
from pellucid.weights.tensor import TensorView


@dataclass(frozen=True)
class Pieces:
    """What a recorded weight is packed from."""

    pieces: list[TensorView]


@dataclass(frozen=True)
class _Part:
    """Rows [row, row + rows) of a fused matrix, of one type."""

    row: int
    rows: int
    weight: int  # index


def choose_dtypes(recording: Recording, scheme: WeightScheme) -> tuple[Recording, list[int]]:
    """The recording with mixed matrices split, and the core's code for each of its weights."""
    heads, experts = _weights_of(recording, {"embedding"}, logits=True), _weights_of(recording, {"moe"})
    weights: list[RecordedWeight] = []
    dtypes: list[int] = []
    parts: dict[int, list[_Part]] = {}
    for index, weight in enumerate(recording.weights):
        found = _runs(weight, scheme, index in heads, index in experts)
        row = 0
        for dtype, pieces in found:
            rows = sum(piece.rows for piece in pieces) if len(found) > 1 else 0
            parts.setdefault(index, []).append(_Part(row, rows, len(weights)))
            weights.append(weight if len(found) == 1 else _part_of(weight, row, rows, pieces))
            dtypes.append(dtype)
            row += rows
    biases = _Biases(weights, dtypes)
    ops = [new for op in recording.ops for new in _with_parts(op, parts, biases)]
    split = sum(len(_with_parts(op, parts, biases)) - 1 for op in recording.ops[: recording.n_forward_ops])
    changed = replace(recording, ops=ops, weights=weights, n_forward_ops=recording.n_forward_ops + split)
    return changed, dtypes


def _weights_of(recording: Recording, kinds: set[str], *, logits: bool = False) -> set[int]:
    """Indices of weights that ops of `kinds`, or of the logits, read."""
    return {
        weight
        for index, op in enumerate(recording.ops)
        if op.kind in kinds or (logits and index >= recording.n_forward_ops)
        for weight in op.weights
        if weight is not None
    }


def _runs(
    weight: RecordedWeight, scheme: WeightScheme, is_head: bool, is_expert: bool
) -> list[tuple[int, list[TensorView]]]:
    """Neighbouring pieces of one type, in order."""
    if weight.kind == "vector":
        return [(abi.F32, [])]
    if is_expert or constant(weight) is not None:
        return [(scheme.float_dtype, [])]
    typed = [(scheme.dtype_of(piece, is_head=is_head), piece) for piece in weight.source.pieces]
    return [(dtype, [piece for _, piece in run]) for dtype, run in groupby(typed, key=lambda pair: pair[0])]


def _part_of(weight: RecordedWeight, row: int, rows: int, pieces: list[TensorView]) -> RecordedWeight:
    return RecordedWeight(f"{weight.name}#{row}", Pieces(pieces), (rows, weight.shape[-1]), weight.kind)


class _Biases:
    """Slices of biases as weights of their own, each made once."""

    def __init__(self, weights: list[RecordedWeight], dtypes: list[int]) -> None:
        self._weights, self._dtypes = weights, dtypes
        self._made: dict[tuple[int, int], int] = {}

    def slice(self, index: int, part: _Part) -> int:
        """The index of elements [part.row, + part.rows) of weight `index`."""
        key = (index, part.row)
        if key not in self._made:
            bias = self._weights[index]
            values = constant(bias)
            if values is None:
                values = np.concatenate([piece.to_float32().reshape(-1) for piece in bias.source.pieces])
            piece = np.ascontiguousarray(values[part.row : part.row + part.rows])
            self._made[key] = len(self._weights)
            self._weights.append(RecordedWeight(f"{bias.name}#{part.row}", piece, piece.shape, "vector"))
            self._dtypes.append(abi.F32)
        return self._made[key]


def _with_parts(op: RecordedOp, parts: dict[int, list[_Part]], biases: _Biases) -> list[RecordedOp]:
    """The op with its weights' new indices: one op for each part of its matrix."""
    first = [None if weight is None else parts[weight][0].weight for weight in op.weights]
    if not op.weights or op.weights[0] is None or len(parts[op.weights[0]]) == 1:
        return [replace(op, weights=tuple(first))]
    bias = first[1] if len(first) > 1 else None
    return [
        replace(
            op,
            weights=(part.weight, None if bias is None else biases.slice(bias, part)),
            out_range=(part.row, part.rows),
        )
        for part in parts[op.weights[0]]
    ]
