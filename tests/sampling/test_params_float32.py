"""What admission takes, the core takes: every number of the sampling parameters at and around its limits, in both precisions."""

from __future__ import annotations

import math
from ctypes import c_double, c_float
from typing import Any

import numpy as np
import pytest

from pellucid.api.sampling_params import BIAS_RANGE, FLOAT_RANGES, SamplingParams
from pellucid.core import abi, structs
from pellucid.errors import InvalidRequestError, NativeError
from pellucid.sampling.native import NativeRow, NativeSampler
from pellucid.sampling.sampler import SamplingRow

V = 64
CORE_TYPES: dict[str, Any] = dict(structs.SampleRowStruct._fields_)  # type: ignore[arg-type]
SPECIAL = [
    *(0.0, -0.0, 5e-324, 1e-320, 1e-300, 1e-46, 7e-46, 1e-45, 1.4e-45, 1e-40, 1e-38, 1.2e-38, 1e-30, 1e-7, 1e-6, 1e-3),
    *(0.5, 1.0, 2.0, 10.0, 99.0, 1e6, 3.4e38, 3.5e38, 1e300, math.inf, math.nan),
]


@pytest.fixture(scope="module")
def context() -> abi.Context:
    return abi.Context(1)


def boundary_values(low: float, high: float) -> list[float]:
    """Special values of both signs, and the neighbours of both limits, as doubles and as floats."""
    found = [sign * value for value in SPECIAL for sign in (1.0, -1.0)]
    for limit in (low, high):
        single = np.float32(limit)
        found += [limit, math.nextafter(limit, -math.inf), math.nextafter(limit, math.inf)]
        found += [float(single), *(float(np.nextafter(single, np.float32(way))) for way in (-np.inf, np.inf))]
    return found


def admitted(**params: Any) -> SamplingParams | None:
    try:
        return SamplingParams(**params)
    except InvalidRequestError:
        return None


def core_takes(context: abi.Context, name: str, value: float) -> bool:
    """Whether the core samples a row whose field has this value, as a C caller could write it there."""
    row = NativeRow(SamplingRow(SamplingParams(), 1))
    setattr(row.struct, name, value)
    try:
        abi.sample(context, LOGITS, [row.refresh(V)], np.zeros(1, abi.SAMPLE_RESULT_DTYPE))
        return True
    except NativeError:
        return False


LOGITS = np.linspace(-9, 9, V, dtype=np.float32)[None, :].copy()


def test_numbers_of_a_row_when_listed_then_each_has_a_range_and_its_type_is_the_core_s() -> None:
    numbers = {name for name, kind in CORE_TYPES.items() if kind in (c_float, c_double)}
    assert numbers == set(FLOAT_RANGES)
    assert {name: limits.core for name, limits in FLOAT_RANGES.items()} == {name: CORE_TYPES[name] for name in numbers}


@pytest.mark.parametrize("name", FLOAT_RANGES)
def test_value_around_the_limits_when_admitted_then_the_core_takes_it_and_samples(
    context: abi.Context, name: str
) -> None:
    limits = FLOAT_RANGES[name]
    taken = 0
    for value in boundary_values(limits.low, limits.high):
        params = admitted(**{name: value})
        if params is None:
            continue
        taken += 1
        row = SamplingRow(params, 1, 0, [1, 2], [3, 3])
        (found,) = NativeSampler(context, V, 1).sample(LOGITS, [NativeRow(row)])
        assert found.error is None, f"{name} {value!r}: {found.error}"
        assert 0 <= found.token_id < V
    assert taken > 5


@pytest.mark.parametrize("name", FLOAT_RANGES)
def test_value_around_the_limits_when_it_is_one_of_the_core_s_type_then_both_take_it_or_neither(
    context: abi.Context, name: str
) -> None:
    limits = FLOAT_RANGES[name]
    for value in boundary_values(limits.low, limits.high):
        as_core = value if limits.core is c_double else float(np.float32(value)) if abs(value) < 1e30 else value
        by_admission = admitted(**{name: as_core}) is not None
        assert by_admission == core_takes(context, name, as_core), f"{name} {as_core!r}"


@pytest.mark.parametrize(
    "value", [5e-324, 1e-320, 7e-46, 1e-46, 1e-45, 1e-40, 1e-38, 1e-30, 1e-10, 9.9e-7, 0.0, -0.0, -1e-46]
)
def test_repetition_penalty_when_logits_divided_by_it_could_overflow_then_refused_with_the_limit(value: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"repetition_penalty is .*; it must be in \[1e-06, 10\]") as caught:
        SamplingParams(repetition_penalty=value)
    assert caught.value.param == "repetition_penalty"


@pytest.mark.parametrize("value", [5e-324, 1e-46, 1e-45, 1e-38, 1e-31, 1e-30, 1e-29])
def test_temperature_when_vanishing_then_the_most_likely_token_and_no_overflow(
    context: abi.Context, value: float
) -> None:
    (found,) = NativeSampler(context, V, 1).sample(
        LOGITS, [NativeRow(SamplingRow(SamplingParams(temperature=value), 1))]
    )
    assert (found.token_id, found.error) == (V - 1, None)


def test_bias_around_the_limits_when_admitted_then_the_token_is_sampled(context: abi.Context) -> None:
    for value in boundary_values(BIAS_RANGE.low, BIAS_RANGE.high):
        params = admitted(logit_bias={5: value})
        if params is None:
            continue
        (found,) = NativeSampler(context, V, 1).sample(LOGITS, [NativeRow(SamplingRow(params, 1))])
        assert found.error is None


@pytest.mark.parametrize("value", [100.00000001, -100.00000001, 1e39, -1e39, math.nan])
def test_bias_when_out_of_range_then_refused_by_name(value: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"logit_bias\[5\] is .*; it must be in \[-100, 100\]"):
        SamplingParams(logit_bias={5: value})
