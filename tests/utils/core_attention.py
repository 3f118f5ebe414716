"""Attention on the core's cache, a step at a time, and its oracle in float64.

T tokens, R sequences, H heads, G kv heads, E head width, S block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from pellucid.contract.batch import BatchInput
from pellucid.core import abi
from pellucid.ops.spec import OP_KINDS

Array = npt.NDArray[np.float32]
ISAS = ("portable", "avx2", "avx512")


def available_isas() -> list[str]:
    """Instruction sets that this machine has, the plainest first."""
    best = abi.cpu_info().best_isa
    return list(ISAS[: ISAS.index(best) + 1])


@cache
def context(isa: str = "auto", num_threads: int = 2) -> abi.Context:
    """One context for all tests of a process."""
    return abi.Context(num_threads=num_threads, isa=isa)


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays are equal bit by bit: -0 is not 0, and a NaN equals itself."""
    left, right = (torch.from_numpy(np.ascontiguousarray(x).view(np.int32)) for x in (a, b))
    return torch.equal(left, right)


def round_bf16(x: Array) -> Array:
    """Rounded to bfloat16 and widened again."""
    return torch.from_numpy(x).bfloat16().float().numpy()


@dataclass(frozen=True)
class Shape:
    """An attention layer."""

    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    window: int = 0
    softcap: float = 0.0
    dtype: int = abi.F32

    @property
    def scale(self) -> float:
        """1 / sqrt(E), as the op holds it."""
        return float(np.float32(self.head_dim**-0.5))


@dataclass(frozen=True)
class Sequence3:
    """The queries [T, H*E], keys and values [T, G*E] of one whole sequence."""

    q: Array
    k: Array
    v: Array

    def __len__(self) -> int:
        return len(self.q)


def random_sequence(shape: Shape, length: int, seed: int, spread: float = 1.0) -> Sequence3:
    """Normal values; `spread` scales the queries."""
    rng = np.random.default_rng(seed)
    wide, narrow = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    q, k, v = (rng.standard_normal((length, width)).astype(np.float32) for width in (wide, narrow, narrow))
    return Sequence3(q * np.float32(spread), k, v)


def as_stored(shape: Shape, x: Array) -> Array:
    """Keys or values [T, G * E] as the cache keeps them."""
    if shape.dtype == abi.F32:
        return x
    if shape.dtype == abi.BF16:
        return round_bf16(x)
    heads = x.reshape(len(x), -1, shape.head_dim)
    scale = np.abs(heads).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    return np.asarray((np.rint(heads * inverse) + 0.0) * scale, np.float32).reshape(x.shape)


