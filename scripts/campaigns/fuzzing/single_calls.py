"""Calls that need no world but a context and, for attention, a cache: single ops, conversions, packing, sampling.

Every output lies within a wider memory whose rest must stay as it was.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import addressof, byref, sizeof
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from fuzzing.batches import RunDraw, damage_run, is_good_run
from fuzzing.core import OK
from fuzzing.draws import INT64_MAX, INT64_MIN, Draw, fenced, ints, tail, with_tail
from fuzzing.programs import damage_op, packed_matrix, packing_context, spoil_weight
from fuzzing.world import Cache, World
from pellucid.core import abi, structs
from pellucid.ops.spec import OP_KINDS

_CANARY = np.float32(-77.25)
_CALL_SIZE = sizeof(structs.OpCallStruct)
_KINDS = tuple(OP_KINDS)
_DTYPES = tuple(range(12))
_BLOCK = {abi.F32: 1, abi.BF16: 1, abi.F16: 1, abi.I8: 1}
_BLOCK |= {dtype: 256 if dtype in (abi.Q4_K, abi.Q5_K, abi.Q6_K) else 32 for dtype in _DTYPES if dtype not in _BLOCK}


# ---- ops -----------------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """A good call of an op."""

    kind: str
    rows: int
    in_widths: Sequence[int] = ()
    out_widths: Sequence[int] = ()
    weights: Sequence[abi.Weight] = ()
    ints: Sequence[int] = ()
    floats: Sequence[float] = ()
    batch: RunDraw | None = None
    cache: Cache | None = None
    memory: list[Any] = field(default_factory=list)
    table: Any = None  # the weights as pld_weight, those that are absent zero


def _vector(draw: Draw, width: int) -> abi.Weight:
    data = fenced(4 * width + 32)  # with room to be moved by
    data[: 4 * width] = draw.floats(width, wild=draw.chance(0.1)).view(np.uint8)
    return abi.Weight(data, 1, width, abi.F32, abi.ROW_MAJOR)


def _matrix(draw: Draw, rows: int, cols: int, dtypes: Sequence[int]) -> abi.Weight:
    fitting = [dtype for dtype in dtypes if cols % _BLOCK[dtype] == 0]
    return packed_matrix(packing_context(), draw, rows, cols, draw.one(fitting))


_MATRIX_DTYPES = (abi.F32, abi.BF16, abi.I8, abi.Q8_0, abi.Q4_0, abi.Q4_1, abi.Q4_K, abi.Q5_K, abi.Q6_K)


def _ids_batch(draw: Draw, rows: int, vocab: int) -> RunDraw:
    """What embedding, rope_table and gather_rows read."""
    batch = RunDraw([draw.below(vocab) for _ in range(rows)], [draw.below(500) for _ in range(rows)], *[None] * 4, None)
    batch.logit_rows = [draw.below(rows) for _ in range(rows)]
    batch.n_tokens, batch.n_logit_rows = rows, rows
    return batch


def _good_call(draw: Draw, caches: list[Cache]) -> _Call:
    kind, rows, width = draw.one(_KINDS), draw.one((1, 1, 2, 3, 7, 20)), draw.between(1, 70)
    act = draw.below(5)
    if kind == "embedding":
        vocab = draw.between(1, 40)
        weight = _matrix(draw, vocab, width, _MATRIX_DTYPES)
        return _Call(kind, rows, (), (width,), (weight,), batch=_ids_batch(draw, rows, vocab))
    if kind == "linear":
        k = draw.one((1, 3, 31, 32, 33, 64, 65, 96, 256, 512))
        bias = [_vector(draw, width)] if draw.chance(0.5) else []
        return _Call(kind, rows, (k,), (width,), (_matrix(draw, width, k, _MATRIX_DTYPES), *bias), (act,))
    if kind in ("rms_norm", "layer_norm"):
        groups = draw.one((1, 1, 2, 5)) if kind == "rms_norm" else 1
        weights = [_vector(draw, width)]
        if kind == "layer_norm" and draw.chance(0.5):
            weights.append(_vector(draw, width))
        widths = (width * groups,) * draw.one((1, 2))
        return _Call(kind, rows, widths, widths, weights, (groups,), (draw.one((0.0, 1e-6)), draw.one((0.0, 1.0))))
    if kind == "rope_table":
        half = draw.between(1, 20)
        return _Call(kind, rows, (), (2 * half,), (_vector(draw, half),), (), (1.0,), batch=_ids_batch(draw, rows, 5))
    if kind == "rotary":
        e = draw.between(2, 40)
        widths = (e * draw.between(1, 4), 2 * draw.between(1, e // 2))
        return _Call(kind, rows, widths, widths[:1], (), (e, draw.below(2)))
    if kind == "attention":
        return _attention(draw, draw.one(caches))
    if kind == "moe":
        n, d, f = draw.between(1, 5), draw.one((64, 128)), 64
        plain = (abi.F32, abi.BF16)
        weights = [_matrix(draw, n * 2 * f, d, plain), _matrix(draw, n * d, f, plain)]
        return _Call(kind, rows, (d, n), (d,), weights, (n, draw.between(1, n), act, draw.below(2)))
    if kind == "gather_rows":
        return _Call(kind, rows, (width,), (width,), batch=_ids_batch(draw, rows, 5))
    widths = {"act_and_mul": ((2 * width,), (width,)), "add": ((width, width), (width,)), "sample": ((width,), (4,))}
    in_widths, out_widths = widths.get(kind, ((width,), (width,)))
    return _Call(kind, rows, in_widths, out_widths, (), (act,), (draw.one((0.5, 3.0)),))


def _attention(draw: Draw, cache: Cache) -> _Call:
    p = cache.params
    h = p.n_kv_heads * draw.between(1, 3)
    widths = (h * p.head_dim, p.n_kv_heads * p.head_dim, p.n_kv_heads * p.head_dim)
    size, width = p.block_size, draw.one((1, 2, 3))
    batch = RunDraw([], [], [0], [], [], [], [])
    for _ in range(draw.one((1, 2))):
        table = [draw.below(p.n_blocks) for _ in range(width)]
        begin = draw.below(min(width * size, 64))
        positions = range(begin, min(min(width * size, 64), begin + draw.one((1, 3, 8))))
        batch.positions += positions
        batch.slot_mapping += [table[q // size] * size + q % size if draw.chance(0.9) else -1 for q in positions]
        batch.query_start.append(len(batch.positions))
        batch.seq_lens.append(positions[-1] + 1)
        batch.tables.append(table)
    rows = len(batch.positions)
    batch.token_ids, batch.n_tokens, batch.n_seqs, batch.width = [0] * rows, rows, len(batch.seq_lens), width
    attributes = (draw.below(p.n_layers), h, p.n_kv_heads, p.head_dim, draw.one((0, 0, 2, 20)))
    floats = (p.head_dim**-0.5, draw.one((0.0, 4.0)))
    return _Call("attention", rows, widths, widths[:1], (), attributes, floats, batch, cache)


def run_op(world: World) -> None:
    """pld_op_run of any kind, good or with some things changed."""
    draw, core = world.draw, world.core
    call = _good_call(draw, world.live_caches)
    struct, op, outputs = _struct_of(draw, call)
    is_spoiled = draw.chance(0.5)
    if is_spoiled:
        for _ in range(draw.one((1, 1, 2))):
            _spoil(draw, call, struct, op, outputs)
    batch = None
    if call.batch is not None and struct.batch is not None:
        batch = call.batch.struct()
        struct.batch = addressof(batch)
    before = [out.copy() for out in outputs]
    core.about((op.tolist(), call.batch))
    context = draw.one(world.contexts)
    is_null = draw.chance(0.02)
    status = core.call("pld_op_run", None if is_null else context.handle, byref(struct))
    if not is_spoiled and not is_null and call.cache is not None:
        limits = (call.rows, call.rows, 0)
        is_good = call.cache.model is None and is_good_run(call.batch, call.cache, limits)
        core.expect(status == OK, is_good, "whether an attention of good shape is accepted")
    _check_outputs(world, call, op, struct, outputs, before, status)
    if call.cache is not None and struct.kv is not None:
        if status == OK:
            again = partial(_run_again, call.cache.index, context.isa, struct, (call, op, outputs, batch))
            world.accepted.append(again)
        world.check_refused(status, call.cache, None)


def _run_again(cache: int, isa: int, struct: structs.OpCallStruct, memory: object, twin: World) -> None:
    """On the twin's cache, by the same kernels."""
    struct.kv = twin.caches[cache].handle
    status = twin.core.call("pld_op_run", twin.context_of(isa).handle, byref(struct))
    twin.core.expect(status, OK, "status of an op done again")
    del memory


