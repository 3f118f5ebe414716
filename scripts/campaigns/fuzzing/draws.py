"""Random values as a hostile caller would choose them."""

from __future__ import annotations

import ctypes
import random
import weakref
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
S = TypeVar("S", bound=ctypes.Structure)

MAX_STRUCT_SIZE = 4096  # of the core
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
EDGES_32 = (INT32_MIN, INT32_MIN + 1, -65536, -129, -17, -2, -1, 0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65)
EDGES_32 = (*EDGES_32, 127, 128, 255, 256, 257, 1023, 1024, 1025, 65535, 65536, 2**24, 2**26, 2**26 + 1, 2**30)
EDGES_32 = (*EDGES_32, INT32_MAX - 64, INT32_MAX - 1, INT32_MAX)
EDGES_64 = (
    *EDGES_32,
    INT64_MIN,
    INT64_MIN + 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**53,
    2**62,
    INT64_MAX - 63,
    INT64_MAX,
)
# Floats that are cast, divided by and compared with: both zeros, denormals, the ends, infinities, NaN.
EDGE_FLOATS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    5e-324,
    1e-45,
    -1e-45,
    1e-40,
    1.17549435e-38,
    1e-30,
    1e-7,
    0.5,
    0.999999,
    1.0000001,
)
EDGE_FLOATS = (*EDGE_FLOATS, 2.0, 127.0, 128.0, 1e10, 3.4e38, -3.4e38, 3.5e38, 1e300, float("inf"), -float("inf"))
EDGE_FLOATS = (*EDGE_FLOATS, float("nan"))
_POOL = 1 << 16
_LIBC = ctypes.CDLL(None)
_LIBC.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
_LIBC.free.argtypes = [ctypes.c_void_p]


def _pool(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(_POOL).astype(np.float32)


_SANE = _pool(1)
_WILD = _pool(2)
with np.errstate(over="ignore"):
    _WILD[::7] = np.random.default_rng(3).choice(np.array(EDGE_FLOATS), len(_WILD[::7])).astype(np.float32)
_BITS = np.random.default_rng(4).integers(0, 256, 4 * _POOL, dtype=np.uint8)


class Draw(random.Random):
    """Draws of one case."""

    def below(self, n: int) -> int:
        """An int in [0, n), faster than randrange."""
        return int(self.random() * n)

    def between(self, low: int, high: int) -> int:
        """An int in [low, high]."""
        return low + int(self.random() * (high - low + 1))

    def one(self, values: Sequence[T]) -> T:
        """One of the values."""
        return values[int(self.random() * len(values))]

    def chance(self, probability: float) -> bool:
        """True with a probability."""
        return self.random() < probability

    def hostile(self, near: int) -> int:
        """An int32 at an edge, or near a good value."""
        if self.random() < 0.5:
            return max(INT32_MIN, min(INT32_MAX, near + self.one((-2, -1, 1, 2, near, -2 * near))))
        return self.one(EDGES_32)

    def hostile64(self, near: int) -> int:
        """An int64 at an edge, or near a good value."""
        if self.random() < 0.5:
            return max(INT64_MIN, min(INT64_MAX, near + self.one((-2, -1, 1, 2, near, -2 * near))))
        return self.one(EDGES_64)

    def real(self) -> float:
        """A float at an edge, or any."""
        return self.one(EDGE_FLOATS) if self.random() < 0.5 else self.gauss(0.0, 2.0)

    def floats(self, count: int, wild: bool = False) -> np.ndarray:
        """`count` float32 in memory of their own; `wild`: with NaN, infinities and denormals among them."""
        pool = _WILD if wild else _SANE
        if count <= _POOL // 2:
            begin = self.below(_POOL // 2)
            return pool[begin : begin + count].copy()
        return np.resize(pool, count)

    def octets(self, count: int) -> np.ndarray:
        """Random bytes in memory of their own."""
        begin = self.below(_POOL)
        return _BITS[begin : begin + count].copy() if count <= 3 * _POOL else np.resize(_BITS, count)


def ints(values: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
    """As an array of C."""
    return (ctypes.c_int32 * len(values))(*values)


def longs(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """As an array of C."""
    return (ctypes.c_int64 * len(values))(*values)


def chars(values: Sequence[int]) -> ctypes.Array[ctypes.c_int8]:
    """As an array of C."""
    return (ctypes.c_int8 * len(values))(*values)


def fenced(nbytes: int) -> np.ndarray:
    """Zeroed bytes, aligned to 64, that end where their allocation ends: an address sanitizer sees what is read behind them."""
    out = ctypes.c_void_p()
    if _LIBC.posix_memalign(ctypes.byref(out), 64, max(1, nbytes)) != 0 or out.value is None:
        raise MemoryError(f"no memory for {nbytes} bytes")
    address = out.value
    block = (ctypes.c_uint8 * nbytes).from_address(address)
    weakref.finalize(block, _LIBC.free, address)
    ctypes.memset(address, 0, nbytes)
    return np.frombuffer(block, np.uint8)


def tail(draw: Draw) -> bytes:
    """Fields of a newer header: all zero, which means nothing, or one byte set, which is refused."""
    fields = bytearray(draw.one((1, 8, 16, 64, 1024)))
    if draw.chance(0.5):
        fields[draw.below(len(fields))] = draw.between(1, 255)
    return bytes(fields)


def with_tail(struct: S, fields: bytes) -> S:
    """The same struct in memory that ends with its caller's further fields."""
    memory = fenced(ctypes.sizeof(struct) + len(fields))
    memory[:] = np.frombuffer(bytes(struct) + fields, np.uint8)
    return type(struct).from_buffer(memory)
