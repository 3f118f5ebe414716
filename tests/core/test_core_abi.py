"""The C ABI refuses what is wrong, by status and text, and its structures are those of the header."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from utils.children import finished

from pellucid.contract.batch import BatchInput, single_sequence_batch
from pellucid.core import abi, structs
from pellucid.errors import ConfigError, NativeError
from pellucid.ops.spec import OP_KINDS
from pellucid.program.builder import encode_buffers, encode_ops
from pellucid.program.tracer import RecordedOp, RecordedWeight, Recording

INVALID_BATCH, INVALID_ARGUMENT = -1, -2


@pytest.fixture(scope="module")
def context() -> abi.Context:
    return abi.Context(num_threads=2)


def tiny_program(context: abi.Context, **changes: Any) -> tuple[abi.Program, abi.KVCache]:
    """Embedding of 8 tokens by 4, attention with one head, then a head over the 8 tokens."""
    recording = Recording(widths=[4, 4, 4, 8], domains=["T", "T", "L", "L"], n_forward_ops=2, hidden=1, logits=3)
    recording.weights = [RecordedWeight("w", None, (8, 4), "matrix")]
    recording.ops = [
        RecordedOp("embedding", (None,), (0,), (0,), (), ()),
        RecordedOp("attention", ((0, 0, 4), (0, 0, 4), (0, 0, 4)), (1,), (), (0, 1, 1, 4, 0), (0.5, 0.0)),
        RecordedOp("gather_rows", ((1, 0, 4),), (2,), (), (), ()),
        RecordedOp("linear", ((2, 0, 4),), (3,), (0, None), (0,), ()),
    ]
    ops, buffers = encode_ops(recording), encode_buffers(recording)
    data = abi.aligned_bytes(abi.packed_bytes(8, 4, abi.F32))
    settings = {"n_forward_ops": 2, "hidden": 1, "logits": 3, "vocab_size": 8, "max_tokens": 16, "max_logit_rows": 4}
    change: Callable[[Any, Any], None] = changes.pop("change", lambda ops, buffers: None)
    change(ops, buffers)
    weights = [abi.Weight(data, 8, changes.pop("weight_cols", 4), abi.F32, abi.PANELS)]
    program = abi.Program(context, ops, buffers, weights, **{**settings, **changes})
    kv = abi.KVCache(n_layers=1, n_kv_heads=1, head_dim=4, block_size=4, n_blocks=4, dtype=abi.F32)
    return program, kv


def batch_with(**changes: Any) -> BatchInput:
    """A good batch of two sequences (5 and 3 tokens, the second behind 2 computed ones), with changes."""
    good = {
        "input_ids_T": np.array([1, 2, 3, 4, 5, 6, 7, 0], np.int32),
        "positions_T": np.array([0, 1, 2, 3, 4, 2, 3, 4], np.int32),
        "query_start": np.array([0, 5, 8], np.int32),
        "seq_lens": np.array([5, 5], np.int32),
        "block_tables": np.array([[0, 1], [3, 2]], np.int32),
        "slot_mapping_T": np.array([0, 1, 2, 3, 4, 14, 15, 8], np.int64),
        "logit_rows": np.array([4, 7], np.int32),
    }
    for name, change in changes.items():
        array = good[name].copy()
        if isinstance(change, dict):
            for index, value in change.items():
                array[index] = value
        else:
            array = np.asarray(change, array.dtype)
        good[name] = array
    return BatchInput(**good)


def test_good_batch_when_run_then_logits_of_its_rows(context: abi.Context) -> None:
    program, kv = tiny_program(context)
    program.run(kv, batch_with())
    assert program.logits(2).shape == (2, 8)
    assert program.hidden().shape == (8, 4)
    assert program.arena_bytes > 0


HOSTILE_BATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "token out of vocabulary": ({"input_ids_T": {3: 8}}, r"token_ids\[3\] is 8; it must be in \[0, 8\)"),
    "negative token": ({"input_ids_T": {0: -1}}, r"token_ids\[0\] is -1"),
    "position jumps": ({"positions_T": {2: 3}}, r"positions\[2\] is 3; by seq_lens\[0\] it must be 2"),
    "query_start not from 0": ({"query_start": [1, 5, 8]}, "query_start runs from 1"),
    "query_start not to T": ({"query_start": [0, 5, 7]}, "query_start runs from 0 to 7"),
    "query_start descends": ({"query_start": {1: 0}}, r"query_start\[1\] is 0"),
    "query_start beyond T": ({"query_start": {1: 99}}, r"query_start\[1\] is 99"),
    "seq_len below its tokens": ({"seq_lens": {0: 4}}, r"seq_lens\[0\] is 4; the step alone has 5"),
    "seq_len beyond its table": (
        {"seq_lens": {1: 9}},
        r"seq_lens\[1\] is 9 and needs 3 blocks; block_table_width is 2",
    ),
    "seq_len near overflow": ({"seq_lens": {0: 2**31 - 1}}, r"seq_lens\[0\] is 2147483647"),
    "block beyond the cache": ({"block_tables": {(0, 1): 4}}, r"block_tables\[0\]\[1\] is 4; it must be in \[0, 4\)"),
    "block absent": ({"block_tables": {(1, 1): -1}}, r"block_tables\[1\]\[1\] is -1"),
    "slot beside its block": ({"slot_mapping_T": {0: 1}}, r"slot_mapping\[0\] is 1; by the block table it must be 0"),
    "slot beyond the cache": ({"slot_mapping_T": {7: 2**40}}, r"slot_mapping\[7\] is 1099511627776"),
    "slot below -1": ({"slot_mapping_T": {7: -2}}, r"slot_mapping\[7\] is -2"),
    "cell written twice": (
        {"block_tables": [[0, 1], [0, 2]], "slot_mapping_T": {5: 2, 6: 3}},
        r"slot_mapping\[5\] is 2, which another token of the batch writes",
    ),
    "logit row beyond T": ({"logit_rows": {1: 8}}, r"logit_rows\[1\] is 8; it must be in \[0, n_tokens = 8\)"),
    "negative logit row": ({"logit_rows": {0: -1}}, r"logit_rows\[0\] is -1"),
    "too many logit rows": ({"logit_rows": [0, 1, 2, 3, 4]}, r"n_logit_rows is 5; it must be in \[0, 4\]"),
    "more sequences than tokens": (
        {"seq_lens": [1] * 9, "query_start": range(10), "block_tables": [[0, 1]] * 9},
        r"n_seqs is 9; it must be in \[1, n_tokens = 8\]",
    ),
}


# What each is about, where it is about one token, sequence or row: a batch without that one would be good.
BLAMED: dict[str, tuple[str, int]] = {
    "token out of vocabulary": ("token", 3),
    "negative token": ("token", 0),
    "position jumps": ("token", 2),
    "seq_len below its tokens": ("sequence", 0),
    "seq_len beyond its table": ("sequence", 1),
    "seq_len near overflow": ("sequence", 0),
    "block beyond the cache": ("sequence", 0),
    "block absent": ("sequence", 1),
    "slot beside its block": ("token", 0),
    "slot beyond the cache": ("token", 7),
    "slot below -1": ("token", 7),
    "logit row beyond T": ("logit_row", 1),
    "negative logit row": ("logit_row", 0),
}


@pytest.mark.parametrize("case", HOSTILE_BATCHES)
def test_hostile_batch_when_run_then_refused_whole_and_the_cache_is_untouched(context: abi.Context, case: str) -> None:
    changes, message = HOSTILE_BATCHES[case]
    program, kv = tiny_program(context)
    program.run(kv, batch_with())
    before = [kv.read(0, cell) for cell in range(16)]
    with pytest.raises(NativeError, match=message) as caught:
        program.run(kv, batch_with(**changes))
    assert caught.value.status == INVALID_BATCH
    assert (caught.value.item, caught.value.index) == BLAMED.get(case, (None, -1))
    for cell, (k, v) in enumerate(before):
        assert np.array_equal(kv.read(0, cell)[0], k)
        assert np.array_equal(kv.read(0, cell)[1], v)


def test_too_many_tokens_when_run_then_refused_with_the_limit(context: abi.Context) -> None:
    program, _ = tiny_program(context)
    kv = abi.KVCache(n_layers=1, n_kv_heads=1, head_dim=4, block_size=4, n_blocks=8, dtype=abi.F32)
    with pytest.raises(NativeError, match=r"n_tokens is 17; it must be in \[1, 16\]"):
        program.run(kv, single_sequence_batch([0] * 17, 4))


def _set(table: str, index: int, field: str, value: Any) -> Callable[[Any, Any], None]:
    def change(ops: Any, buffers: Any) -> None:
        row = (ops if table == "ops" else buffers)[index]
        if isinstance(value, list):
            row[field][: len(value)] = value
        else:
            row[field] = value

    return change


HOSTILE_PROGRAMS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown kind": ({"change": _set("ops", 0, "kind", 99)}, "op kind 99 is unknown"),
    "negative kind": ({"change": _set("ops", 0, "kind", -5)}, "op kind -5 is unknown"),
    "input beyond the buffers": ({"change": _set("ops", 3, "in", [9, -1, -1])}, "op 3: input 0 is buffer 9"),
    "columns beyond the buffer": (
        {"change": _set("ops", 3, "in_col", [2, 0, 0])},
        r"op 3: input 0 is buffer 2, columns \[2",
    ),
    "output beyond the buffers": ({"change": _set("ops", 0, "out", [9, -1])}, "op 0: output 0 is buffer 9"),
    "output wider than its buffer": ({"change": _set("buffers", 0, "width", 3)}, "op 0: output 0 is buffer 0"),
    "output behind a gap": ({"change": _set("ops", 0, "out_col", [1, 0])}, "op 0: output 0 is buffer 0"),
    "input not written yet": ({"change": _set("ops", 3, "in", [3, -1, -1])}, "op 3: input 0"),
    "output over its input": ({"change": _set("buffers", 1, "slot", 0)}, "op 1: output 0 shares the slot of input 0"),
    "slot out of range": ({"change": _set("buffers", 0, "slot", 77)}, "buffer 0: width 4, slot 77"),
    "slot of both domains": ({"change": _set("buffers", 2, "slot", 0)}, "slot 0 holds buffers of both domains"),
    "width zero": ({"change": _set("buffers", 3, "width", 0)}, "buffer 3: width 0"),
    "weight out of range": ({"change": _set("ops", 0, "weight", [7, -1])}, "op 0: weight 0 is 7; there are 1"),
    "weight of another shape": ({"weight_cols": 3}, r"embedding: weight 0 is \[8, 3\]"),
    "weight absent": ({"change": _set("ops", 0, "weight", [-1, -1])}, "embedding: weight 0 is absent"),
    "heads that do not fit": ({"change": _set("ops", 1, "i", [0, 2, 1, 4, 0, 0])}, "attention: q, k, v"),
    "odd head width": ({"change": _set("ops", 1, "i", [0, 1, 1, 3, 0, 0])}, "attention: layer, heads"),
    "scale not finite": ({"change": _set("ops", 1, "f", [np.nan, 0, 0, 0])}, "attention: scale and softcap"),
    "unknown activation": ({"change": _set("ops", 3, "i", [9, 0, 0, 0, 0, 0])}, "linear: unknown activation"),
    "second part without a gather": ({"n_forward_ops": 1}, "the second part, and only it, begins with gather_rows"),
    "logits of another width": ({"vocab_size": 9}, r"logits \[L, vocab_size 9\]"),
    "hidden of the wrong domain": ({"hidden": 2}, r"hidden must be \[T, D\]"),
    "kept out of range": ({"kept": [9]}, r"kept\[0\] is 9; it must be a buffer"),
    "kept of the wrong domain": ({"kept": [2]}, r"kept\[0\] is 2; it must be a buffer \[T, any\]"),
    "kept but overwritten": (
        {"kept": [0], "change": _set("buffers", 1, "slot", 0)},
        "op 1: output 0 shares the slot of input 0",
    ),
    "no tokens": ({"max_tokens": 0}, "max_tokens is 0"),
    "too many tokens": ({"max_tokens": 2**30}, "max_tokens is 1073741824"),
}


@pytest.mark.parametrize("case", HOSTILE_PROGRAMS)
def test_hostile_program_when_created_then_refused_with_a_reason(context: abi.Context, case: str) -> None:
    changes, message = HOSTILE_PROGRAMS[case]
    with pytest.raises(NativeError, match=message) as caught:
        tiny_program(context, **dict(changes))
    assert caught.value.status == INVALID_ARGUMENT


def test_cache_of_another_model_when_run_then_refused(context: abi.Context) -> None:
    program, _ = tiny_program(context)
    other = abi.KVCache(n_layers=1, n_kv_heads=2, head_dim=4, block_size=4, n_blocks=4, dtype=abi.F32)
    with pytest.raises(NativeError, match="attention of layer 0 has kv heads 1 of 4; the cache has 1 layers, 2 of 4"):
        program.run(other, batch_with())


def test_rows_of_the_last_run_when_asked_again_then_same_logits_and_bad_rows_refused(context: abi.Context) -> None:
    program, kv = tiny_program(context)
    with pytest.raises(NativeError, match=r"rows\[0\] is 0; the last run left 0"):
        program.run_logits(np.array([0], np.int32))
    program.run(kv, batch_with())
    first = program.logits(2).copy()
    program.run_logits(np.array([7, 4], np.int32))
    assert np.array_equal(program.logits(2), first[::-1])
    for rows in ([], [0] * 5, [8], [-1]):
        with pytest.raises(NativeError):
            program.run_logits(np.array(rows, np.int32))


def test_context_when_threads_or_isa_are_impossible_then_refused() -> None:
    with pytest.raises(NativeError, match=r"num_threads is -1; it must be in \[0, 256\]"):
        abi.Context(num_threads=-1)
    with pytest.raises(NativeError, match="num_threads is 257"):
        abi.Context(num_threads=257)
    with pytest.raises(ConfigError, match="isa is 'mmx'"):
        abi.Context(isa="mmx")


def test_handle_when_closed_then_says_so_and_closes_twice() -> None:
    context = abi.Context(num_threads=3)
    assert context.num_threads == 3
    context.close()
    context.close()
    with pytest.raises(NativeError, match="Context is closed"):
        _ = context.num_threads


def test_nulls_and_short_structs_when_passed_then_status_and_no_crash(context: abi.Context) -> None:
    lib = abi.library()
    assert lib.pld_cpu_info_get(None) == INVALID_ARGUMENT
    assert lib.pld_cpu_info_get(ctypes.byref(structs.CpuInfoStruct(struct_size=8))) == INVALID_ARGUMENT
    assert b"struct_size is 8" in lib.pld_last_error()
    assert lib.pld_context_create(None, None) == INVALID_ARGUMENT
    assert lib.pld_kv_create(None, None) == INVALID_ARGUMENT
    assert lib.pld_program_create(context.handle, None, None) == INVALID_ARGUMENT
    assert lib.pld_program_run(None, None, None) == INVALID_ARGUMENT
    assert lib.pld_op_run(context.handle, None) == INVALID_ARGUMENT
    assert lib.pld_convert(context.handle, None, 0, 0, 1, 1, None, 0, 0) == INVALID_ARGUMENT
    assert lib.pld_pack(None, None, 0, 0, 1, 1, 0, 1, None, 0, 0) == INVALID_ARGUMENT
    lib.pld_context_destroy(None)
    lib.pld_kv_destroy(None)
    lib.pld_program_destroy(None)
    assert lib.pld_program_hidden(None) is None


def test_core_when_many_contexts_come_and_go_then_threads_end() -> None:
    before = len(list(Path("/proc/self/task").iterdir()))
    for _ in range(20):
        abi.Context(num_threads=4).close()
    assert len(list(Path("/proc/self/task").iterdir())) == before


STRUCTS = {
    "pld_cpu_info": structs.CpuInfoStruct,
    "pld_context_params": structs.ContextParamsStruct,
    "pld_weight": structs.WeightStruct,
    "pld_kv_params": structs.KVParamsStruct,
    "pld_batch": structs.BatchStruct,
    "pld_op_call": structs.OpCallStruct,
    "pld_program_desc": structs.ProgramDescStruct,
    "pld_sample_row": structs.SampleRowStruct,
    "pld_sample_call": structs.SampleCallStruct,
    "pld_model_params": structs.ModelParamsStruct,
    "pld_model_info": structs.ModelInfoStruct,
    "pld_verify_params": structs.VerifyParamsStruct,
    "pld_decode_batch": structs.DecodeBatchStruct,
}


def test_structures_when_compiled_by_a_c_compiler_then_sizes_and_offsets_are_those_of_ctypes(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    header = Path(__file__).resolve().parents[2] / "csrc" / "include"
    lines = ["#include <stdio.h>", "#include <stddef.h>", '#include "pellucid.h"', "int main(void) {"]
    expected = []
    for name, struct in STRUCTS.items():
        lines.append(f'  printf("%zu\\n", sizeof({name}));')
        expected.append(ctypes.sizeof(struct))
        for field, *_ in struct._fields_:
            lines.append(f'  printf("%zu\\n", offsetof({name}, {field.rstrip("_")}));')
            expected.append(getattr(struct, field).offset)
    for name, dtype in (("pld_op", abi.OP_DTYPE), ("pld_buffer", abi.BUFFER_DTYPE)):
        lines.append(f'  printf("%zu\\n", sizeof({name}));')
        expected.append(dtype.itemsize)
        for field in dtype.names or ():
            lines.append(f'  printf("%zu\\n", offsetof({name}, {field}));')
            expected.append(dtype.fields[field][1])  # type: ignore[index]
    source = tmp_path / "layout.c"
    source.write_text("\n".join([*lines, "  return 0;", "}"]))
    flags = ["-std=c99", "-Wall", "-Werror", "-pedantic", f"-I{header}"]
    finished([compiler, *flags, source, "-o", tmp_path / "layout"], check=True)
    printed = finished([tmp_path / "layout"], check=True).stdout
    assert [int(line) for line in printed.split()] == expected


def test_op_kinds_when_counted_then_every_kind_of_the_header_has_a_name() -> None:
    header = (Path(__file__).resolve().parents[2] / "csrc" / "include" / "pellucid.h").read_text()
    found = {
        line.split("=")[0].strip()[len("PLD_OP_") :].lower(): int(line.split("=")[1].split(",")[0].split("/")[0])
        for line in header.splitlines()
        if line.strip().startswith("PLD_OP_") and "=" in line
    }
    assert found == OP_KINDS
