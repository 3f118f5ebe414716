"""Attention alone: GB/s of keys and values read in decode, GFLOP/s in prefill beside those of the bfloat16 linear.

    python benchmarks/attention.py decode --threads 1 2
    python benchmarks/attention.py prefill --dtypes bf16

Layers are walked in turn, so that what a step reads has left the caches since the step before. The best of the rounds
counts: what a machine can do, not what its neighbours leave. T tokens, H heads, G kv heads, E head width.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pellucid.contract.batch import BatchInput
from pellucid.core import abi, structs
from pellucid.ops.spec import OP_KINDS

SHAPES = {"smollm2-135m": (9, 3, 64), "llama-1b": (32, 8, 64), "wide": (32, 8, 128)}
DTYPES = {"f32": (0, 4), "bf16": (1, 2), "int8": (11, 1)}
BLOCK = 16
COLD_BYTES = 256 << 20  # keys and values of all layers together: far more than caches hold
MAX_BYTES = 6 << 30


def _op(layer: int, shape: tuple[int, int, int], window: int = 0) -> abi.AnyArray:
    heads, kv_heads, width = shape
    widths = [heads * width, kv_heads * width, kv_heads * width]
    ints = (layer, heads, kv_heads, width, window)
    return abi.op_table(OP_KINDS["attention"], widths, widths[:1], (), ints, (width**-0.5,))


class Bench:
    """One cache of `batch` sequences of `context` positions, and prepared calls on it."""

    def __init__(self, threads: int, shape: tuple[int, int, int], batch: int, context: int, dtype: str) -> None:
        code, nbytes = DTYPES[dtype]
        self.shape, self.batch, self.length = shape, batch, context
        _, kv_heads, width = shape
        self.context = abi.Context(num_threads=threads)
        per_layer = 2 * batch * context * kv_heads * width * nbytes
        self.layers = max(1, min(30, -(-COLD_BYTES // per_layer)))
        self.width = -(-context // BLOCK)
        self.kv = abi.KVCache(
            n_layers=self.layers,
            n_kv_heads=kv_heads,
            head_dim=width,
            block_size=BLOCK,
            n_blocks=batch * self.width,
            dtype=code,
        )
        self.step_bytes = self.kv.nbytes // self.layers
        order = np.random.default_rng(0).permutation(batch * self.width).astype(np.int32)
        self.tables = order.reshape(batch, self.width)
        self.kept: list[Any] = []  # what the calls point to

    def call(self, layer: int, begin: int, end: int, seqs: range, window: int = 0) -> Callable[[], None]:
        """Positions [begin, end) of each of `seqs`."""
        heads, kv_heads, width = self.shape
        count = end - begin
        positions = np.tile(np.arange(begin, end, dtype=np.int32), len(seqs))
        tables = np.ascontiguousarray(self.tables[seqs.start : seqs.stop])
        rows = np.repeat(np.arange(len(seqs)), count)
        slots = tables[rows, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK
        bounds = np.arange(0, len(positions) + 1, count, dtype=np.int32)
        lengths = np.full(len(seqs), end, np.int32)
        none = np.zeros(0, np.int32)
        batch = BatchInput(np.zeros(len(positions), np.int32), positions, bounds, lengths, tables, slots, none)
        rng = np.random.default_rng(layer)
        arrays = [rng.standard_normal((len(positions), n * width), np.float32) for n in (heads, kv_heads, kv_heads)]
        out = np.empty_like(arrays[0])
        struct, op = abi.batch_struct(batch), _op(layer, self.shape, window)
        call = structs.OpCallStruct(
            struct_size=ctypes.sizeof(structs.OpCallStruct),
            op=op.ctypes.data,
            op_size=op.itemsize,
            rows=len(positions),
        )
        for i, array in enumerate(arrays):
            call.in_[i], call.in_stride[i] = array.ctypes.data, array.shape[1]
        call.out[0], call.out_stride[0] = out.ctypes.data, out.shape[1]
        call.batch, call.kv = ctypes.addressof(struct), self.kv.handle
        self.kept.append((batch, arrays, out, struct, op))
        run, handle, pointer = abi.library().pld_op_run, self.context.handle, ctypes.byref(call)

        def go() -> None:
            abi.check(run(handle, pointer))

        return go

    def fill(self, length: int) -> None:
        """Random keys and values at positions [0, length): attention to one position each, which costs little."""
        for layer in range(self.layers):
            for seq in range(self.batch):
                for begin in range(0, length, 4096):
                    self.call(layer, begin, min(begin + 4096, length), range(seq, seq + 1), window=1)()
                    self.kept.clear()

    def close(self) -> None:
        """Frees memory and threads."""
        self.kv.close()
        self.context.close()


def best_seconds(calls: Sequence[Callable[[], None]], rounds: int, budget: float) -> float:
    """Seconds of one call: the best mean over all of them among some rounds."""
    for call in calls:
        call()
    best, end = float("inf"), time.perf_counter() + budget
    for _ in range(rounds):
        start = time.perf_counter()
        for call in calls:
            call()
        now = time.perf_counter()
        best = min(best, (now - start) / len(calls))
        if now > end:
            break
    return best


def decode(args: argparse.Namespace) -> None:
    """A table row a case: microseconds of a step's attention in one layer, and GB/s."""
    for name in args.shapes:
        for dtype in args.dtypes:
            for context in args.contexts:
                for batch in args.batches:
                    for threads in args.threads:
                        _, kv_heads, width = SHAPES[name]
                        if 2 * batch * context * kv_heads * width * DTYPES[dtype][1] > MAX_BYTES // 4:
                            continue
                        bench = Bench(threads, SHAPES[name], batch, context, dtype)
                        bench.fill(context - 1)
                        calls = [bench.call(i, context - 1, context, range(batch)) for i in range(bench.layers)]
                        seconds = best_seconds(calls, args.rounds, args.budget)
                        rate = bench.step_bytes / seconds / 1e9
                        emit(shape=name, dtype=dtype, context=context, batch=batch, threads=threads,
                             us=round(seconds * 1e6, 1), gb_s=round(rate, 1))  # fmt: skip
                        bench.close()


