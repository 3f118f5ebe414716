"""Products, experts and attention at, below and above every boundary of their kernels: a row's bits are those it has alone.

Shape letters: M rows, N rows of a weight, K columns.
"""

from __future__ import annotations

import numpy as np
import pytest
from utils.core_attention import (
    Array,
    Shape,
    World,
    available_isas,
    context,
    random_sequence,
    same_bits,
    shuffled_tables,
)
from utils.quantised import STORED, packed, random_blocks

from pellucid.core import abi
from pellucid.ops.spec import OP_KINDS

isas = pytest.mark.parametrize("isa", available_isas())
THREADS = (1, 2, 3)
# Tiles of 2, 3, 6 and 12 rows; blocks of 48, 96 and 192.
ROWS = (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 24, 47, 48, 49, 95, 96, 97, 191, 192, 193, 385)
FORMATS = {"f32": abi.F32, "bf16": abi.BF16, "int8 an output": abi.I8} | {
    name: made[0] for name, made in STORED.items()
}


def slab(name: str) -> int:
    """Columns that all rows pass over at once: 64 words, or 24 KiB of a strip of quantised rows."""
    if name in ("f32", "bf16"):
        return 64 if name == "f32" else 128
    group_bytes = abi.packed_bytes(32, 256, FORMATS[name]) // 8
    return 24 * 1024 // group_bytes * 32