def _struct_of(draw: Draw, call: _Call) -> tuple[structs.OpCallStruct, np.ndarray, list[np.ndarray]]:
    op = abi.op_table(OP_KINDS[call.kind], call.in_widths, call.out_widths, call.weights, call.ints, call.floats)
    table = (structs.WeightStruct * structs.MAX_WEIGHTS)(*[weight.struct() for weight in call.weights])
    call.memory.append(table)
    call.table = table
    struct = structs.OpCallStruct(
        struct_size=_CALL_SIZE,
        op=op.ctypes.data,
        op_size=op.itemsize,
        rows=call.rows,
        weights=ctypes.addressof(table),
        weight_size=sizeof(structs.WeightStruct),
    )
    is_wild = draw.chance(0.2)
    for i, width in enumerate(call.in_widths):
        stride = width + draw.one((0, 0, 1, 5))
        array = draw.floats((call.rows - 1) * stride + width, wild=is_wild)
        call.memory.append(array)
        struct.in_[i], struct.in_stride[i] = array.ctypes.data, stride
    outputs = []
    for i, width in enumerate(call.out_widths):
        stride = width + draw.one((0, 0, 1, 5))
        outputs.append(np.full((call.rows, stride), _CANARY, np.float32))
        struct.out[i], struct.out_stride[i] = outputs[-1].ctypes.data, stride
    if call.batch is not None:
        struct.batch = 1
    if call.cache is not None:
        struct.kv = call.cache.handle
    return struct, op, outputs


