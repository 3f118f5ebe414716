"""Attention through the cache: right against float64, and the same bits however the work is cut, placed and shared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from utils.core_attention import (
    Sequence3,
    Shape,
    World,
    as_stored,
    assert_close,
    available_isas,
    context,
    random_sequence,
    run_alone,
    same_bits,
    shuffled_tables,
)

from pellucid.core import abi

SHAPES = [
    Shape(num_heads=6, num_kv_heads=2, head_dim=64),
    Shape(num_heads=4, num_kv_heads=4, head_dim=80),
    Shape(num_heads=4, num_kv_heads=1, head_dim=128),
    Shape(num_heads=3, num_kv_heads=1, head_dim=6),
    Shape(num_heads=14, num_kv_heads=2, head_dim=96),
    Shape(num_heads=6, num_kv_heads=2, head_dim=64, window=37),
    Shape(num_heads=4, num_kv_heads=4, head_dim=80, window=1),
    Shape(num_heads=4, num_kv_heads=1, head_dim=32, softcap=5.0),
    Shape(num_heads=6, num_kv_heads=2, head_dim=256, window=100, softcap=30.0),
]
DTYPES = {"f32": abi.F32, "bf16": abi.BF16, "int8": abi.I8}
isas = pytest.mark.parametrize("isa", available_isas())
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
BITWISE = Shape(num_heads=6, num_kv_heads=2, head_dim=80, window=150)


def _name(shape: Shape) -> str:
    return f"H{shape.num_heads}G{shape.num_kv_heads}E{shape.head_dim}W{shape.window}C{shape.softcap:g}"


@isas
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=_name)
def test_prompt_when_attended_then_close_to_float64_softmax(isa: str, dtype: int, shape: Shape) -> None:
    shape = replace(shape, dtype=dtype)
    s = random_sequence(shape, 211, seed=1, spread=3.0)
    assert_close(shape, s, run_alone(context(isa), shape, s))


@isas
@dtypes
@pytest.mark.parametrize("block_size", [1, 8, 16, 64, 5])
def test_shuffled_blocks_when_decoded_then_close_to_float64_softmax(isa: str, dtype: int, block_size: int) -> None:
    shape = Shape(dtype=dtype)
    s = random_sequence(shape, 131, seed=2)
    world = World(shape, *_tables([len(s)], block_size))
    world.step(context(isa), [(0, s, 0, 100)])
    outs = [world.step(context(isa), [(0, s, t, t + 1)])[0] for t in range(100, 131)]
    assert_close(shape, s, np.concatenate(outs), begin=100)


def _tables(lengths: list[int], block_size: int, seed: int = 5) -> tuple[list[list[int]], int, int]:
    tables, n_blocks = shuffled_tables(lengths, block_size, seed)
    return tables, block_size, n_blocks


@isas
@dtypes
def test_large_scores_when_attended_then_finite_and_close(isa: str, dtype: int) -> None:
    shape = Shape(dtype=dtype)
    s = random_sequence(shape, 150, seed=3, spread=100.0)
    assert_close(shape, s, run_alone(context(isa), shape, s), atol=2e-3)


@isas
@dtypes
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_prompt_when_computed_in_chunks_then_bitwise_equal(isa: str, dtype: int, chunk: int) -> None:
    shape = replace(BITWISE, dtype=dtype)
    s = random_sequence(shape, 200, seed=4)
    assert same_bits(run_alone(context(isa), shape, s, chunk=chunk), run_alone(context(isa), shape, s))


@isas
@dtypes
@pytest.mark.parametrize("block_size", [1, 5, 8, 24, 64])
def test_prompt_when_placed_otherwise_then_bitwise_equal(isa: str, dtype: int, block_size: int) -> None:
    shape = replace(BITWISE, dtype=dtype)
    s = random_sequence(shape, 200, seed=5)
    whole = run_alone(context(isa), shape, s)
    assert same_bits(run_alone(context(isa), shape, s, block_size=block_size, seed=9), whole)
    assert same_bits(run_alone(context(isa), shape, s, block_size=block_size, seed=10, chunk=33), whole)


@isas
@dtypes
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_sequences_when_batched_together_then_bitwise_as_alone(isa: str, dtype: int, num_threads: int) -> None:
    shape = replace(BITWISE, dtype=dtype)
    spans = [(0, 90), (40, 41), (128, 129), (7, 30), (64, 70), (0, 1), (199, 200), (100, 170)]
    rows = [random_sequence(shape, end, seed=20 + i) for i, (_, end) in enumerate(spans)]
    world = World(shape, *_tables([end for _, end in spans], 16))
    ctx = context(isa, num_threads)
    for i, (begin, _) in enumerate(spans):
        if begin:
            world.step(ctx, [(i, rows[i], 0, begin)])
    together = world.step(ctx, [(i, rows[i], *span) for i, span in enumerate(spans)])
    for (begin, _), s, out in zip(spans, rows, together, strict=True):
        assert same_bits(out, run_alone(context(isa, 1), shape, s)[begin:])


@isas
@dtypes
def test_more_pairs_than_a_chunk_holds_when_attended_then_bitwise_as_row_by_row(isa: str, dtype: int) -> None:
    shape = Shape(num_heads=71, num_kv_heads=1, head_dim=64, dtype=dtype)
    s = random_sequence(shape, 97, seed=6)
    whole = run_alone(context(isa), shape, s)
    assert same_bits(run_alone(context(isa), shape, s, chunk=1), whole)
    assert_close(shape, s, whole)


@isas
@dtypes
def test_widest_head_when_attended_then_close_to_float64_softmax(isa: str, dtype: int) -> None:
    shape = Shape(num_heads=3, num_kv_heads=1, head_dim=1024, dtype=dtype)
    s = random_sequence(shape, 70, seed=7)
    whole = run_alone(context(isa), shape, s, block_size=3, seed=1)
    assert_close(shape, s, whole)


@isas
@dtypes
@pytest.mark.parametrize("block_size", [1, 8, 16])
def test_unwritten_cells_when_they_hold_nan_then_harmless(isa: str, dtype: int, block_size: int) -> None:
    shape = replace(BITWISE, dtype=dtype, window=20)
    s = random_sequence(shape, 75, seed=8)
    tables, _, n_blocks = _tables([len(s)], block_size)
    world = World(shape, [*tables, list(range(n_blocks))], block_size, n_blocks)
    nan = np.full((n_blocks * block_size, 1), np.nan, np.float32)
    wide, narrow = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    poison = Sequence3(np.repeat(nan, wide, 1), np.repeat(nan, narrow, 1), np.repeat(nan, narrow, 1))
    world.step(context(isa), [(1, poison, 0, len(poison))])
    outs = [world.step(context(isa), [(0, s, a, b)])[0] for a, b in ((0, 41), (41, 42), (42, 75))]
    assert same_bits(np.concatenate(outs), run_alone(context(isa), shape, s))


@isas
@dtypes
def test_later_tokens_when_not_finite_then_earlier_rows_keep_their_bits(isa: str, dtype: int) -> None:
    shape = replace(BITWISE, dtype=dtype)
    s = random_sequence(shape, 90, seed=11)
    clean = run_alone(context(isa), shape, s)
    k, v = s.k.copy(), s.v.copy()
    k[70:], v[70:] = np.inf, np.nan
    assert same_bits(run_alone(context(isa), shape, Sequence3(s.q, k, v))[:70], clean[:70])


@isas
@dtypes
def test_query_when_it_holds_nan_then_its_row_is_nan_and_its_neighbours_keep_their_bits(isa: str, dtype: int) -> None:
    shape = replace(BITWISE, dtype=dtype)
    s = random_sequence(shape, 90, seed=13)
    q = s.q.copy()
    q[40, ::7] = np.nan
    clean, dirty = run_alone(context(isa), shape, s), run_alone(context(isa), shape, Sequence3(q, s.k, s.v))
    keep = [t for t in range(90) if t != 40]
    assert np.all(np.isnan(dirty[40]))
    assert same_bits(dirty[keep], clean[keep])


@isas
@dtypes
def test_tokens_when_written_then_read_back_as_rounded(isa: str, dtype: int) -> None:
    shape = replace(BITWISE, dtype=dtype)
    s = random_sequence(shape, 40, seed=12)
    world = World(shape, *_tables([len(s)], 8))
    world.step(context(isa), [(0, s, 0, 40)], layer=0)
    stored_k, stored_v = as_stored(shape, s.k), as_stored(shape, s.v)
    for position in (0, 17, 39):
        k, v = world.kv.read(0, int(world.cells(0, position, position + 1)[0]))
        assert same_bits(k.reshape(-1), stored_k[position])
        assert same_bits(v.reshape(-1), stored_v[position])


LONG = Shape(num_heads=6, num_kv_heads=2, head_dim=16)


@isas
@dtypes
@pytest.mark.parametrize("window", [0, 1500])
def test_past_of_several_spans_when_split_among_threads_then_bits_are_those_of_one_walk(
    isa: str, dtype: int, window: int
) -> None:
    shape = replace(LONG, dtype=dtype, window=window)
    sequences = [random_sequence(shape, length, seed=length) for length in (2500, 1024, 1025, 70)]
    outs = []
    world = World(shape, *_tables([len(s) for s in sequences], 16))
    for i, s in enumerate(sequences):
        world.step(context(isa, 2), [(i, s, 0, len(s) - 1)])
    last = [(i, s, len(s) - 1, len(s)) for i, s in enumerate(sequences)]
    for threads, neighbours in ((1, True), (2, True), (3, False)):  # each writes the last token again
        steps = [last] if neighbours else [[one] for one in last]
        outs.append(np.concatenate([out for step in steps for out in world.step(context(isa, threads), step)]))
    assert same_bits(outs[1], outs[0])
    assert same_bits(outs[2], outs[0])
    for i, s in enumerate(sequences):
        assert_close(shape, s, outs[0][i : i + 1], begin=len(s) - 1)


@isas
@dtypes
@pytest.mark.parametrize("window", [0, 1500])
def test_last_rows_of_a_long_prompt_when_split_among_threads_then_bits_are_those_of_one_walk(
    isa: str, dtype: int, window: int
) -> None:
    shape = replace(LONG, dtype=dtype, window=window)
    long, short = random_sequence(shape, 3060, seed=15), random_sequence(shape, 33, seed=16)
    outs = []
    for threads in (1, 2, 16):
        world = World(shape, *_tables([len(long), len(short)], 16))
        world.step(context(isa, 2), [(0, long, 0, 3040)])
        outs.append(np.concatenate(world.step(context(isa, threads), [(1, short, 0, 4), (0, long, 3040, 3060)])))
    assert same_bits(outs[1], outs[0])
    assert same_bits(outs[2], outs[0])
    assert same_bits(outs[0][4:], run_alone(context(isa, 1), shape, long)[3040:])


@dtypes
def test_long_prompt_when_chunked_across_spans_then_bitwise_equal(dtype: int) -> None:
    shape = replace(LONG, dtype=dtype)
    s = random_sequence(shape, 2300, seed=14)
    whole = run_alone(context(), shape, s)
    assert same_bits(run_alone(context(), shape, s, chunk=700), whole)
    assert same_bits(run_alone(context(), shape, s, chunk=1024, block_size=24, seed=3), whole)
    assert_close(shape, s, whole)
