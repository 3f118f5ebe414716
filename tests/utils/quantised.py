"""Quantised matrices for tests: random blocks of every stored type, and the linear op's arithmetic in numpy.

Shape suffixes: M rows of activations, N rows of W, K columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, dequantize

from pellucid.core import abi

F32Array = npt.NDArray[np.float32]

# name: (pld_dtype, values of a block, GGUF's type)
STORED: dict[str, tuple[int, int, GGMLQuantizationType]] = {
    "q8_0": (abi.Q8_0, 32, GGMLQuantizationType.Q8_0),
    "q4_0": (abi.Q4_0, 32, GGMLQuantizationType.Q4_0),
    "q4_1": (abi.Q4_1, 32, GGMLQuantizationType.Q4_1),
    "q4_k": (abi.Q4_K, 256, GGMLQuantizationType.Q4_K),
    "q5_k": (abi.Q5_K, 256, GGMLQuantizationType.Q5_K),
    "q6_k": (abi.Q6_K, 256, GGMLQuantizationType.Q6_K),
}
# Byte offsets of the float16 scales in a block.
_HALVES = {"q8_0": (0,), "q4_0": (0,), "q4_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}


def random_blocks(name: str, rows: int, cols: int, seed: int) -> npt.NDArray[np.uint8]:
    """[rows, row bytes] of blocks with random quants and sensible scales."""
    dtype, block, _ = STORED[name]
    size = abi.row_bytes(dtype, block)
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows, cols // block, size), dtype=np.uint8)
    for offset in _HALVES[name]:
        scales = generator.uniform(-0.02, 0.02, (rows, cols // block)).astype(np.float16)
        blocks[:, :, offset : offset + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def dequantised(name: str, blocks: npt.NDArray[np.uint8]) -> F32Array:
    """[N, K] as the gguf package reads the blocks."""
    return np.asarray(dequantize(blocks, STORED[name][2]), np.float32)


def packed(
    context: abi.Context, source: npt.NDArray[Any], source_dtype: int, rows: int, cols: int, dtype: int
) -> abi.Weight:
    """The matrix in strips."""
    data = abi.aligned_bytes(abi.packed_bytes(rows, cols, dtype))
    data[:] = 0
    abi.pack(context, source.reshape(-1).view(np.uint8), source_dtype, rows, cols, 0, rows, data, dtype)
    return abi.Weight(data, rows, cols, dtype, abi.PANELS)


def quantised_activations(x_MK: F32Array, group: int) -> tuple[npt.NDArray[np.int32], F32Array]:
    """int8 values [M, K] and scales [M, K / group]: greatest magnitude / 127, to nearest even."""
    grouped = x_MK.reshape(len(x_MK), -1, group)
    greatest = np.abs(grouped).max(axis=-1)
    inverse = np.divide(np.float32(127), greatest, out=np.zeros_like(greatest), where=greatest > 0)
    values = np.rint(grouped * inverse[..., None]).astype(np.int32)
    return values.reshape(x_MK.shape), (greatest / np.float32(127)).astype(np.float32)


def linear_oracle(x_MK: F32Array, w_NK: F32Array, group: int) -> npt.NDArray[np.float64]:
    """Rounded activations times the weights' values, in float64."""
    values, scales = quantised_activations(x_MK, group)
    rounded = values.astype(np.float64) * np.repeat(scales, group, axis=1)
    return np.asarray(rounded @ w_NK.T.astype(np.float64))