def _spoil(draw: Draw, call: _Call, struct: structs.OpCallStruct, op: np.ndarray, outputs: list[np.ndarray]) -> None:
    """Changes one thing about which the caller still tells the truth."""
    kind = draw.below(10)
    if kind < 4:
        before = op.copy()
        damage_op(draw, op)
        _keep_honest(call, struct, op, before)
    elif kind == 4 and call.weights:
        place = draw.below(len(call.weights))
        weight = call.weights[place]
        slack = 32 if weight.layout == abi.ROW_MAJOR else 0
        spoil_weight(draw, call.table[place], weight.data.nbytes - slack, slack)
    elif kind == 5 and call.batch is not None:
        damage_run(draw, call.batch)
        if call.kind == "gather_rows":  # it is the caller's word that the input has so many rows
            call.batch.n_tokens = min(call.batch.n_tokens, call.rows)
    elif kind == 6:
        struct.rows = draw.one((0, -1, INT64_MIN, 2**31, INT64_MAX, call.rows - 1))
    elif kind == 7:
        place = draw.below(3)
        if draw.chance(0.5):
            struct.in_[place] = None
        else:
            struct.in_stride[place] = draw.one((0, -1, INT64_MIN, max(struct.in_stride[place] - 1, 0)))
    elif kind == 8:
        place = draw.below(2)
        if draw.chance(0.5):
            struct.out[place] = None
        else:
            struct.out_stride[place] = draw.one((0, -1, INT64_MIN, max(struct.out_stride[place] - 1, 0)))
    else:
        name = draw.one(("struct_size", "op", "op_size", "weights", "weight_size", "batch", "kv"))
        bad: dict[str, int] = {
            "struct_size": draw.one((0, 8, _CALL_SIZE - 16, 2**63)),
            "op_size": draw.one((1, 8, abi.OP_DTYPE.itemsize - 4, 4097, 2**64 - 1)),
            "weight_size": draw.one((1, 31, 4097, 2**63)),
        }
        setattr(struct, name, bad.get(name))


