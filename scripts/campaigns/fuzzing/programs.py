"""Small random programs: valid ones, built as the planner builds them, and the ways in which their tables can be damaged.

Shape letters: T tokens, L logit rows, D model width, H heads, G kv heads, E head width, F ffn width, V vocabulary.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from fuzzing.draws import Draw, fenced, tail, with_tail
from pellucid.core import abi, structs
from pellucid.program.builder import encode_buffers, encode_ops
from pellucid.program.tracer import RecordedOp, RecordedWeight, Recording

Operand = tuple[int, int, int]  # buffer, column, width
_BLOCKS = {abi.Q8_0: 32, abi.Q4_0: 32, abi.Q4_1: 32, abi.Q4_K: 256, abi.Q5_K: 256, abi.Q6_K: 256}
_BLOCK_BYTES = {dtype: abi.row_bytes(dtype, values) for dtype, values in _BLOCKS.items()}
_EXACT_ONLY = (abi.Q4_K, abi.Q5_K, abi.Q6_K)
# Byte offsets of the float16 scales in a block of a type that is not made from floats.
_HALVES = {abi.Q4_K: (0, 2), abi.Q5_K: (0, 2), abi.Q6_K: (208,)}
_NONE, _SILU, _GELU, _GELU_TANH, _RELU = range(5)


@dataclass
class Recipe:
    """A program's tables and weights, without a handle."""

    ops: np.ndarray
    buffers: np.ndarray
    weights: list[abi.Weight]
    n_forward_ops: int
    hidden: int
    logits: int
    vocab_size: int
    kept: list[int] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    n_layers: int = 0
    n_kv_heads: int = 1
    head_dim: int = 2
    can_shift: bool | None = True  # the core can rotate the keys of its cache; None: nobody knows
    recording: Recording | None = None

    @cached_property
    def attention(self) -> list[tuple[int, int, int]]:
        """(layer, G, E) of its attention ops, whatever its tables say."""
        rows = self.ops[self.ops["kind"] == 7]["i"]
        return [(int(row[0]), int(row[2]), int(row[3])) for row in rows]


class _Maker:
    """A recording in the making."""

    def __init__(self, context: abi.Context, draw: Draw) -> None:
        self.context, self.draw = context, draw
        self.recording = Recording()
        self.weights: list[abi.Weight] = []
        self.domain = "T"

    def buffer(self, width: int) -> int:
        self.recording.widths.append(width)
        self.recording.domains.append(self.domain)
        return len(self.recording.widths) - 1

    def whole(self, buffer: int) -> Operand:
        return (buffer, 0, self.recording.widths[buffer])

    def op(
        self,
        kind: str,
        inputs: tuple[Operand | None, ...],
        widths: tuple[int, ...],
        weights: tuple[int | None, ...] = (),
        ints: tuple[int, ...] = (),
        floats: tuple[float, ...] = (),
    ) -> int:
        """Adds an op; its first output."""
        outputs = tuple(self.buffer(width) for width in widths)
        self.recording.ops.append(RecordedOp(kind, inputs, outputs, weights, ints, floats))
        return outputs[0]

    def vector(self, width: int, base: float = 1.0) -> int:
        values = (np.float32(base) + np.float32(0.3) * self.draw.floats(width)).astype(np.float32)
        data = fenced(4 * width)
        data[:] = values.view(np.uint8)
        return self.keep(abi.Weight(data, 1, width, abi.F32, abi.ROW_MAJOR), "vector", (width,))

    def keep(self, weight: abi.Weight, kind: Any, shape: tuple[int, ...]) -> int:
        self.weights.append(weight)
        self.recording.weights.append(RecordedWeight(f"w{len(self.weights)}", None, shape, kind))
        return len(self.weights) - 1

    def matrix(self, rows: int, cols: int, dtype: int | None = None) -> int:
        """A packed matrix of any stored type that its width allows."""
        if dtype is None:
            fitting = [t for t, block in _BLOCKS.items() if cols % block == 0]
            dtype = self.draw.one((abi.F32, abi.BF16, abi.BF16, abi.I8, *fitting))
        return self.keep(packed_matrix(self.context, self.draw, rows, cols, dtype), "matrix", (rows, cols))

    def table(self, rows: int, cols: int) -> int:
        """An embedding in rows."""
        dtype = self.draw.one((abi.F32, abi.BF16))
        data = fenced(rows * abi.row_bytes(dtype, cols))
        source = self.draw.floats(rows * cols).view(np.uint8)
        abi.convert_bytes(self.context, source, abi.F32, rows, cols, data, dtype)
        return self.keep(abi.Weight(data, rows, cols, dtype, abi.ROW_MAJOR), "table", (rows, cols))


