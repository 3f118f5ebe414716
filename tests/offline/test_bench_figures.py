"""The arithmetic of benchmarks, on numbers that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.bench.figures import Spread, StepShares, percentile, spread_lengths
from pellucid.bench.limits import Limits, StepCost
from pellucid.trace.records import StepRecord

LIMITS = Limits(bytes_per_second=100.0, operations_per_second={"bf16": 1000.0, "int8": 4000.0})


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_when_given_any_values_then_as_numpy(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_percentile_when_out_of_range_then_refused(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError):
        percentile(values, percent)


def test_spread_when_given_values_then_mean_median_and_ends() -> None:
    spread = Spread.of([4.0, 1.0, 3.0, 2.0, 10.0])
    assert (spread.count, spread.mean, spread.median, spread.least, spread.most) == (5, 4.0, 3.0, 1.0, 10.0)
    assert spread.p90 == pytest.approx(7.6)
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


def test_shares_when_steps_are_summed_then_parts_and_rest_make_the_wall() -> None:
    records = [
        StepRecord(i, "decode", schedule_seconds=0.1, execute_seconds=0.7, sample_seconds=0.2, output_seconds=0.05)
        for i in range(2)
    ]
    shares = StepShares.of(records, 2.0)
    assert shares.steps == 2
    assert shares.execute == pytest.approx(1.0)  # sampling is told apart
    assert shares.sample == pytest.approx(0.4)
    assert shares.other == pytest.approx(2.0 - 0.2 - 1.0 - 0.4 - 0.1)
    assert shares.host_share == pytest.approx(0.5)
    assert set(shares.as_dict()) >= {"schedule", "execute", "sample", "output", "other", "host_share"}
    with pytest.raises(ValueError, match="more than 0"):
        StepShares.of(records, 0.0)


def test_cost_when_few_sequences_then_memory_sets_the_limit_and_with_many_the_products() -> None:
    cost = StepCost(weight_bytes=1000, kv_bytes_per_token=1, operations={"bf16": 1000, "int8": 2000})
    assert cost.seconds(1, 100, LIMITS) == pytest.approx((1000 + 100) / 100)
    # each row: 1000 / 1000 + 2000 / 4000 seconds of products
    assert cost.seconds(100, 1, LIMITS) == pytest.approx(150.0)


@given(st.integers(1, 500), st.floats(0, 0.99), st.integers(0, 9))
def test_lengths_when_spread_then_within_bounds_and_repeatable(length: int, ratio: float, seed: int) -> None:
    found = spread_lengths(length, ratio, 20, seed)
    assert found == spread_lengths(length, ratio, 20, seed)
    assert all(max(1, length * (1 - ratio) - 1) <= one <= length * (1 + ratio) + 1 for one in found)
    assert ratio or found == [length] * 20


def test_lengths_when_the_ratio_is_one_then_refused() -> None:
    with pytest.raises(ValueError, match="below 1"):
        spread_lengths(10, 1.0, 2, 0)