def _keep_honest(call: _Call, struct: structs.OpCallStruct, op: np.ndarray, before: np.ndarray) -> None:
    """An op that now reads what is not there says so by a null pointer: its memory is the caller's word."""
    row = op[0]
    for i in range(structs.MAX_IN):
        width = int(row["in_width"][i])
        if row["in"][i] >= 0 and (i >= len(call.in_widths) or width > call.in_widths[i]):
            row["in_width"][i] = before[0]["in_width"][i]
            if i >= len(call.in_widths):
                struct.in_[i] = None
    for i in range(2):
        if row["out"][i] >= 0 and i >= len(call.out_widths):
            struct.out[i] = None
        elif row["out"][i] >= 0 and int(row["out_width"][i]) > struct.out_stride[i]:
            row["out_width"][i] = before[0]["out_width"][i]
    for i in range(structs.MAX_WEIGHTS):
        if row["weight"][i] >= 0 and i >= len(call.weights):
            call.table[i].data = None
    if row["kind"] != before[0]["kind"] and call.batch is None:
        struct.batch = None


def _check_outputs(
    world: World,
    call: _Call,
    op: np.ndarray,
    struct: structs.OpCallStruct,
    outputs: list[np.ndarray],
    before: list[np.ndarray],
    status: int,
) -> None:
    """Refused: nothing is written. Accepted: nothing but rows and columns of the output."""
    world.core.tally.add("checks")
    for i, (out, was) in enumerate(zip(outputs, before, strict=True)):
        width = int(op[0]["out_width"][i]) if status == OK and op[0]["out"][i] >= 0 else 0
        stride, rows = int(struct.out_stride[i]), int(struct.rows)
        flat, left = out.reshape(-1).view(np.int32).copy(), was.reshape(-1).view(np.int32)
        for row in range(rows if width > 0 else 0):
            flat[row * stride : row * stride + width] = left[row * stride : row * stride + width]
        if not np.array_equal(flat, left):
            world.core.wrong(f"{call.kind}: memory outside of output {i} was written, status {status}")


# ---- conversions ---------------------------------------------------------------------------------------------------


