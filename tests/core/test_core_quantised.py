"""Quantised weights in the core: stored values kept exactly, products against numpy, the same bits however it is cut.

Shape suffixes: M rows of activations, N rows of W, K columns.
"""

from __future__ import annotations

import numpy as np
import pytest
from utils.quantised import STORED, dequantised, linear_oracle, packed, random_blocks

from pellucid.core import abi
from pellucid.errors import NativeError

ISAS = [name for code, name in abi.ISA_NAMES.items() if 1 <= code <= abi.ISA_CODES[abi.cpu_info().best_isa]]
ROWS = (1, 2, 3, 5, 6, 7, 8, 9, 12, 13, 17, 33, 64, 193, 400)


def _linear(context: abi.Context, x: np.ndarray, weight: abi.Weight, bias: np.ndarray | None = None) -> np.ndarray:
    out = np.full((len(x), weight.rows), np.nan, np.float32)
    weights = (
        [weight] if bias is None else [weight, abi.Weight(bias.view(np.uint8), 1, weight.rows, abi.F32, abi.ROW_MAJOR)]
    )
    table = abi.op_table(2, [weight.cols], [weight.rows], weights)
    abi.run_op(context, table, len(x), [(x.ctypes.data, x.shape[1])], [(out.ctypes.data, weight.rows)], weights)
    return out