def widths(name: str) -> list[int]:
    """K about a slab and about two: in steps of what the format's blocks allow."""
    block = STORED[name][1] if name in STORED else 1
    about = [slab(name), 2 * slab(name)] if name != "int8 an output" else [32, 512]
    found = {size // block * block + off * block for size in about for off in (-1, 0, 1)}
    return sorted(k for k in found if k > 0)


def weight_of(name: str, rows: int, cols: int) -> abi.Weight:
    dtype = FORMATS[name]
    if name in STORED:
        return packed(context(), random_blocks(name, rows, cols, cols), dtype, rows, cols, dtype)
    values = np.random.default_rng(cols).standard_normal((rows, cols)).astype(np.float32)
    return packed(context(), values, abi.F32, rows, cols, dtype)


def linear(ctx: abi.Context, x_MK: Array, weight: abi.Weight) -> Array:
    out = np.full((len(x_MK), weight.rows), np.nan, np.float32)
    op = abi.op_table(OP_KINDS["linear"], [weight.cols], [weight.rows], [weight])
    abi.run_op(ctx, op, len(x_MK), [(x_MK.ctypes.data, x_MK.shape[1])], [(out.ctypes.data, weight.rows)], [weight])
    return out


def products() -> list[object]:
    """Every format on every instruction set; most of the portable kernels' wait for the slow tier."""
    late = {(isa, name) for isa in ("portable",) for name in STORED if name != "q4_1"}
    made = [(isa, name) for isa in available_isas() for name in FORMATS]
    return [pytest.param(*pair, marks=[pytest.mark.slow] if pair in late else []) for pair in made]


@pytest.mark.parametrize(("isa", "name"), products())
def test_products_about_every_block_of_rows_and_slab_of_columns_when_cut_then_as_row_by_row(
    isa: str, name: str
) -> None:
    for cols in widths(name):
        weight = weight_of(name, 66, cols)
        x = np.random.default_rng(cols + 1).standard_normal((max(ROWS), cols)).astype(np.float32)
        alone = np.concatenate([linear(context(isa, 1), x[m : m + 1], weight) for m in range(0, max(ROWS), 7)])
        for rows in ROWS:
            for threads in THREADS:
                made = linear(context(isa, threads), x[:rows], weight)
                assert same_bits(made[::7], alone[: len(made[::7])]), f"{rows} rows of {cols} on {threads} threads"


@isas
@pytest.mark.parametrize("dtype", [abi.F32, abi.BF16], ids=["f32", "bf16"])
def test_experts_when_they_get_rows_about_their_blocks_then_as_row_by_row(isa: str, dtype: int) -> None:
    experts, d, f = 2, 64, 64
    values = [
        np.random.default_rng(n).standard_normal((n, 64)).astype(np.float32) for n in (experts * 2 * f, experts * d)
    ]
    weights = [packed(context(), value, abi.F32, *value.shape, dtype) for value in values]
    x = np.random.default_rng(3).standard_normal((400, d)).astype(np.float32)

    def moe(ctx: abi.Context, begin: int, end: int, to_first: int) -> Array:
        """Rows [begin, end) of x, of which those below `to_first` go to the first expert."""
        out = np.full((end - begin, d), np.nan, np.float32)
        router = np.zeros((end - begin, experts), np.float32)
        router[np.arange(end - begin), (np.arange(begin, end) >= to_first).astype(int)] = 5.0
        op = abi.op_table(OP_KINDS["moe"], [d, experts], [d], weights, (experts, 1, 1, 1))
        inputs = [(x[begin:].ctypes.data, d), (router.ctypes.data, experts)]
        abi.run_op(ctx, op, end - begin, inputs, [(out.ctypes.data, d)], weights)
        return out

    for to_first in (95, 96, 97, 191, 192, 193, 289):
        alone = np.concatenate([moe(context(isa, 1), m, m + 1, to_first) for m in range(0, 400, 3)])
        for threads in THREADS:
            assert same_bits(moe(context(isa, threads), 0, 400, to_first)[::3], alone), f"{to_first} rows"


@isas
@pytest.mark.parametrize("dtype", [abi.F32, abi.BF16, abi.I8], ids=["f32", "bf16", "int8"])
@pytest.mark.parametrize("length", [1024, 1025, 2048, 2049])
def test_rows_about_the_most_that_are_split_when_one_is_long_then_as_alone(isa: str, dtype: int, length: int) -> None:
    """63, 64 and 65 rows of a step, one of which has a long past."""
    shape = Shape(num_heads=4, num_kv_heads=2, head_dim=16, dtype=dtype)
    sequences = [random_sequence(shape, length, 1), *(random_sequence(shape, 1 + i % 3, i + 2) for i in range(64))]
    world = World(shape, *_with_blocks([len(s) for s in sequences]))
    world.step(context(isa, 2), [(i, s, 0, len(s)) for i, s in enumerate(sequences)])
    last = [(i, s, len(s) - 1, len(s)) for i, s in enumerate(sequences)]
    alone = np.concatenate([world.step(context(isa, 1), [one])[0] for one in last])
    for rows in (63, 64, 65):
        for threads in (*THREADS, 16):
            made = np.concatenate(world.step(context(isa, threads), last[:rows]))
            assert same_bits(made, alone[:rows]), f"{rows} rows on {threads} threads"


@pytest.mark.parametrize("rows", [60, 61])
def test_parts_about_the_most_that_are_kept_when_split_among_many_threads_then_as_on_one(rows: int) -> None:
    """60 rows of 17 spans are 1,020 parts, 61 are 1,037: more than the 1,024 for which there is room."""
    shape = Shape(num_heads=2, num_kv_heads=1, head_dim=16, dtype=abi.BF16)
    s = random_sequence(shape, 16 * 1024 + 100, 5)
    world = World(shape, *_with_blocks([len(s)]))
    for begin in range(0, len(s), 4096):
        world.step(context("auto", 2), [(0, s, begin, min(begin + 4096, len(s)))])
    asked = [(0, s, len(s) - rows, len(s))]
    expected = world.step(context("auto", 1), asked)[0]
    for threads in (15, 16):
        assert same_bits(world.step(context("auto", threads), asked)[0], expected)


def _with_blocks(lengths: list[int]) -> tuple[list[list[int]], int, int]:
    tables, n_blocks = shuffled_tables(lengths, 16, seed=len(lengths))
    return tables, 16, n_blocks