def linear_gflops(threads: int, rows: int) -> float:
    """GFLOP/s of a bfloat16 linear [rows, 2048] x [2048, 2048]."""
    context, size = abi.Context(num_threads=threads), 2048
    source = np.random.default_rng(0).standard_normal((size, size), np.float32)
    packed = abi.aligned_bytes(abi.packed_bytes(size, size, abi.BF16))
    abi.pack(context, source.view(np.uint8).reshape(-1), abi.F32, size, size, 0, size, packed, abi.BF16)
    weight = abi.Weight(packed, size, size, abi.BF16, abi.PANELS)
    x = np.random.default_rng(1).standard_normal((rows, size), np.float32)
    out = np.empty((rows, size), np.float32)
    op = abi.op_table(OP_KINDS["linear"], [size], [size], [weight])

    def go() -> None:
        abi.run_op(context, op, rows, [(x.ctypes.data, size)], [(out.ctypes.data, size)], [weight])

    return 2 * rows * size * size / best_seconds([go], 20, 2.0) / 1e9


def prefill(args: argparse.Namespace) -> None:
    """A table row a case: GFLOP/s over the positions that are seen, and the share of the linear's rate."""
    for threads in args.threads:
        for chunk in args.chunks:
            linear = linear_gflops(threads, chunk)
            for name in args.shapes:
                heads, _, width = SHAPES[name]
                for dtype in args.dtypes:
                    for context in args.contexts:
                        if context < chunk:
                            continue
                        bench = Bench(threads, SHAPES[name], 1, context, dtype)
                        bench.layers = 1
                        bench.fill(context - chunk)
                        seconds = best_seconds([bench.call(0, context - chunk, context, range(1))], 10, args.budget)
                        seen = chunk * (context - chunk) + chunk * (chunk + 1) // 2
                        rate = 4 * heads * width * seen / seconds / 1e9
                        emit(shape=name, dtype=dtype, chunk=chunk, context=context, threads=threads,
                             ms=round(seconds * 1e3, 2), gflops=round(rate, 1), of_linear=round(rate / linear, 2))  # fmt: skip
                        bench.close()


def emit(**row: Any) -> None:
    """One JSON object a line."""
    print(json.dumps(row), flush=True)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decode", "prefill"))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=list(DTYPES))
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 4096, 16384])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--chunks", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a case")
    args = parser.parse_args()
    (decode if args.what == "decode" else prefill)(args)


if __name__ == "__main__":
    main()