def _activations(rows: int, cols: int, seed: int = 1) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    x[0, :32] = 0.0  # a group of zeros
    x[:, cols // 2] *= 40.0  # an outlier
    return x


def _float_weight(context: abi.Context, dtype: int, rows: int, cols: int) -> tuple[abi.Weight, np.ndarray]:
    w = np.random.default_rng(2).standard_normal((rows, cols)).astype(np.float32) * np.float32(0.02)
    return packed(context, w, abi.F32, rows, cols, dtype), w


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", STORED)
def test_given_stored_blocks_when_multiplied_then_products_are_those_of_the_dequantised_values(
    name: str, isa: str
) -> None:
    context = abi.Context(2, isa)
    rows, cols = 80, 512
    blocks = random_blocks(name, rows, cols, 3)
    weight = packed(context, blocks, STORED[name][0], rows, cols, STORED[name][0])
    x = _activations(9, cols)
    expected = linear_oracle(x, dequantised(name, blocks), 32)
    np.testing.assert_allclose(_linear(context, x, weight), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", STORED)
def test_given_stored_blocks_when_embedded_then_the_rows_are_exactly_the_stored_values(name: str) -> None:
    context = abi.Context(1)
    rows, cols = 70, 256
    blocks = random_blocks(name, rows, cols, 4)
    weight = packed(context, blocks, STORED[name][0], rows, cols, STORED[name][0])
    np.testing.assert_array_equal(embedding_rows(context, weight), dequantised(name, blocks))


def embedding_rows(context: abi.Context, weight: abi.Weight) -> np.ndarray:
    """All rows of W through the embedding op."""
    from pellucid.contract.batch import BatchInput

    count = weight.rows
    empty = np.zeros(1, np.int32)
    batch = BatchInput(
        input_ids_T=np.arange(count, dtype=np.int32),
        positions_T=np.arange(count, dtype=np.int32),
        query_start=np.array([0, count], np.int32),
        seq_lens=np.array([count], np.int32),
        block_tables=np.zeros((1, 1), np.int32),
        slot_mapping_T=np.zeros(count, np.int64),
        logit_rows=empty,
    )
    op = abi.op_table(1, [], [weight.cols], [weight])
    out = np.full((count, weight.cols), np.nan, np.float32)
    abi.run_op(context, op, count, [], [(out.ctypes.data, weight.cols)], [weight], abi.batch_struct(batch))
    return out


@pytest.mark.parametrize("dtype", [abi.Q8_0, abi.Q4_0, abi.Q4_1, abi.I8])
def test_given_floats_when_packed_then_products_are_those_of_the_rounded_values(dtype: int) -> None:
    context = abi.Context(2)
    rows, cols = 96, 320
    weight, w = _float_weight(context, dtype, rows, cols)
    rounded = embedding_rows(context, weight)
    step = np.abs(w).max() / (127 if dtype in (abi.Q8_0, abi.I8) else 7)
    assert np.abs(rounded - w).max() <= step * 0.75
    x = _activations(9, cols)
    expected = linear_oracle(x, rounded, cols if dtype == abi.I8 else 32)
    np.testing.assert_allclose(_linear(context, x, weight), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", [*STORED, "i8"])
def test_given_any_number_of_rows_and_threads_when_multiplied_then_each_row_has_the_same_bits(
    name: str, isa: str
) -> None:
    rows, cols = 160, 768
    one, two = abi.Context(1, isa), abi.Context(2, isa)
    if name == "i8":
        weight, _ = _float_weight(one, abi.I8, rows, cols)
    else:
        weight = packed(one, random_blocks(name, rows, cols, 5), STORED[name][0], rows, cols, STORED[name][0])
    x, bias = _activations(max(ROWS), cols), np.random.default_rng(6).standard_normal(rows).astype(np.float32)
    whole = _linear(one, x, weight, bias)
    for count in ROWS if isa != "portable" else ROWS[:6]:
        part = np.ascontiguousarray(x[-count:])
        np.testing.assert_array_equal(_linear(two, part, weight, bias), whole[-count:])


@pytest.mark.parametrize("name", [*STORED, "i8"])
def test_given_avx2_and_avx512_when_multiplied_then_bits_are_equal(name: str) -> None:
    if "avx512" not in ISAS:
        pytest.skip("this machine has no AVX-512")
    rows, cols = 64, 768
    results = []
    for isa in ("avx2", "avx512"):
        context = abi.Context(1, isa)
        if name == "i8":
            weight, _ = _float_weight(context, abi.I8, rows, cols)
        else:
            weight = packed(context, random_blocks(name, rows, cols, 7), STORED[name][0], rows, cols, STORED[name][0])
        results.append(_linear(context, _activations(7, cols), weight))
    np.testing.assert_array_equal(results[0], results[1])


def test_given_the_quants_at_their_limits_when_multiplied_then_no_product_overflows() -> None:
    rows, cols = 32, 1024
    w = np.full((rows, cols), -1.0, np.float32)
    w[::2] = 1.0
    x = np.full((3, cols), 1.0, np.float32)
    x[1] = -1.0
    for isa in ISAS:
        context = abi.Context(1, isa)
        for dtype in (abi.Q8_0, abi.I8, abi.Q4_0):
            weight = packed(context, w, abi.F32, rows, cols, dtype)
            np.testing.assert_allclose(_linear(context, x, weight), x @ w.T, rtol=1e-3)


@pytest.mark.parametrize("dtype", [abi.Q8_0, abi.I8, abi.Q4_1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_given_a_row_that_is_not_finite_when_multiplied_then_its_products_say_so_and_others_are_untouched(
    dtype: int, bad: float
) -> None:
    context = abi.Context(1)
    weight, _ = _float_weight(context, dtype, 40, 320)
    x = _activations(5, 320)
    good = _linear(context, x, weight)
    x[3, 100] = bad
    out = _linear(context, x, weight)
    assert not np.isfinite(out[3]).any()
    np.testing.assert_array_equal(np.delete(out, 3, axis=0), np.delete(good, 3, axis=0))


@pytest.mark.parametrize("dtype", [abi.Q8_0, abi.Q4_0, abi.Q4_1, abi.I8])
def test_given_pieces_when_packed_into_one_matrix_then_bytes_are_those_of_the_whole(dtype: int) -> None:
    context = abi.Context(2)
    rows, cols = 200, 64
    w = np.random.default_rng(8).standard_normal((rows, cols)).astype(np.float32)
    whole = packed(context, w, abi.F32, rows, cols, dtype)
    data = abi.aligned_bytes(abi.packed_bytes(rows, cols, dtype))
    data[:] = 0
    for begin, end in ((0, 37), (37, 64), (64, 200)):
        piece = np.ascontiguousarray(w[begin:end]).reshape(-1).view(np.uint8)
        abi.pack(context, piece, abi.F32, end - begin, cols, begin, rows, data, dtype)
    np.testing.assert_array_equal(data, whole.data)


def test_given_what_cannot_be_packed_when_asked_then_it_is_refused() -> None:
    context = abi.Context(1)
    assert abi.packed_bytes(8, 100, abi.Q8_0) == 0
    assert abi.packed_bytes(8, 128, abi.Q4_K) == 0
    assert abi.packed_bytes(8, 100, abi.I8) > 0
    data = abi.aligned_bytes(abi.packed_bytes(8, 256, abi.Q4_K))
    with pytest.raises(NativeError, match="cannot be rounded"):
        abi.pack(context, np.zeros(8 * 256 * 4, np.uint8), abi.F32, 8, 256, 0, 8, data, abi.Q4_K)
