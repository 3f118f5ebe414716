"""Weights on their way in: bit-equal with the `gguf` package, packed by panel, and every size checked first."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from gguf.constants import GGML_QUANT_SIZES
from utils.core_attention import context, same_bits

from pellucid.core import abi
from pellucid.errors import NativeError

Bytes = npt.NDArray[np.uint8]
TYPES = {
    "F32": 0,
    "BF16": 1,
    "F16": 2,
    "Q8_0": 3,
    "Q4_0": 4,
    "Q4_1": 5,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q4_K": 8,
    "Q5_K": 9,
    "Q6_K": 10,
}
# Where the half-precision scales of a block stand: random bytes there must not be infinite or NaN.
HALVES = {
    "F16": [0],
    "Q8_0": [0],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}
types = pytest.mark.parametrize("name", TYPES)
QUANTISED = [name for name in TYPES if name.startswith("Q")]
INT64_MAX = 2**63 - 1


def _block(name: str) -> tuple[int, int]:
    return GGML_QUANT_SIZES[GGMLQuantizationType[name]]


def _random(name: str, rows: int, cols: int, seed: int = 0) -> Bytes:
    """Any bytes that are a weight: every pattern of quants and sub-scales, finite values."""
    rng = np.random.default_rng(seed)
    values, size = _block(name)
    if name in ("F32", "BF16"):
        x = rng.standard_normal((rows, cols)).astype(np.float32)
        return (x if name == "F32" else _to_bf16(x)).view(np.uint8).reshape(rows, -1)
    data = rng.integers(0, 256, (rows, cols // values, size), dtype=np.uint8)
    for at in HALVES[name]:
        data[:, :, at + 1] &= 0xBF  # exponent below 16
    return data.reshape(rows, -1)


def _to_bf16(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)


def _expected(name: str, data: Bytes) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(quants.dequantize(data, GGMLQuantizationType[name]))


def _convert(data: Bytes, name: str, rows: int, cols: int, dtype: int = abi.F32) -> Bytes:
    out = np.full(rows * abi.row_bytes(dtype, cols), 0xEE, np.uint8)
    abi.convert_bytes(context(), data.reshape(-1), TYPES[name], rows, cols, out, dtype)
    return out


def _panels(x: npt.NDArray[np.float32], dtype: int) -> Bytes:
    """[ceil(N/64)][ceil(K/pair)][64][pair] by numpy."""
    pair = 1 if dtype == abi.F32 else 2
    rows, cols = (-(-n // m) * m for n, m in zip(x.shape, (64, pair), strict=True))
    padded = np.zeros((rows, cols), np.float32)
    padded[: x.shape[0], : x.shape[1]] = x
    stored = padded if dtype == abi.F32 else _to_bf16(padded)
    return np.ascontiguousarray(stored.reshape(rows // 64, 64, cols // pair, pair).transpose(0, 2, 1, 3)).view(np.uint8)


def _pack(data: Bytes, name: str, rows: int, cols: int, dtype: int, row_offset: int, target: Bytes, total: int) -> None:
    abi.pack(context(), data.reshape(-1), TYPES[name], rows, cols, row_offset, total, target, dtype)


@types
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (3, 3), (67, 2), (2, 130)])
def test_weight_when_converted_then_bit_equal_with_gguf(name: str, rows: int, blocks: int) -> None:
    cols = _block(name)[0] * blocks
    data = _random(name, rows, cols, seed=blocks)
    out = _convert(data, name, rows, cols).view(np.float32).reshape(rows, cols)
    assert same_bits(out, _expected(name, data))


@types
def test_weight_when_converted_to_bf16_then_rounded_to_nearest_even(name: str) -> None:
    rows, cols = 5, _block(name)[0] * 3
    data = _random(name, rows, cols)
    out = _convert(data, name, rows, cols, abi.BF16).view(np.uint16).reshape(rows, cols)
    assert np.array_equal(out, _to_bf16(_expected(name, data)))


def test_every_half_when_converted_then_exact() -> None:
    halves = np.arange(65536, dtype=np.uint16)
    halves = halves[(halves & 0x7C00) != 0x7C00]
    halves = np.append(halves, np.array([0x7C00, 0xFC00], np.uint16))  # with both infinities
    out = _convert(halves.view(np.uint8), "F16", 1, len(halves)).view(np.float32)
    assert same_bits(out, halves.view(np.float16).astype(np.float32))
    nan = np.array([0x7E00, 0xFE01], np.uint16)
    assert np.all(np.isnan(_convert(nan.view(np.uint8), "F16", 1, 2).view(np.float32)))


def test_float_when_rounded_to_bf16_then_ties_infinity_nan_and_subnormals_are_right() -> None:
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x00000001, 0x80018000, 0x80000000]
    x = np.array(bits, np.uint32).view(np.float32)
    out = _convert(x.view(np.uint8), "F32", 1, len(x), abi.BF16).view(np.uint16)
    assert np.array_equal(out, _to_bf16(x))
    nan = _convert(np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.uint8), "F32", 1, 2, abi.BF16)
    assert np.all(np.isnan(torch.from_numpy(nan.view(np.int16)).view(torch.bfloat16).float().numpy()))


def test_source_when_not_aligned_then_converted_all_the_same() -> None:
    data = _random("Q4_K", 3, 512)
    shifted = np.zeros(data.size + 1, np.uint8)
    shifted[1:] = data.reshape(-1)
    out = np.zeros(3 * 512, np.float32)
    abi.convert(context(), shifted[1:], TYPES["Q4_K"], 3, 512, out)
    assert same_bits(out.reshape(3, 512), _expected("Q4_K", data))


@types
@pytest.mark.parametrize("dtype", [abi.F32, abi.BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("rows", "cols"), [(64, 256), (130, 768), (1, 512), (67, 255)])
def test_weight_when_packed_then_equal_to_numpy_panels(name: str, dtype: int, rows: int, cols: int) -> None:
    cols = cols if _block(name)[0] == 1 else -(-cols // 256) * 256
    data = _random(name, rows, cols)
    target = abi.aligned_bytes(abi.packed_bytes(rows, cols, dtype))
    _pack(data, name, rows, cols, dtype, 0, target, rows)
    assert np.array_equal(target, _panels(_expected(name, data), dtype).reshape(-1))


@pytest.mark.parametrize("dtype", [abi.F32, abi.BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("parts", [(100, 30, 31), (64, 64, 3), (1, 1, 1, 200), (65, 2)])
def test_pieces_when_packed_into_one_matrix_then_as_if_stacked(dtype: int, parts: tuple[int, ...]) -> None:
    cols, total = 99, sum(parts)
    pieces = [_random("F32", n, cols, seed=i) for i, n in enumerate(parts)]
    target = abi.aligned_bytes(abi.packed_bytes(total, cols, dtype))
    for i in reversed(range(len(parts))):
        _pack(pieces[i], "F32", parts[i], cols, dtype, sum(parts[:i]), target, total)
    stacked = np.concatenate([_expected("F32", piece) for piece in pieces])
    assert np.array_equal(target, _panels(stacked, dtype).reshape(-1))


def test_threads_when_more_or_fewer_then_the_same_bytes() -> None:
    data, targets = _random("Q5_K", 300, 512), []
    for num_threads in (1, 2, 5):
        target = abi.aligned_bytes(abi.packed_bytes(300, 512, abi.BF16))
        ctx = context("auto", num_threads)
        abi.pack(ctx, data.reshape(-1), TYPES["Q5_K"], 300, 512, 0, 300, target, abi.BF16)
        targets.append(target)
    assert np.array_equal(targets[0], targets[1])
    assert np.array_equal(targets[0], targets[2])


@pytest.mark.parametrize("name", ["F32", "BF16", "Q8_0", "Q4_K"])
def test_large_matrix_when_packed_then_fast_enough_to_start_with(name: str) -> None:
    rows, cols = 8192, 2048  # 16.8 M weights; a scatter of single elements takes seconds
    data = np.zeros((rows, abi.row_bytes(TYPES[name], cols)), np.uint8)
    target = abi.aligned_bytes(abi.packed_bytes(rows, cols, abi.BF16))
    begin = time.perf_counter()
    _pack(data, name, rows, cols, abi.BF16, 0, target, rows)
    assert time.perf_counter() - begin < 1.0


@types
def test_row_bytes_when_asked_then_those_of_gguf(name: str) -> None:
    values, size = _block(name)
    assert abi.row_bytes(TYPES[name], 3 * values) == 3 * size
    assert abi.row_bytes(TYPES[name], 0) == 0


@pytest.mark.parametrize(
    ("dtype", "cols"), [(0, -1), (3, 33), (8, 128), (11, 256), (-1, 256), (0, INT64_MAX), (1, INT64_MAX // 2 + 1)]
)
def test_row_bytes_when_out_of_range_then_zero(dtype: int, cols: int) -> None:
    assert abi.row_bytes(dtype, cols) == 0


@pytest.mark.parametrize(
    ("rows", "cols", "dtype", "expected"),
    [
        (64, 3, abi.F32, 64 * 3 * 4),
        (65, 3, abi.BF16, 128 * 4 * 2),
        (0, 3, abi.F32, 0),
        (3, 0, abi.F32, 0),
        (-1, 3, abi.BF16, 0),
        (64, 64, 2, 0),
        (INT64_MAX, 1, abi.F32, 0),
        (2**40, 2**40, abi.F32, 0),
        (1, INT64_MAX, abi.BF16, 0),
    ],
)
def test_packed_bytes_when_asked_then_padded_to_panels_or_zero(rows: int, cols: int, dtype: int, expected: int) -> None:
    assert abi.packed_bytes(rows, cols, dtype) == expected


CONVERT_ROWS = [
    ("source too small", (31, 0, 1, 8, 32, 0), "source has 31 bytes"),
    ("source too large", (33, 0, 1, 8, 32, 0), "source has 33 bytes"),
    ("target too small", (32, 0, 1, 8, 31, 0), "target has 31 bytes; 32"),
    ("no rows", (32, 0, 0, 8, 32, 0), r"shape is \[0, 8\]"),
    ("negative cols", (32, 0, 1, -8, 32, 0), r"shape is \[1, -8\]"),
    ("unknown source dtype", (32, 11, 1, 8, 32, 0), "source dtype is 11"),
    ("negative source dtype", (32, -1, 1, 8, 32, 0), "source dtype is -1"),
    ("quantised target", (32, 0, 1, 8, 32, 3), "target dtype is 3"),
    ("half a block", (34, 3, 1, 33, 132, 0), "33 columns are no multiple of the 32"),
    ("rows overflow", (32, 0, INT64_MAX, 8, 32, 0), "address space"),
    ("cols overflow", (32, 0, 1, INT64_MAX, 32, 0), "address space"),
    ("product overflows to the size", (32, 0, 2**59, 32, 32, 0), "address space"),
]


@pytest.mark.parametrize(("arguments", "text"), [row[1:] for row in CONVERT_ROWS], ids=[row[0] for row in CONVERT_ROWS])
def test_convert_when_sizes_disagree_then_refused_untouched(arguments: tuple[int, ...], text: str) -> None:
    src_bytes, src_dtype, rows, cols, dst_bytes, dst_dtype = arguments
    source, target = np.zeros(src_bytes, np.uint8), np.full(dst_bytes, 7, np.uint8)
    with pytest.raises(NativeError, match=text):
        abi.convert_bytes(context(), source, src_dtype, rows, cols, target, dst_dtype)
    assert np.all(target == 7)


PACK_ROWS = [
    ("rows beyond", (4, 8, 61, 64, 2048, 0), r"rows \[61, 61 \+ 4\)"),
    ("negative offset", (4, 8, -1, 64, 2048, 0), r"rows \[-1"),
    ("offset overflows", (4, 8, INT64_MAX, 64, 2048, 0), "are not within"),
    ("no target rows", (4, 8, 0, 0, 2048, 0), "are not within"),
    ("target too small", (4, 8, 0, 64, 2047, 0), "target has 2047 bytes; 2048"),
    ("target rows overflow", (4, 8, 0, INT64_MAX, 2048, 0), "out of range"),
    ("quantised target", (4, 8, 0, 64, 2048, 4), "target dtype is 4"),
]


@pytest.mark.parametrize(("arguments", "text"), [row[1:] for row in PACK_ROWS], ids=[row[0] for row in PACK_ROWS])
def test_pack_when_places_disagree_then_refused_untouched(arguments: tuple[int, ...], text: str) -> None:
    rows, cols, offset, total, dst_bytes, dtype = arguments
    source, target = np.zeros(rows * cols * 4, np.uint8), np.full(dst_bytes, 7, np.uint8)
    with pytest.raises(NativeError, match=text):
        abi.pack(context(), source, abi.F32, rows, cols, offset, total, target, dtype)
    assert np.all(target == 7)


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weight_when_packed_then_neighbouring_rows_are_untouched(name: str) -> None:
    target = abi.aligned_bytes(abi.packed_bytes(64, 256, abi.BF16))
    target[:] = 0x11
    _pack(_random(name, 10, 256), name, 10, 256, abi.BF16, 20, target, 64)
    words = target.view(np.uint32).reshape(128, 64)
    assert np.all(words[:, :20] == 0x11111111)
    assert np.all(words[:, 30:] == 0x11111111)