def packed_matrix(context: abi.Context, draw: Draw, rows: int, cols: int, dtype: int) -> abi.Weight:
    """A random matrix, packed by the core."""
    data = fenced(abi.packed_bytes(rows, cols, dtype))
    if dtype in _EXACT_ONLY:
        source, source_dtype = _random_blocks(draw, rows * cols // _BLOCKS[dtype], dtype), dtype
    else:
        source, source_dtype = (draw.floats(rows * cols) * np.float32(0.3)).view(np.uint8), abi.F32
    abi.pack(context, source, source_dtype, rows, cols, 0, rows, data, dtype)
    return abi.Weight(data, rows, cols, dtype, abi.PANELS)


def _random_blocks(draw: Draw, count: int, dtype: int) -> np.ndarray:
    blocks = draw.octets(count * _BLOCK_BYTES[dtype]).reshape(count, -1)
    for offset in _HALVES[dtype]:
        scales = (draw.floats(count) * np.float32(0.01)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales[:, None].view(np.uint8)
    return blocks.reshape(-1)


# ---- a random model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape:
    d: int
    h: int
    g: int
    e: int
    vocab: int
    rope: int  # width of the table; 0: none


class _Model:
    """A random decoder of a few ops: every op kind, every way in which operands can lie."""

    def __init__(self, context: abi.Context, draw: Draw) -> None:
        self.draw = draw
        self.make = _Maker(context, draw)
        g, e = draw.one((1, 1, 2, 3)), draw.one((2, 4, 4, 6, 8, 16, 18, 32))
        self.shape = _Shape(
            d=256 if draw.chance(0.04) else draw.one((4, 8, 12, 32, 32, 64, 64, 96)),
            h=g * draw.one((1, 1, 2, 3)),
            g=g,
            e=e,
            vocab=draw.between(3, 70),
            rope=0 if draw.chance(0.25) else 2 * draw.between(1, e // 2),
        )
        self.n_layers = draw.one((0, 1, 1, 2, 2, 3))
        self.can_shift = True
        self.table = -1
        self.inputs: list[int] = []

    def recipe(self) -> Recipe:
        """All tables."""
        make, shape = self.make, self.shape
        x = self._embed()
        if shape.rope:
            frequencies = make.vector(shape.rope // 2, 0.5)
            self.table = make.op("rope_table", (None,), (shape.rope,), (frequencies,), (), (1.0,))
        for layer in range(self.n_layers):
            x = self._attend(x, layer)
            x = self._feed(x)
        hidden = self._norm(x)
        recording = make.recording
        recording.n_forward_ops, recording.hidden = len(recording.ops), hidden
        recording.logits = self._head(hidden)
        return self._finish(recording)

    def _embed(self) -> int:
        make, shape, draw = self.make, self.shape, self.draw
        weight = make.table(shape.vocab, shape.d) if draw.chance(0.5) else make.matrix(shape.vocab, shape.d)
        x = make.op("embedding", (None,), (shape.d,), (weight,))
        if draw.chance(0.15):  # something that the caller writes before each run is added
            self.inputs.append(make.buffer(shape.d))
            x = make.op("add", (make.whole(x), make.whole(self.inputs[-1])), (shape.d,))
        if draw.chance(0.2):
            x = make.op("scale", (make.whole(x),), (shape.d,), (), (), (draw.one((0.5, 2.0, -1.0)),))
        return x

    def _norm(self, x: int, groups: int = 1) -> int:
        make, width = self.make, self.make.recording.widths[x]
        if groups == 1 and self.draw.chance(0.3):
            bias = make.vector(width, 0.0) if self.draw.chance(0.5) else None
            weights = (make.vector(width), bias)
            return make.op("layer_norm", (make.whole(x), None), (width,), weights, (), (1e-5,))
        floats = (1e-6, self.draw.one((0.0, 1.0)))
        weight = make.vector(width // groups)
        return make.op("rms_norm", (make.whole(x), None), (width,), (weight,), (groups,), floats)

    def _linear(self, x: Operand, width: int, act: int = _NONE) -> int:
        make = self.make
        bias = make.vector(width, 0.0) if self.draw.chance(0.25) else None
        return make.op("linear", (x,), (width,), (make.matrix(width, x[2]), bias), (act,))

    def _attend(self, x: int, layer: int) -> int:
        make, s, draw = self.make, self.shape, self.draw
        y = make.whole(self._norm(x))
        q_width, kv_width = s.h * s.e, s.g * s.e
        if draw.chance(0.5):
            fused = self._linear(y, q_width + 2 * kv_width)
            q, k = (fused, 0, q_width), (fused, q_width, kv_width)
            v = (fused, q_width + kv_width, kv_width)
        else:
            q, k, v = (make.whole(self._linear(y, width)) for width in (q_width, kv_width, kv_width))
        if s.rope:
            q, k = self._rotated(q), self._rotated(k)
            if draw.chance(0.1):
                k = make.whole(make.op("scale", (k,), (kv_width,), (), (), (0.5,)))
                self.can_shift = False
        ints = (layer, s.h, s.g, s.e, draw.one((0, 0, 0, 3, 17)))
        softcap = draw.one((0.0, 0.0, 5.0))
        z = make.op("attention", (q, k, v), (q_width,), (), ints, (s.e**-0.5, softcap))
        return self._added(x, self._linear(make.whole(z), s.d))

    def _rotated(self, x: Operand) -> Operand:
        make, s = self.make, self.shape
        if self.draw.chance(0.2):  # a norm of each head goes before
            spread = make.op("scale", (x,), (x[2],), (), (), (1.0,))
            x = make.whole(self._norm(spread, x[2] // s.e))
        return make.whole(make.op("rotary", (x, make.whole(self.table)), (x[2],), (), (s.e, self.draw.below(2))))

    def _added(self, x: int, y: int) -> int:
        make, d = self.make, self.shape.d
        if self.draw.chance(0.5):
            return make.op("add", (make.whole(x), make.whole(y)), (d,))
        make.op("rms_norm", (make.whole(x), make.whole(y)), (d, d), (make.vector(d),), (1,), (1e-6, 0.0))
        return len(make.recording.widths) - 1  # the sum

    def _feed(self, x: int) -> int:
        make, s, draw = self.make, self.shape, self.draw
        kind = draw.below(5)
        if kind == 0:
            return x
        y = make.whole(self._norm(x))
        if kind == 1 and s.d % 64 == 0 and s.d <= 64:
            return self._added(x, self._experts(y))
        f = draw.one((4, 32, 64, 96))
        act = draw.one((_SILU, _GELU, _GELU_TANH, _RELU))
        if kind <= 3:
            both = self._linear(y, 2 * f)
            inner = make.op("act_and_mul", (make.whole(both),), (f,), (), (act,))
        elif draw.chance(0.5):
            inner = self._linear(y, f, act)
        else:
            inner = make.op("act", (make.whole(self._linear(y, f)),), (f,), (), (act,))
        return self._added(x, self._linear(make.whole(inner), s.d))

    def _experts(self, y: Operand) -> int:
        make, d, draw = self.make, self.shape.d, self.draw
        n, f = draw.between(1, 3), 64
        router = make.whole(make.op("linear", (y,), (n,), (make.matrix(n, d), None), (_NONE,)))
        plain = (abi.F32, abi.BF16)
        weights = (make.matrix(n * 2 * f, d, draw.one(plain)), make.matrix(n * d, f, draw.one(plain)))
        return make.op("moe", (y, router), (d,), weights, (n, draw.between(1, n), _SILU, draw.below(2)))

    def _head(self, hidden: int) -> int:
        make, s, draw = self.make, self.shape, self.draw
        make.domain = "L"
        row = make.op("gather_rows", (make.whole(hidden),), (s.d,))
        if draw.chance(0.1):
            row = self._norm(row)
        logits = make.op("linear", (make.whole(row),), (s.vocab,), (make.matrix(s.vocab, s.d), None), (_NONE,))
        if draw.chance(0.2):
            logits = make.op("softcap", (make.whole(logits),), (s.vocab,), (), (), (7.0,))
        if draw.chance(0.15):
            make.op("sample", (make.whole(logits),), (4,))
        return logits

    def _finish(self, recording: Recording) -> Recipe:
        ops, buffers = encode_ops(recording), encode_buffers(recording)
        written = {buffer for op in recording.ops[: recording.n_forward_ops] for buffer in op.outputs}
        kept = [b for b in sorted(written) if recording.domains[b] == "T" and self.draw.chance(0.15)]
        _separate(buffers, [*kept, *self.inputs])
        return Recipe(
            ops,
            buffers,
            self.make.weights,
            recording.n_forward_ops,
            recording.hidden,
            recording.logits,
            self.shape.vocab,
            kept,
            self.inputs,
            self.n_layers,
            self.shape.g,
            self.shape.e,
            self.can_shift,
            recording,
        )


def _separate(buffers: np.ndarray, own: list[int]) -> None:
    """Gives buffers that outlive the run slots of their own."""
    for buffer in own:
        buffers["slot"][buffer] = -1
    free = iter(sorted(set(range(len(buffers))) - set(buffers["slot"].tolist())))
    for buffer in own:
        if buffers["slot"][buffer] < 0:
            buffers["slot"][buffer] = next(free)


@lru_cache(maxsize=1)
def packing_context() -> abi.Context:
    """By which weights are packed."""
    return abi.Context(1)


@lru_cache(maxsize=512)
def recipe_of(seed: int, number: int) -> Recipe:
    """One of the recipes that the cases of a seed share."""
    return _Model(packing_context(), Draw(f"{seed}:recipe:{number}")).recipe()


# ---- descriptors ---------------------------------------------------------------------------------------------------


@dataclass
class Descriptor:
    """A pld_program_desc and what it points to."""

    recipe: Recipe
    struct: structs.ProgramDescStruct
    memory: list[Any]


def describe_program(recipe: Recipe, max_tokens: int, max_logit_rows: int) -> Descriptor:
    """As the header has it."""
    table = (structs.WeightStruct * max(1, len(recipe.weights)))(*[weight.struct() for weight in recipe.weights])
    kept, inputs = np.array(recipe.kept, np.int32), np.array(recipe.inputs, np.int32)
    struct = structs.ProgramDescStruct(
        ctypes.sizeof(structs.ProgramDescStruct),
        len(recipe.ops),
        recipe.n_forward_ops,
        len(recipe.buffers),
        len(recipe.weights),
        recipe.ops.ctypes.data,
        recipe.buffers.ctypes.data,
        ctypes.addressof(table),
        recipe.hidden,
        recipe.logits,
        max_tokens,
        max_logit_rows,
        recipe.vocab_size,
        0,
        len(recipe.kept),
        kept.ctypes.data,
        len(recipe.inputs),
        inputs.ctypes.data,
        recipe.ops.itemsize,
        recipe.buffers.itemsize,
        ctypes.sizeof(structs.WeightStruct),
    )
    return Descriptor(recipe, struct, [table, kept, inputs])


_OP_FIELDS = ("kind", "in", "in_col", "in_width", "out", "out_col", "out_width", "weight", "i", "f")
_COUNTS = ("n_ops", "n_forward_ops", "n_buffers", "n_weights", "n_kept", "n_inputs")
_SCALARS = ("hidden", "logits", "max_tokens", "max_logit_rows", "vocab_size")


def damaged(draw: Draw, good: Recipe, max_tokens: int, max_logit_rows: int) -> Descriptor:
    """A descriptor with one to three things changed. What the caller says about its memory stays true."""
    ops, buffers = good.ops.copy(), good.buffers.copy()
    recipe = replace(good, ops=ops, buffers=buffers, kept=list(good.kept), inputs=list(good.inputs))
    recipe.can_shift = None
    for _ in range(draw.one((1, 1, 1, 2, 3))):
        kind = draw.below(8)
        if kind <= 3:
            damage_op(draw, ops)
        elif kind == 4:
            row = buffers[draw.below(len(buffers))]
            name = draw.one(("width", "domain", "slot", "slot"))
            row[name] = draw.hostile(int(row[name]))
        elif kind == 5:
            first, second = draw.below(len(ops)), draw.below(len(ops))
            ops[[first, second]] = ops[[second, first]]
        else:
            for name in ("kept", "inputs"):
                listed = getattr(recipe, name)
                if draw.chance(0.3):
                    listed.append(draw.below(len(buffers)) if draw.chance(0.7) else draw.hostile(0))
    desc = describe_program(recipe, max_tokens, max_logit_rows)
    if draw.chance(0.3):
        _damage_struct(draw, desc)
    if draw.chance(0.2):
        _damage_weight(draw, desc)
    return desc


def damage_op(draw: Draw, ops: np.ndarray) -> None:
    """Changes one field of one op."""
    row = ops[draw.below(len(ops))]
    name = draw.one(_OP_FIELDS)
    if name == "kind":
        row["kind"] = draw.between(-1, 17) if draw.chance(0.8) else draw.hostile(0)
    elif name == "f":
        row["f"][draw.below(4)] = ctypes.c_float(draw.real()).value  # infinite where it is too great
    else:
        place = draw.below(len(row[name]))
        row[name][place] = draw.hostile(int(row[name][place]))


def _damage_struct(draw: Draw, desc: Descriptor) -> None:
    struct = desc.struct
    kind = draw.below(4)
    if kind == 0:
        name = draw.one(_COUNTS)  # fewer than there are, or a number that no table can have
        good = getattr(struct, name)
        setattr(struct, name, draw.one((good - 1, good // 2, 0, -1, -(2**31), 2**31 - 1)))
    elif kind == 1:
        name = draw.one(_SCALARS)
        setattr(struct, name, draw.hostile(getattr(struct, name)))
    elif kind == 2:
        setattr(struct, draw.one(("ops", "buffers", "weights", "kept", "inputs")), None)
    else:
        size = ctypes.sizeof(struct)
        oldest = structs.ProgramDescStruct.n_kept.offset  # of the first version, whose ops have another layout
        struct.struct_size = draw.one((0, 8, oldest - 1, 4097, 2**63))
        if draw.chance(0.3):
            setattr(struct, draw.one(("op_size", "buffer_size", "weight_size")), draw.one((1, 8, 15, 4097, 2**63)))
        elif draw.chance(0.6):
            fields = tail(draw)
            struct.struct_size = size + len(fields)
            desc.struct = with_tail(struct, fields)


def _damage_weight(draw: Draw, desc: Descriptor) -> None:
    """A weight that says less than it has, or what no weight can be."""
    index = draw.below(len(desc.recipe.weights))
    spoil_weight(draw, desc.memory[0][index], desc.recipe.weights[index].data.nbytes)


def spoil_weight(draw: Draw, row: structs.WeightStruct, nbytes: int, slack: int = 0) -> None:
    """Changes one field, such that the memory (`nbytes`, and `slack` behind them) still holds what the weight says; or it says
    what no weight can."""
    before = (row.data, row.rows, row.cols, row.dtype, row.layout)
    name, shift = draw.one(("data", "rows", "cols", "dtype", "layout")), 0
    if name == "data" and (row.data is None or draw.chance(0.5)):
        row.data = None
    elif name == "data":
        shift = draw.one((1, 2, 4, 8, 32))
        row.data += shift
    elif name in ("dtype", "layout"):
        setattr(row, name, draw.between(-2, 14) if draw.chance(0.8) else draw.hostile(0))
    else:
        setattr(row, name, draw.hostile64(getattr(row, name)))
    is_panels = row.layout == abi.PANELS
    needed = abi.packed_bytes(row.rows, row.cols, row.dtype) if is_panels else _rows_bytes(row)
    refused = is_panels and shift % 64 != 0  # by its alignment alone
    if needed > nbytes + slack - shift and not refused:
        row.data, row.rows, row.cols, row.dtype, row.layout = before


def _rows_bytes(row: structs.WeightStruct) -> int:
    return abi.row_bytes(row.dtype, row.cols) * row.rows if row.layout == abi.ROW_MAJOR else 0
