"""Single op calls: what does not fit is refused by name before any memory is touched."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from pellucid.contract.batch import BatchInput, single_sequence_batch
from pellucid.core import abi, structs
from pellucid.errors import NativeError
from pellucid.ops.spec import OP_KINDS

ROWS, CANARY = 3, -77.0


@pytest.fixture(scope="module")
def context() -> abi.Context:
    return abi.Context(num_threads=2)


def panels(rows: int, cols: int) -> abi.Weight:
    return abi.Weight(abi.aligned_bytes(abi.packed_bytes(rows, cols, abi.F32)), rows, cols, abi.F32, abi.PANELS)


def vector(cols: int) -> abi.Weight:
    return abi.Weight(np.zeros(4 * cols, np.uint8), 1, cols, abi.F32, abi.ROW_MAJOR)


class Call:
    """A good call of one op on buffers of its own, which a case then spoils."""

    def __init__(
        self,
        kind: str,
        in_widths: tuple[int, ...],
        out_widths: tuple[int, ...],
        weights: tuple[abi.Weight, ...] = (),
        ints: tuple[int, ...] = (),
        floats: tuple[float, ...] = (),
        *,
        batch: BatchInput | None = None,
        with_kv: bool = False,
    ) -> None:
        self.op = abi.op_table(OP_KINDS[kind], in_widths, out_widths, weights, ints, floats)
        self.inputs = [np.zeros((ROWS, width), np.float32) for width in in_widths]
        self.outputs = [np.full((ROWS, width), CANARY, np.float32) for width in out_widths]
        self.table = (structs.WeightStruct * structs.MAX_WEIGHTS)(*[weight.struct() for weight in weights])
        self.struct = structs.OpCallStruct(
            struct_size=ctypes.sizeof(structs.OpCallStruct),
            op=self.op.ctypes.data,
            op_size=self.op.itemsize,
            rows=ROWS,
            weights=ctypes.addressof(self.table),
            weight_size=ctypes.sizeof(structs.WeightStruct),
        )
        for i, array in enumerate(self.inputs):
            self.struct.in_[i], self.struct.in_stride[i] = array.ctypes.data, array.shape[1]
        for i, array in enumerate(self.outputs):
            self.struct.out[i], self.struct.out_stride[i] = array.ctypes.data, array.shape[1]
        self.weights = weights
        self.batch = batch
        if batch is not None:
            self.batch_struct = abi.batch_struct(batch)
            self.struct.batch = ctypes.addressof(self.batch_struct)
        if with_kv:
            self.kv = abi.KVCache(n_layers=1, n_kv_heads=1, head_dim=4, block_size=4, n_blocks=2, dtype=abi.F32)
            self.struct.kv = self.kv.handle

    def run(self, context: abi.Context) -> None:
        abi.check(abi.library().pld_op_run(context.handle, ctypes.byref(self.struct)))


def good_calls() -> dict[str, Call]:
    batch = single_sequence_batch([0, 1, 2], 4)
    return {
        "embedding": Call("embedding", (), (4,), (panels(8, 4),), batch=batch),
        "linear": Call("linear", (4,), (5,), (panels(5, 4), vector(5))),
        "rms_norm": Call("rms_norm", (6, 6), (6, 6), (vector(3),), (2,), (1e-6,)),
        "layer_norm": Call("layer_norm", (6,), (6,), (vector(6), vector(6)), (), (1e-6,)),
        "rope_table": Call("rope_table", (), (6,), (vector(3),), (), (1.0,), batch=batch),
        "rotary": Call("rotary", (12, 4), (12,), (), (6, 0)),
        "attention": Call("attention", (8, 4, 4), (8,), (), (0, 2, 1, 4, 0), (0.5, 0), batch=batch, with_kv=True),
        "act_and_mul": Call("act_and_mul", (10,), (5,), (), (1,)),
        "act": Call("act", (5,), (5,), (), (1,)),
        "add": Call("add", (5, 5), (5,)),
        "scale": Call("scale", (5,), (5,), (), (), (2.0,)),
        "softcap": Call("softcap", (5,), (5,), (), (), (2.0,)),
        "moe": Call("moe", (64, 2), (64,), (panels(256, 64), panels(128, 64)), (2, 1, 1, 0)),
        "gather_rows": Call("gather_rows", (5,), (5,), batch=batch),
        "sample": Call("sample", (5,), (4,)),
    }


def test_good_calls_when_run_then_every_op_writes_all_of_its_outputs(context: abi.Context) -> None:
    calls = good_calls()
    assert set(calls) == set(OP_KINDS)
    for kind, call in calls.items():
        call.run(context)
        assert not any((array == CANARY).any() for array in call.outputs), kind


# op, what is spoiled (a path into the op's fields, the call or the batch), the value, and the reason given
SPOILED: tuple[tuple[str, str, Any, str], ...] = (
    ("act", "call.struct_size", 8, "op_call.struct_size is 8"),
    ("act", "call.op", None, "op is null"),
    ("act", "call.rows", 0, r"rows is 0; it must be in \[1, 2\^31\)"),
    ("act", "call.rows", 2**31, "rows is 2147483648"),
    ("act", "call.rows", -(2**63), "rows is -9223372036854775808"),
    ("act", "call.in_.0", None, "input 0 is null"),
    ("act", "call.in_stride.0", 4, "stride is below its width 5"),
    ("act", "call.in_stride.0", -5, "stride is below its width 5"),
    ("act", "call.out.0", None, "output 0 is null"),
    ("act", "call.out_stride.0", 4, "stride is below its width 5"),
    ("act", "op.kind", 0, "op kind 0 is unknown"),
    ("act", "op.kind", 16, "op kind 16 is unknown"),
    ("act", "op.in", [-1, -1, -1], "act: input 0 is absent"),
    ("act", "op.in", [0, 1, -1], "act takes no input 1"),
    ("act", "op.in_width", [0, 0, 0], "act: input 0 has column 0 and width 0"),
    ("act", "op.in_width", [2**26 + 1, 0, 0], "the limit is 67108864"),
    ("act", "op.in_width", [4, 0, 0], "act: input and output must have one width"),
    ("act", "op.out", [-1, -1], "act: output 0 must be there"),
    ("act", "op.out", [0, 1], "act: output 1 must not be there"),
    ("act", "op.i", [5, 0, 0, 0, 0, 0], "act: input and output"),
    ("act", "op.weight", [0, -1], "weight 0: data"),
    ("embedding", "call.batch", None, "batch is null"),
    ("embedding", "batch.struct_size", 4, "batch.struct_size is 4"),
    ("embedding", "batch.n_tokens", 2, "n_tokens is 2; rows is 3"),
    ("embedding", "batch.token_ids", None, "n_tokens is 3; rows is 3"),
    ("embedding", "weight.0.rows", 2, r"token_ids\[2\] is 2; it must be in \[0, 2\)"),
    ("embedding", "weight.0.cols", 3, r"embedding: weight 0 is \[8, 3\]"),
    ("linear", "weight.0.data", None, "weight 0: data"),
    ("linear", "weight.0.rows", 2**62, "weight 0: its size overflows"),
    ("linear", "weight.0.rows", 0, "weight 0: data"),
    ("linear", "weight.0.dtype", 2, "dtype 2"),
    ("linear", "weight.0.layout", 7, "layout 7"),
    ("linear", "weight.0.layout", 0, r"layout 0; it must be \[5, 4\] in panels"),
    ("linear", "weight.1.cols", 4, r"linear: weight 1 is \[1, 4\]; it must be float32 \[5\]"),
    ("linear", "weight.1.dtype", 1, "it must be float32"),
    ("rms_norm", "op.i", [4, 0, 0, 0, 0, 0], "groups must divide the width"),
    ("rms_norm", "op.i", [0, 0, 0, 0, 0, 0], "groups must divide the width"),
    ("rms_norm", "op.i", [-(2**31), 0, 0, 0, 0, 0], "groups must divide the width"),
    ("rms_norm", "op.f", [-1, 0, 0, 0], "eps must be finite"),
    ("rms_norm", "op.out", [0, -1], "output 1 must be there"),
    ("layer_norm", "op.f", [np.inf, 0, 0, 0], "eps must be finite"),
    ("layer_norm", "weight.1.cols", 5, r"it must be float32 \[6\]"),
    ("rope_table", "op.out_width", [5, 0], "the table's width must be even"),
    ("rope_table", "weight.0.cols", 2, r"it must be float32 \[3\]"),
    ("rope_table", "batch.positions", None, "n_tokens is 3; rows is 3"),
    ("rotary", "op.i", [5, 0, 0, 0, 0, 0], "rotary: head width"),
    ("rotary", "op.i", [0, 0, 0, 0, 0, 0], "rotary: head width"),
    ("rotary", "op.i", [2, 0, 0, 0, 0, 0], "rotary: head width"),
    ("rotary", "op.i", [6, 2, 0, 0, 0, 0], "rotary: head width"),
    ("rotary", "op.in_width", [12, 3, 0], "rotary: head width"),
    ("attention", "call.kv", None, "attention: kv is null"),
    ("attention", "op.i", [1, 2, 1, 4, 0, 0], "attention: layer 1"),
    ("attention", "op.i", [-1, 2, 1, 4, 0, 0], "attention: layer, heads"),
    ("attention", "op.i", [0, 2, 0, 4, 0, 0], "attention: layer, heads"),
    ("attention", "op.i", [0, 2, 1, 4, -1, 0], "attention: layer, heads"),
    ("attention", "op.i", [0, 4, 1, 2, 0, 0], "heads times head width"),
    ("attention", "op.i", [0, 2**30, 1, 2**30, 0, 0], "head width must be at most 1024"),
    ("attention", "batch.n_tokens", 2, "n_tokens is 2; rows is 3"),
    ("attention", "batch.n_seqs", 0, "n_seqs is 0"),
    ("attention", "batch.block_table_width", 0, "block_table_width is 0"),
    ("attention", "batch.slot_mapping", None, "an array of the batch is null"),
    ("act_and_mul", "op.out_width", [6, 0], "twice as wide"),
    ("add", "op.in_width", [5, 4, 0], "one width"),
    ("scale", "op.f", [np.nan, 0, 0, 0], "factor be finite"),
    ("softcap", "op.f", [0, 0, 0, 0], "the cap be above 0"),
    ("moe", "op.i", [2, 3, 1, 0, 0, 0], "top_k"),
    ("moe", "op.i", [2, 0, 1, 0, 0, 0], "top_k"),
    ("moe", "op.i", [513, 1, 1, 0, 0, 0], "at most 512"),
    ("moe", "op.i", [2, 1, 9, 0, 0, 0], "activation"),
    ("moe", "weight.1.cols", 63, "multiples of 64"),
    ("moe", "weight.1.cols", 2**53, "within the limit"),
    ("moe", "weight.0.rows", 128, r"moe: weight 0 is \[128, 64\]"),
    ("gather_rows", "call.batch", None, "batch is null"),
    ("gather_rows", "batch.n_logit_rows", 2, "n_logit_rows is 2; rows is 3"),
    ("gather_rows", "batch.n_tokens", 2, r"logit_rows\[2\] is 2; it must be in \[0, 2\)"),
    ("gather_rows", "batch.logit_rows", None, "n_logit_rows is 3; rows is 3"),
    ("sample", "op.out_width", [5, 0], "the output must be 4 wide"),
)


def spoil(call: Call, path: str, value: Any) -> None:
    where, *fields = path.split(".")
    if where == "op":
        fill = -1 if fields[0] in ("in", "out", "weight") else 0
        call.op[0][fields[0]] = fill
        if isinstance(value, list):
            call.op[0][fields[0]][: len(value)] = value
        else:
            call.op[0][fields[0]] = value
        return
    target: Any = call.batch_struct if where == "batch" else call.struct
    if where == "weight":
        setattr(call.table[int(fields[0])], fields[1], value)
    elif len(fields) == 2:
        getattr(target, fields[0])[int(fields[1])] = value
    else:
        setattr(target, fields[0], value)


@pytest.mark.parametrize(("kind", "path", "value", "message"), SPOILED)
def test_call_when_one_thing_is_spoiled_then_refused_and_nothing_is_written(
    context: abi.Context, kind: str, path: str, value: Any, message: str
) -> None:
    call = good_calls()[kind]
    spoil(call, path, value)
    with pytest.raises(NativeError, match=message):
        call.run(context)
    assert all((array == CANARY).all() for array in call.outputs)


@pytest.mark.parametrize(
    ("kind", "path", "value", "blamed"),
    [
        ("embedding", "weight.0.rows", 2, ("token", 2)),
        ("gather_rows", "batch.n_tokens", 2, ("logit_row", 2)),
        ("embedding", "batch.n_tokens", 2, (None, -1)),
    ],
)
def test_call_when_one_row_is_wrong_then_the_error_names_it(
    context: abi.Context, kind: str, path: str, value: Any, blamed: tuple[str | None, int]
) -> None:
    call = good_calls()[kind]
    spoil(call, path, value)
    with pytest.raises(NativeError) as caught:
        call.run(context)
    assert (caught.value.item, caught.value.index) == blamed


def test_context_when_null_then_refused() -> None:
    call = good_calls()["act"]
    with pytest.raises(NativeError, match="context is null"):
        abi.check(abi.library().pld_op_run(None, ctypes.byref(call.struct)))
