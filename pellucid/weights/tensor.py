"""A tensor as it lies in a file: a name, a storage type, a shape and a view of the mapped bytes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pellucid.errors import UnsupportedModelError, WeightFormatError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pellucid.core.abi import Context

MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**48  # far beyond any real tensor and far below the overflow of a byte count in 64 bits


class StorageType(NamedTuple):
    """Rows are blocks of `block_length` values in `block_bytes` bytes. `pld_dtype` is None when not in the core."""

    block_length: int
    block_bytes: int
    pld_dtype: int | None = None


# Block layouts: the GGUF specification and ggml's block structs; codes: `pld_dtype` in pellucid.h.
DTYPES: dict[str, StorageType] = {
    "F32": StorageType(1, 4, 0),
    "BF16": StorageType(1, 2, 1),
    "F16": StorageType(1, 2, 2),
    "Q8_0": StorageType(32, 34, 3),
    "Q4_0": StorageType(32, 18, 4),
    "Q4_1": StorageType(32, 20, 5),
    "Q5_0": StorageType(32, 22, 6),
    "Q5_1": StorageType(32, 24, 7),
    "Q4_K": StorageType(256, 144, 8),
    "Q5_K": StorageType(256, 176, 9),
    "Q6_K": StorageType(256, 210, 10),
    # Stored and listed, but not converted by the core.
    "F64": StorageType(1, 8),
    "F8_E4M3": StorageType(1, 1),
    "F8_E5M2": StorageType(1, 1),
    "BOOL": StorageType(1, 1),
    "U8": StorageType(1, 1),
    "I8": StorageType(1, 1),
    "U16": StorageType(1, 2),
    "I16": StorageType(1, 2),
    "U32": StorageType(1, 4),
    "I32": StorageType(1, 4),
    "U64": StorageType(1, 8),
    "I64": StorageType(1, 8),
    "Q8_1": StorageType(32, 40),
    "Q2_K": StorageType(256, 84),
    "Q3_K": StorageType(256, 110),
    "Q8_K": StorageType(256, 292),
    "IQ1_S": StorageType(256, 50),
    "IQ1_M": StorageType(256, 56),
    "IQ2_XXS": StorageType(256, 66),
    "IQ2_XS": StorageType(256, 74),
    "IQ2_S": StorageType(256, 82),
    "IQ3_XXS": StorageType(256, 98),
    "IQ3_S": StorageType(256, 110),
    "IQ4_NL": StorageType(32, 18),
    "IQ4_XS": StorageType(256, 136),
    "TQ1_0": StorageType(256, 54),
    "TQ2_0": StorageType(256, 66),
    "MXFP4": StorageType(32, 17),
}

CONVERTIBLE = tuple(name for name, storage in DTYPES.items() if storage.pld_dtype is not None)

NUMPY_DTYPES: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
}

# The bits of an exponent: all of them are set in NaN and infinities, and in no other value.
_EXPONENT_BITS = {"F32": ("<u4", 0x7F800000), "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00)}
_CHECKED_AT_ONCE = 2**20


def byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; ValueError with the field, the value and the limit when type and shape do not fit together."""
    storage = DTYPES.get(dtype)
    if storage is None:
        raise ValueError(f"dtype is {dtype[:40]!r}; known are {', '.join(DTYPES)}")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"shape has {len(shape)} dimensions; the limit is {MAX_DIMENSIONS}")
    elements = 1
    for size in shape:
        if size < 0:
            raise ValueError(f"shape has the dimension {size}; it must not be negative")
        elements *= size
        if elements > MAX_ELEMENTS or size > MAX_ELEMENTS:
            raise ValueError(f"shape has more than {MAX_ELEMENTS} elements")
    cols = shape[-1] if shape else 1
    if cols % storage.block_length:
        raise ValueError(f"last dimension is {cols}; {dtype} needs a multiple of {storage.block_length}")
    return elements // storage.block_length * storage.block_bytes


@lru_cache(maxsize=1)
def _convert_context(pid: int) -> Context:
    """One thread is enough: large matrices are packed by the engine, not converted here. A forked process needs its own."""
    from pellucid.core import abi

    return abi.Context(num_threads=1)


