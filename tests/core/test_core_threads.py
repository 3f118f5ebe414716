"""Threads of the core: how many there are, who takes which task and who calls at the same time changes no bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from utils.core_attention import Array, available_isas, context, same_bits

from pellucid.core import abi
from pellucid.ops import native
from pellucid.ops.spec import OpSpec

isas = pytest.mark.parametrize("isa", available_isas())


def _packed(n: int, k: int, dtype: int) -> abi.Weight:
    values = (np.random.default_rng(n * k).standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)
    data = abi.aligned_bytes(abi.packed_bytes(n, k, dtype))
    abi.pack(context(), values.reshape(-1).view(np.uint8), abi.F32, n, k, 0, n, data, dtype)
    return abi.Weight(data, n, k, dtype, abi.PANELS)


def _linear(ctx: abi.Context, x: Array, weight: abi.Weight) -> Array:
    out = np.full((len(x), weight.rows), np.nan, np.float32)
    op = native.op_struct(OpSpec("linear", (x,), (weight,), (0,), out_widths=(weight.rows,)))
    abi.run_op(ctx, op, len(x), [(x.ctypes.data, x.shape[1])], [(out.ctypes.data, weight.rows)], [weight])
    return out


@isas
@pytest.mark.parametrize("dtype", [abi.F32, abi.BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (1, 64), (1, 1100), (3, 130), (200, 70), (400, 576)])
def test_tasks_when_fewer_or_more_than_threads_then_each_is_done_once(isa: str, dtype: int, rows: int, n: int) -> None:
    x = np.random.default_rng(rows).standard_normal((rows, 143)).astype(np.float32)
    weight = _packed(n, 143, dtype)
    alone = _linear(context(isa, 1), x, weight)
    assert np.isfinite(alone).all()
    for num_threads in (2, 3, 5, 8):
        assert same_bits(_linear(context(isa, num_threads), x, weight), alone)


def test_many_regions_when_run_one_after_another_then_no_task_is_lost() -> None:
    x = np.random.default_rng(0).standard_normal((7, 143)).astype(np.float32)
    weight = _packed(200, 143, abi.BF16)
    expected = _linear(context("auto", 1), x, weight)
    ctx = abi.Context(num_threads=3, spin_us=0)  # workers sleep between regions
    assert all(same_bits(_linear(ctx, x, weight), expected) for _ in range(300))
    ctx.close()


def test_one_context_when_called_from_several_threads_then_calls_take_turns() -> None:
    weight = _packed(300, 143, abi.BF16)
    inputs = [np.random.default_rng(i).standard_normal((1 + i, 143)).astype(np.float32) for i in range(24)]
    expected = [_linear(context("auto", 1), x, weight) for x in inputs]
    ctx = context("auto", 2)
    with ThreadPoolExecutor(6) as callers:
        found = list(callers.map(lambda x: _linear(ctx, x, weight), inputs))
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
