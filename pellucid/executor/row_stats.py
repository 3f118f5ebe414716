"""Argmax, maximum and log-sum-exp of rows of logits, made by the core's sample op."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pellucid.contract.executor import F32
from pellucid.core import abi
from pellucid.ops.native import run_on_arrays
from pellucid.ops.spec import OpSpec
from pellucid.sampling.sampler import RowStats


def native_row_stats(context: abi.Context) -> Callable[[F32], RowStats]:
    """A function from logits [L, V] to their statistics."""

    def row_stats(logits_LV: F32) -> RowStats:
        (out,) = run_on_arrays(context, OpSpec("sample", (logits_LV,), out_widths=(4,)))
        return RowStats(out[:, 0].view(np.int32).astype(np.int64), out[:, 1].copy(), out[:, 2].copy())

    return row_stats