@dataclass(frozen=True)
class TensorView:
    """A tensor in its storage type, without a copy.

    `shape` is row-major, outermost first. `data` is a one-dimensional uint8 array, usually a read-only view of a mapped
    file (kept mapped as long as the view lives). Raises WeightFormatError when the three contradict each other.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    def __post_init__(self) -> None:
        try:
            expected = byte_count(self.dtype, self.shape)
        except ValueError as error:
            raise WeightFormatError(f"tensor {self.name!r}: {error}") from None
        if self.data.dtype != np.uint8 or self.data.ndim != 1 or self.data.size != expected:
            raise WeightFormatError(
                f"tensor {self.name!r}: data is {self.data.dtype}{list(self.data.shape)};"
                f" {self.dtype}{list(self.shape)} needs uint8[{expected}]"
            )

    @property
    def cols(self) -> int:
        """The last dimension; 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """The product of the leading dimensions; 1 for vectors and scalars."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        storage = DTYPES[self.dtype]
        return self.cols // storage.block_length * storage.block_bytes

    @property
    def pld_dtype(self) -> int:
        """The core's code of the storage type; UnsupportedModelError when the core cannot read it."""
        code = DTYPES[self.dtype].pld_dtype
        if code is None:
            raise UnsupportedModelError(
                f"tensor {self.name!r} is stored as {self.dtype}; supported are {', '.join(CONVERTIBLE)}"
            )
        return code

    def renamed(self, name: str) -> TensorView:
        """The same bytes under another name."""
        return replace(self, name=name)

    def select_rows(self, index: NDArray[np.integer[Any]]) -> TensorView:
        """Rows [len(index), cols] in the order of `index`, copied exactly as stored; IndexError when out of range."""
        rows = self.data.reshape(self.rows, self.row_bytes)[np.asarray(index)]
        return TensorView(self.name, self.dtype, (len(rows), self.cols), rows.reshape(-1))

    def check_finite(self) -> None:
        """Passes for types other than F32, BF16 and F16: their blocks have scales.

        Raises:
            WeightFormatError: a value is NaN or infinite; the text names the tensor and the place.
        """
        if self.dtype not in _EXPONENT_BITS:
            return
        kind, exponent = _EXPONENT_BITS[self.dtype]
        bits = self.data.view(kind)
        for begin in range(0, bits.size, _CHECKED_AT_ONCE):
            odd = (bits[begin : begin + _CHECKED_AT_ONCE] & exponent) == exponent
            if odd.any():
                row, col = divmod(begin + int(odd.argmax()), self.cols)
                value = float(self.to_float32().reshape(-1)[row * self.cols + col])
                raise WeightFormatError(f"tensor {self.name!r}: value {col} of row {row} is {value}; it must be finite")

    def to_numpy(self) -> NDArray[Any]:
        """The values in the storage type, shaped, without a copy; UnsupportedModelError for types that numpy lacks."""
        kind = NUMPY_DTYPES.get(self.dtype)
        if kind is None:
            raise UnsupportedModelError(f"tensor {self.name!r} is stored as {self.dtype}; numpy has no such type")
        return self.data.view(kind).reshape(self.shape)

    def to_float32(self) -> NDArray[np.float32]:
        """The values as a new float32 array of the same shape; quantised types go through the native core."""
        if self.dtype == "BF16":
            wide = self.data.view("<u2").astype(np.uint32) << np.uint32(16)
            return wide.view(np.float32).reshape(self.shape)
        if self.dtype in NUMPY_DTYPES:
            return self.to_numpy().astype(np.float32)
        code = self.pld_dtype
        out = np.empty(self.shape, dtype=np.float32)
        if out.size:
            from pellucid.core import abi

            abi.convert(_convert_context(os.getpid()), self.data, code, self.rows, self.cols, out)
        return out


def from_float32(name: str, values: NDArray[np.float32]) -> TensorView:
    """An F32 tensor of `values`, in their shape."""
    flat = np.ascontiguousarray(values, dtype="<f4")
    return TensorView(name, "F32", tuple(values.shape), flat.reshape(-1).view(np.uint8))
