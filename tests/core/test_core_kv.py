"""The KV store: sizes that are checked before any memory is asked for, and what reading back refuses."""

from __future__ import annotations

import numpy as np
import psutil
import pytest

from pellucid.core import abi
from pellucid.errors import NativeError

SMALL = {"n_layers": 2, "n_kv_heads": 3, "head_dim": 64, "block_size": 16, "n_blocks": 5, "dtype": abi.F32}
INT32_MAX = 2**31 - 1


def _create(**changes: int) -> abi.KVCache:
    return abi.KVCache(**{**SMALL, **changes})


@pytest.mark.parametrize(
    ("changes", "values", "value_bytes"),
    [({}, 80, 4), ({"dtype": abi.BF16}, 80, 2), ({"block_size": 64, "n_blocks": 1}, 64, 4)],
)
def test_cache_when_created_then_counts_keys_and_values(changes: dict[str, int], values: int, value_bytes: int) -> None:
    assert _create(**changes).nbytes == 2 * 2 * values * 3 * 64 * value_bytes


def test_cells_when_no_multiple_of_a_group_then_they_are_rounded_up() -> None:
    cache = _create(block_size=5, n_blocks=5)
    assert cache.nbytes == 2 * (32 + 32) * 3 * 64 * 4


def test_fresh_cache_when_read_then_zero() -> None:
    k, v = _create(dtype=abi.BF16).read(1, 79)
    assert k.shape == v.shape == (3, 64)
    assert not np.any(k)
    assert not np.any(v)


def test_large_cache_when_created_then_costs_no_resident_memory() -> None:
    before = psutil.Process().memory_info().rss
    cache = _create(n_layers=8, n_blocks=4096)
    grown = psutil.Process().memory_info().rss - before
    assert cache.nbytes == 768 << 20
    assert grown < 64 << 20


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layers", 0),
        ("n_kv_heads", -1),
        ("head_dim", 0),
        ("head_dim", 63),
        ("head_dim", 4096),
        ("block_size", 0),
        ("n_blocks", -(2**31)),
        ("dtype", 2),
        ("dtype", -1),
    ],
)
def test_field_when_out_of_range_then_refused_by_name_and_value(field: str, value: int) -> None:
    with pytest.raises(NativeError, match=rf"{field} is {value}"):
        _create(**{field: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"n_blocks": INT32_MAX, "block_size": INT32_MAX},
        {"n_blocks": INT32_MAX, "block_size": INT32_MAX, "n_kv_heads": INT32_MAX, "n_layers": INT32_MAX},
        {"n_kv_heads": INT32_MAX, "head_dim": 2048, "n_blocks": INT32_MAX},
    ],
)
def test_size_when_it_overflows_then_refused(changes: dict[str, int]) -> None:
    with pytest.raises(NativeError, match="address space"):
        _create(**changes)


def test_size_when_beyond_any_memory_then_out_of_memory() -> None:
    with pytest.raises(NativeError, match="no memory"):
        _create(n_layers=1024, n_blocks=INT32_MAX)


@pytest.mark.parametrize(("layer", "cell"), [(-1, 0), (2, 0), (0, -1), (0, 80), (0, 2**40)])
def test_read_when_outside_the_cache_then_refused(layer: int, cell: int) -> None:
    with pytest.raises(NativeError, match="the cache has"):
        _create().read(layer, cell)