def reference(shape: Shape, s: Sequence3, begin: int = 0) -> tuple[Array, Array]:
    """Plain softmax attention of a sequence's rows from `begin` on in float64, on operands rounded as the cache rounds them; and
    the weighted mean of the values' magnitudes, in units of which weights of lesser precision err."""
    rounded = (s.q if shape.dtype == abi.F32 else round_bf16(s.q), as_stored(shape, s.k), as_stored(shape, s.v))
    q, k, v = (x.reshape(len(s), -1, shape.head_dim).astype(np.float64) for x in rounded)
    q = q[begin:]
    k, v = (np.repeat(x, shape.num_heads // shape.num_kv_heads, axis=1) for x in (k, v))
    scores = np.einsum("qhe,phe->hqp", q, k) * shape.scale
    if shape.softcap > 0:
        scores = shape.softcap * np.tanh(scores / shape.softcap)
    query, key = np.arange(begin, len(s))[:, None], np.arange(len(s))[None, :]
    visible = (key <= query) & ((key > query - shape.window) if shape.window > 0 else True)
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out, size = (np.einsum("hqp,phe->qhe", weights, x).reshape(len(q), -1).astype(np.float32) for x in (v, np.abs(v)))
    return out, size


def assert_close(shape: Shape, s: Sequence3, out: Array, begin: int = 0, atol: float = 3e-5) -> None:
    """Rows from `begin` on against the oracle: what float32 accumulation leaves, and for caches whose weights are rounded
    to bfloat16 (8 significant bits: by at most 2^-8 of each product) that bound too."""
    expected, size = reference(shape, s, begin)
    rounding = 0.0 if shape.dtype == abi.F32 else 2.0**-8
    error, bound = np.abs(out - expected), atol + rounding * size
    assert np.isfinite(out).all()
    assert (error <= bound).all(), (
        f"error {error.max()} where {bound[np.unravel_index(error.argmax(), error.shape)]} is allowed"
    )


class World:
    """A cache with one layer of attention, and the block tables of its sequences."""

    def __init__(self, shape: Shape, tables: Sequence[Sequence[int]], block_size: int, n_blocks: int) -> None:
        self.shape, self.block_size = shape, block_size
        width = max(map(len, tables))
        self.tables = np.array([[*t, *[-1] * (width - len(t))] for t in tables], np.int32)
        self.kv = abi.KVCache(
            n_layers=2,
            n_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            block_size=block_size,
            n_blocks=n_blocks,
            dtype=shape.dtype,
        )

    def cells(self, seq: int, begin: int, end: int) -> npt.NDArray[np.int64]:
        """The cells of positions [begin, end)."""
        positions = np.arange(begin, end)
        return self.tables[seq][positions // self.block_size].astype(np.int64) * self.block_size + (
            positions % self.block_size
        )

    def step(self, ctx: abi.Context, work: Sequence[tuple[int, Sequence3, int, int]], layer: int = 1) -> list[Array]:
        """One step of (sequence, its values, begin, end) each; the outputs [end - begin, H*E]."""
        parts = [(s.q[a:b], s.k[a:b], s.v[a:b]) for _, s, a, b in work]
        q, k, v = (np.ascontiguousarray(np.concatenate(x)) for x in zip(*parts, strict=True))
        counts = [b - a for _, _, a, b in work]
        bounds = np.cumsum([0, *counts]).astype(np.int32)
        batch = BatchInput(
            input_ids_T=np.zeros(len(q), np.int32),
            positions_T=np.concatenate([np.arange(a, b, dtype=np.int32) for _, _, a, b in work]),
            query_start=bounds,
            seq_lens=np.array([b for *_, b in work], np.int32),
            block_tables=np.ascontiguousarray(self.tables[[seq for seq, *_ in work]]),
            slot_mapping_T=np.concatenate([self.cells(seq, a, b) for seq, _, a, b in work]),
        )
        out = np.full_like(q, np.nan)
        s, widths = self.shape, [x.shape[1] for x in (q, k, v)]
        ints = (layer, s.num_heads, s.num_kv_heads, s.head_dim, s.window)
        op = abi.op_table(OP_KINDS["attention"], widths, [q.shape[1]], (), ints, (s.scale, s.softcap))
        inputs = [(int(x.ctypes.data), x.shape[1]) for x in (q, k, v)]
        outputs = [(int(out.ctypes.data), out.shape[1])]
        abi.run_op(ctx, op, len(q), inputs, outputs, (), abi.batch_struct(batch), self.kv)
        return [out[bounds[i] : bounds[i + 1]] for i in range(len(work))]


def shuffled_tables(lengths: Sequence[int], block_size: int, seed: int, spare: int = 3) -> tuple[list[list[int]], int]:
    """Block tables in a random order of blocks, and the number of blocks they are taken from."""
    needs = [-(-length // block_size) for length in lengths]
    n_blocks = sum(needs) + spare
    order = np.random.default_rng(seed).permutation(n_blocks).tolist()
    tables = [[order.pop() for _ in range(need)] for need in needs]
    return tables, n_blocks


def run_alone(
    ctx: abi.Context,
    shape: Shape,
    s: Sequence3,
    *,
    chunk: int | None = None,
    block_size: int = 16,
    seed: int | None = None,
) -> Array:
    """One sequence in chunks, in consecutive blocks or (with a seed) in shuffled ones: [T, H*E]."""
    n_blocks = -(-len(s) // block_size)
    tables = [list(range(n_blocks))]
    if seed is not None:
        tables, n_blocks = shuffled_tables([len(s)], block_size, seed)
    world = World(shape, tables, block_size, n_blocks)
    step = chunk or len(s)
    outs = [world.step(ctx, [(0, s, a, min(a + step, len(s)))])[0] for a in range(0, len(s), step)]
    return np.concatenate(outs)
