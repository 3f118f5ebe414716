"""What this machine could do at best, measured by the core's own kernels, and what a model's step would take at that rate.

A decode step reads every weight once and every key and value once, and multiplies each weight with each row: it takes at least the
longer of the two. A roofline (Williams, Waterman, Patterson 2009) of two numbers; what caches save or other ops cost is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pellucid.core import abi
from pellucid.ops.spec import OP_KINDS

if TYPE_CHECKING:
    from pellucid.executor.loader import LoadedModel

# How the core multiplies: weights of a type -> the type of the products.
_PRODUCTS = {abi.F32: "float32", abi.BF16: "bf16"}
_QUANTISED = "int8"
_PEAK_ROWS, _PEAK_OUT, _PEAK_WIDTH = 512, 2048, 1024
_WIDE_OUT, _WIDE_WIDTH = 65_536, 2048  # 256 MiB of bfloat16: more than caches hold


@dataclass(frozen=True)
class Limits:
    """Bytes read a second, and operations a second by type of product (a multiplication and an addition are two)."""

    bytes_per_second: float
    operations_per_second: Mapping[str, float]

    def as_dict(self) -> dict[str, float]:
        """Flat, for JSON."""
        return {"bytes_per_second": self.bytes_per_second, **self.operations_per_second}


@dataclass(frozen=True)
class StepCost:
    """What a decode step must at least move and multiply."""

    weight_bytes: int  # read once a step
    kv_bytes_per_token: int  # read once a step for each position of each sequence
    operations: Mapping[str, int]  # by type of product, for each row

    def seconds(self, batch: int, context: float, limits: Limits) -> float:
        """At best, for `batch` sequences of `context` positions each."""
        moved = self.weight_bytes + self.kv_bytes_per_token * context * batch
        multiplied = sum(count * batch / limits.operations_per_second[kind] for kind, count in self.operations.items())
        return max(moved / limits.bytes_per_second, multiplied)


def measure_limits(num_threads: int = 0, isa: str = "auto") -> Limits:
    """The best of several runs: one row times a matrix that no cache holds, and many rows times one that a cache does. About 3 s."""
    context = abi.Context(num_threads, isa, spin_us=2000)
    try:
        operations = 2 * _PEAK_ROWS * _PEAK_OUT * _PEAK_WIDTH
        peaks = {
            kind: operations / linear_seconds(context, dtype, _PEAK_ROWS, _PEAK_OUT, _PEAK_WIDTH, 20)
            for kind, dtype in (("float32", abi.F32), ("bf16", abi.BF16), ("int8", abi.I8))
        }
        wide = _WIDE_OUT * _WIDE_WIDTH * 2 / linear_seconds(context, abi.BF16, 1, _WIDE_OUT, _WIDE_WIDTH, 12)
    finally:
        context.close()
    return Limits(wide, peaks)


def linear_seconds(context: abi.Context, dtype: int, rows: int, out: int, width: int, repeats: int) -> float:
    """The best of `repeats` products of `rows` rows with one packed matrix [out, width] of `dtype`."""
    data = abi.aligned_bytes(abi.packed_bytes(out, width, dtype))
    data[:] = 1
    weight = abi.Weight(data, out, width, dtype, abi.PANELS)
    x, y = np.ones((rows, width), np.float32), np.zeros((rows, out), np.float32)
    op = abi.op_table(OP_KINDS["linear"], [width], [out], [weight])
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        abi.run_op(context, op, rows, [(x.ctypes.data, width)], [(y.ctypes.data, out)], [weight])
        best = min(best, time.perf_counter() - began)
    return best


def step_cost(model: LoadedModel, kv_bytes_per_token: int) -> StepCost | None:
    """From the program's own list of matrices; None for a mixture of experts, whose cost depends on the tokens, and without a program."""
    if model.file is None:
        return None
    ops = model.file.sections["ops"].view(abi.OP_DTYPE)
    if (ops["kind"] == OP_KINDS["moe"]).any():
        return None
    weights = model.file.meta["weights"]
    used = sorted({int(op["weight"][0]) for op in ops if op["kind"] == OP_KINDS["linear"]})
    operations: dict[str, int] = {}
    moved = 0
    for index in used:
        _, rows, cols, dtype, _, _, nbytes = weights[index]
        kind = _PRODUCTS.get(dtype, _QUANTISED)
        operations[kind] = operations.get(kind, 0) + 2 * int(rows) * int(cols)
        moved += int(nbytes)
    return StepCost(moved, kv_bytes_per_token, operations)