def convert(world: World) -> None:
    """pld_convert and pld_pack of any types and shapes."""
    draw, core = world.draw, world.core
    is_pack = draw.chance(0.6)
    dtype, target = draw.one(_DTYPES), draw.one((abi.F32, abi.BF16) if not is_pack else _DTYPES)
    if draw.chance(0.05):
        dtype, target = draw.hostile(dtype), draw.hostile(target)
    cols = draw.one((1, 2, 5, 16, 31, 32, 64, 96, 256, 257, 512))
    rows = draw.one((1, 2, 3, 31, 32, 33, 64, 65))
    if draw.chance(0.1):
        rows, cols = draw.hostile64(rows), draw.hostile64(cols)
    is_small = 0 <= rows <= 4096 and 0 <= cols <= 4096
    said = abi.row_bytes(dtype, cols) * rows if is_small else draw.one((0, 1, -1, 64, INT64_MIN, INT64_MAX))
    source = draw.octets(max(said, 1)) if is_small else draw.octets(64)
    if dtype == abi.F32 and is_small and said > 0 and draw.chance(0.7):
        source = draw.floats(said // 4, wild=draw.chance(0.3)).view(np.uint8)
    if draw.chance(0.1):
        said = draw.one((said - 1, said + 1, 0, -1, INT64_MIN, INT64_MAX))
    offset, target_rows = 0, rows
    if is_pack and draw.chance(0.6):
        offset = draw.one((0, 1, 31, 32, 64, -1)) if draw.chance(0.9) else draw.hostile64(0)
        target_rows = rows + draw.one((0, 1, 63, 64)) if draw.chance(0.9) else draw.hostile64(rows)
    needed = abi.packed_bytes(target_rows, cols, target) if is_pack else rows * abi.row_bytes(target, cols)
    if is_small and needed > 2**22:
        return
    room = max(needed, 0) if is_small else 64
    has = room if draw.chance(0.9) else draw.one((room - 1, 0, -1, INT64_MIN, INT64_MAX))
    memory = fenced(room + 64)
    memory[max(min(has, room), 0) :] = 171
    before = memory.copy()
    arguments: list[Any] = [draw.one(world.contexts).handle, source.ctypes.data, said, dtype, rows, cols]
    arguments += [offset, target_rows] if is_pack else []
    arguments += [memory.ctypes.data, has, target]
    if draw.chance(0.03):
        arguments[draw.one((0, 1, 8 if is_pack else 6))] = None
    status = core.call("pld_pack" if is_pack else "pld_convert", *arguments)
    core.tally.add("checks")
    kept = min(has, room) if status == OK else 0
    if not np.array_equal(memory[kept:], before[kept:]):
        core.wrong(f"memory outside of the target was written, status {status}")
    core.peek("pld_row_bytes", dtype, cols)


def sizes(world: World) -> None:
    """pld_row_bytes and pld_packed_bytes: never negative, and in proportion."""
    draw, core = world.draw, world.core
    dtype, cols, rows = draw.hostile(draw.one(_DTYPES)), draw.hostile64(256), draw.hostile64(64)
    if draw.chance(0.5):
        dtype = draw.one(_DTYPES)
    one = core.get("pld_row_bytes", dtype, cols)
    packed = core.get("pld_packed_bytes", rows, cols, dtype)
    core.expect(one >= 0 and packed >= 0, True, f"whether sizes {one} and {packed} are not below 0")
    if packed > 0:
        core.expect(rows >= 1 and cols >= 1 and packed >= rows * cols // 2, True, f"whether {packed} bytes hold all")


# ---- sampling ------------------------------------------------------------------------------------------------------


def sample(world: World) -> None:
    """pld_sample of rows with any numbers and lists."""
    draw, core = world.draw, world.core
    vocab, count = draw.one((1, 2, 15, 16, 17, 33, 70, 300)), draw.one((1, 1, 2, 4))
    stride = vocab + draw.one((0, 0, 3))
    with np.errstate(invalid="ignore", over="ignore"):
        logits = draw.floats((count - 1) * stride + vocab, wild=draw.chance(0.15)) * np.float32(draw.one((1, 4, 0)))
    memory: list[Any] = [logits]
    rows = [_sample_row(draw, vocab, memory) for _ in range(count)]
    pointers = (ctypes.c_void_p * count)(*map(addressof, rows))
    results = np.full(count, 0, abi.SAMPLE_RESULT_DTYPE)
    results["token"], results["status"] = -99, -98
    arguments = [
        draw.one(world.contexts).handle,
        logits.ctypes.data,
        stride,
        vocab,
        pointers,
        count,
        results.ctypes.data,
    ]
    is_spoiled = draw.chance(0.1)
    if is_spoiled:
        place = draw.below(7)
        bad = {2: (vocab - 1, 0, -1, INT64_MIN), 3: (0, -1, -(2**31)), 5: (0, -1, -(2**31))}
        arguments[place] = draw.one(bad[place]) if place in bad else None
        if draw.chance(0.3):
            arguments = [*arguments[:4], (ctypes.c_void_p * count)(), *arguments[5:]]
    if draw.chance(0.5):
        status = core.call("pld_sample", *arguments)
    else:
        call = structs.SampleCallStruct(sizeof(structs.SampleCallStruct), *arguments[1:4], count)
        call.n_rows, call.results, call.result_size = arguments[5], arguments[6], draw.one((0, results.itemsize))
        call.rows = None if arguments[4] is None else addressof(arguments[4])
        status = core.call("pld_sample_run", arguments[0], byref(call))
    core.tally.add("checks")
    if status != OK:
        if (results["token"] != -99).any() or (results["status"] != -98).any():
            core.wrong("a refused pld_sample wrote results")
        return
    if is_spoiled:
        core.wrong("a spoiled pld_sample was accepted")
    for i, (row, result) in enumerate(zip(rows, results, strict=True)):
        _check_sampled(world, row, logits[i * stride : i * stride + vocab], result)


def _list_of(draw: Draw, vocab: int, memory: list[Any]) -> tuple[int, int | None]:
    """(count, address): ids in and out of the vocabulary; a null where there are none, or as a fault."""
    kind = draw.below(10)
    if kind < 5:
        return (0, None) if kind else (-draw.below(3), None)
    ids = [draw.below(vocab) if draw.chance(0.9) else draw.hostile(0) for _ in range(draw.one((1, 2, 5, vocab)))]
    ids = list(dict.fromkeys(ids))
    memory.append(ints(ids))
    return (len(ids), None) if draw.chance(0.01) else (len(ids), addressof(memory[-1]))


def _sample_row(draw: Draw, vocab: int, memory: list[Any]) -> structs.SampleRowStruct:
    row = structs.SampleRowStruct(sizeof(structs.SampleRowStruct))
    row.repetition_penalty = 1.0 if draw.chance(0.5) else draw.real()
    row.frequency_penalty = 0.0 if draw.chance(0.6) else draw.real()
    row.presence_penalty = 0.0 if draw.chance(0.6) else draw.real()
    row.temperature = draw.one((0.0, 0.7, 1.0)) if draw.chance(0.7) else draw.real()
    row.top_k = draw.one((0, 0, 1, 2, 5, vocab, vocab + 1, -1, 2**31 - 1, -(2**31)))
    row.top_p = draw.one((1.0, 0.9, 0.5, 5e-324, 1e-300)) if draw.chance(0.8) else draw.real()
    row.min_p = draw.one((0.0, 0.1, 1.0, 1e-45)) if draw.chance(0.8) else draw.real()
    row.n_seen, row.seen_ids = _list_of(draw, vocab, memory)
    row.n_counted, row.counted_ids = _list_of(draw, vocab, memory)
    row.n_biases, row.bias_ids = _list_of(draw, vocab, memory)
    row.n_banned, row.banned_ids = _list_of(draw, vocab, memory)
    row.n_allowed, row.allowed_ids = _list_of(draw, vocab, memory) if draw.chance(0.3) else (-1, None)
    row.n_stops, row.stop_ids = _list_of(draw, vocab, memory)
    for name, count in (("counts", row.n_counted), ("biases", row.n_biases)):
        if count > 0:
            memory.append(draw.floats(count, wild=draw.chance(0.1)))
            setattr(row, name, memory[-1].ctypes.data)
    if draw.chance(0.2):
        memory.append(draw.octets(4 * -(-vocab // 32)))
        row.mask = memory[-1].ctypes.data
    row.min_tokens = draw.one((0, 0, 3, -1, 2**31 - 1))
    row.seed, row.position = draw.getrandbits(64), draw.one((0, 1, 5, 2**32, 2**64 - 1))
    row.choice, row.wants_log_sum_exp = draw.getrandbits(3), draw.below(2)
    if draw.chance(0.02):
        row.struct_size = draw.one((0, 8, row.struct_size - 8, 4097))
    if draw.chance(0.05):
        fields = tail(draw)
        row.struct_size += len(fields)
        row = with_tail(row, fields)
    return row


def _check_sampled(world: World, row: structs.SampleRowStruct, logits: np.ndarray, result: Any) -> None:
    """The token may come, and the row's figures are those of its logits."""
    core, token, status = world.core, int(result["token"]), int(result["status"])
    is_finite = not np.isnan(logits).any() and bool(np.isfinite(logits.max()))
    core.expect(status in (0, 1, 2, 3), True, f"whether {status} is a status of sampling")
    core.expect(status == 1, not is_finite, "whether the row is found not to be finite")
    core.expect(0 <= token < len(logits) if status == 0 else token == -1, True, f"whether token {token} may be")
    if status == 1:
        return
    core.expect(float(result["max"]), float(logits.max()), "the greatest logit")
    if status in (2, 3):
        return
    if row.mask:
        word = ctypes.cast(row.mask, ctypes.POINTER(ctypes.c_uint32))[token // 32]
        core.expect(word >> (token % 32) & 1, 1, f"the mask's bit of token {token}")
    if row.n_allowed >= 0:
        core.expect(token in _ids(row.allowed_ids, row.n_allowed), True, f"whether token {token} is allowed")
    core.expect(token in _ids(row.banned_ids, row.n_banned), False, f"whether token {token} is banned")
    if row.position < max(row.min_tokens, 0):
        core.expect(token in _ids(row.stop_ids, row.n_stops), False, f"whether token {token} is a stop")


def _ids(address: int | None, count: int) -> list[int]:
    return list(ctypes.cast(address, ctypes.POINTER(ctypes.c_int32))[:count]) if address and count > 0 else []
