"""From a recording to a program file: ops and buffers as the C structs, weights packed once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pellucid.core import abi, structs
from pellucid.ops.spec import OP_KINDS, core_floats
from pellucid.program.checksums import Bytes
from pellucid.program.file import aligned, write_program_file
from pellucid.program.formats import choose_dtypes
from pellucid.program.planner import Uses, assign_slots
from pellucid.program.scheme import WeightScheme
from pellucid.program.tracer import RecordedOp, RecordedWeight, Recording, constant
from pellucid.weights.tensor import TensorView, from_float32

FORMAT_VERSION = 7
MAX_END_TOKENS = 16
DIGEST_BYTES = hashlib.sha256().digest_size
# What the core reads of a model: see csrc/src/model_file.cpp.
_PLAN_FIELDS = (
    "n_forward_ops",
    "hidden",
    "logits",
    "vocab_size",
    "n_layers",
    "n_kv_heads",
    "head_dim",
    "max_positions",
    "kv_dtype",
    "n_end_tokens",
)
PLAN_DTYPE = np.dtype([(name, "<i4") for name in _PLAN_FIELDS] + [("end_tokens", "<i4", (MAX_END_TOKENS,))])
WEIGHT_DTYPE = np.dtype(
    [(name, "<i8") for name in ("rows", "cols", "offset", "bytes")] + [("dtype", "<i4"), ("layout", "<i4")]
)
_NO_OPERAND = (-1, 0, 0)
_DOMAINS = {"T": 0, "L": 1}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PackedWeight:
    """Where a weight lies in the data section, and how."""

    name: str
    rows: int
    cols: int
    dtype: int
    layout: int
    offset: int
    nbytes: int

    def as_meta(self) -> list[Any]:
        """For the header."""
        return [self.name, self.rows, self.cols, self.dtype, self.layout, self.offset, self.nbytes]


def _padded(values: tuple[Any, ...], length: int, fill: Any) -> list[Any]:
    return [*values, *[fill] * (length - len(values))]


def encode_ops(recording: Recording) -> np.ndarray[Any, Any]:
    """The ops as `pld_op` structs."""
    table = np.zeros(len(recording.ops), abi.OP_DTYPE)
    for row, op in zip(table, recording.ops, strict=True):
        _encode_op(row, op, recording.widths)
    return table


def _encode_op(row: Any, op: RecordedOp, widths: list[int]) -> None:
    operands = _padded(tuple(o or _NO_OPERAND for o in op.inputs), structs.MAX_IN, _NO_OPERAND)
    row["kind"] = OP_KINDS[op.kind]
    row["in"], row["in_col"], row["in_width"] = zip(*operands, strict=True)
    row["out"] = _padded(op.outputs, structs.MAX_OUT, -1)
    row["out_width"] = _padded(tuple(widths[buffer] for buffer in op.outputs), structs.MAX_OUT, 0)
    if op.out_range is not None:
        row["out_col"][0], row["out_width"][0] = op.out_range
    row["weight"] = _padded(tuple(-1 if w is None else w for w in op.weights), structs.MAX_WEIGHTS, -1)
    row["i"] = _padded(op.ints, 6, 0)
    row["f"] = core_floats(op.kind, op.floats)


def encode_buffers(recording: Recording) -> np.ndarray[Any, Any]:
    """The buffers as `pld_buffer` structs, with their slots."""
    table = np.zeros(len(recording.widths), abi.BUFFER_DTYPE)
    table["width"] = recording.widths
    table["domain"] = [_DOMAINS[domain] for domain in recording.domains]
    table["slot"] = assign_slots(Uses.of(recording))
    return table


def place_weights(weights: list[RecordedWeight], dtypes: list[int]) -> list[PackedWeight]:
    """Layout, size and place of every weight: matrices in panels, gathered tables in rows (quantised ones in panels too),
    vectors in float32."""
    placed, offset = [], 0
    for weight, dtype in zip(weights, dtypes, strict=True):
        cols = weight.shape[-1]
        rows = int(np.prod(weight.shape[:-1], dtype=np.int64))
        is_plain = dtype in (abi.F32, abi.BF16)
        layout = abi.PANELS if weight.kind == "matrix" or not is_plain else abi.ROW_MAJOR
        nbytes = abi.packed_bytes(rows, cols, dtype) if layout == abi.PANELS else rows * abi.row_bytes(dtype, cols)
        placed.append(PackedWeight(weight.name, rows, cols, dtype, layout, offset, nbytes))
        offset = aligned(offset + nbytes)
    return placed


def encode_plan(recording: Recording, vocab_size: int, model: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """What a program without Python must know of the model."""
    table = np.zeros(1, PLAN_DTYPE)
    row = table[0]
    row["n_forward_ops"], row["hidden"], row["logits"] = recording.n_forward_ops, recording.hidden, recording.logits
    row["vocab_size"] = vocab_size
    for name in ("n_layers", "n_kv_heads", "head_dim", "max_positions", "kv_dtype"):
        row[name] = model[name]
    ends = list(model["end_tokens"])[:MAX_END_TOKENS]
    row["n_end_tokens"], row["end_tokens"][: len(ends)] = len(ends), ends
    return table


def encode_weights(placed: list[PackedWeight]) -> np.ndarray[Any, Any]:
    """Where the weights lie, for the core."""
    table = np.zeros(len(placed), WEIGHT_DTYPE)
    for row, place in zip(table, placed, strict=True):
        row["rows"], row["cols"], row["offset"], row["bytes"] = place.rows, place.cols, place.offset, place.nbytes
        row["dtype"], row["layout"] = place.dtype, place.layout
    return table


def _pieces(weight: RecordedWeight) -> list[TensorView]:
    values = constant(weight)
    if values is not None:
        return [from_float32(weight.name, values)]
    return list(weight.source.pieces)


def pack_weight(context: abi.Context, weight: RecordedWeight, place: PackedWeight, data: Bytes) -> None:
    """Converts a weight's pieces, in the order of their rows, into its place.

    Raises:
        WeightFormatError: a value that is to be rounded to an integer is not finite: nothing would be left of it to be seen later.
    """
    target = data[place.offset : place.offset + place.nbytes]
    row = 0
    for piece in _pieces(weight):
        rows = piece.rows if len(weight.shape) > 1 else 1
        cols = piece.cols
        if place.dtype not in (abi.F32, abi.BF16):
            piece.check_finite()
        if place.layout == abi.PANELS:
            abi.pack(context, piece.data, piece.pld_dtype, rows, cols, row, place.rows, target, place.dtype)
            row += rows
        else:
            width = rows * abi.row_bytes(place.dtype, cols)
            abi.convert_bytes(context, piece.data, piece.pld_dtype, rows, cols, target[row : row + width], place.dtype)
            row += width


def _rotary(recording: Recording) -> list[str]:
    """Names of the frequencies of all rotary tables."""
    used = {index for op in recording.ops if op.kind == "rope_table" for index in op.weights if index is not None}
    return sorted(recording.weights[index].name for index in used)


def build_program_file(
    path: Path,
    recording: Recording,
    context: abi.Context,
    *,
    scheme: WeightScheme,
    vocab_size: int,
    model: Mapping[str, Any],
    meta: Mapping[str, Any],
    texts: Mapping[str, bytes],
    progress: Progress | None = None,
) -> None:
    """Plans a recording, packs its weights and writes both to one file.

    `model` gives the fields of the plan that the recording does not. `meta` and `texts` (JSON documents) are kept beside
    the program. `progress(done, total)` is told bytes packed.
    """
    recording, dtypes = choose_dtypes(recording, scheme)
    placed = place_weights(recording.weights, dtypes)
    total = placed[-1].offset + placed[-1].nbytes if placed else 0
    digests_at = aligned(total)

    def fill(data: Bytes) -> Iterator[int]:
        digests = data[digests_at:].reshape(len(placed), DIGEST_BYTES)
        for weight, place, digest in zip(recording.weights, placed, digests, strict=True):
            pack_weight(context, weight, place, data)
            packed = data[place.offset : place.offset + place.nbytes]
            digest[:] = np.frombuffer(hashlib.sha256(packed.data).digest(), np.uint8)
            yield place.offset + place.nbytes
            if progress is not None:
                progress(place.offset + place.nbytes, total)

    header = {
        **meta,
        "format_version": FORMAT_VERSION,
        "n_forward_ops": recording.n_forward_ops,
        "hidden": recording.hidden,
        "logits": recording.logits,
        "vocab_size": vocab_size,
        "activations": recording.activations,
        "weights": [place.as_meta() for place in placed],
        "digests": digests_at,
        "rotary": _rotary(recording),
    }
    small = {
        "plan": encode_plan(recording, vocab_size, model).tobytes(),
        "weights": encode_weights(placed).tobytes(),
        "ops": encode_ops(recording).tobytes(),
        "buffers": encode_buffers(recording).tobytes(),
        **texts,
    }
    write_program_file(path, header, small, digests_at + DIGEST_BYTES * len(placed), fill)
