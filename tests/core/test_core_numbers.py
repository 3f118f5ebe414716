"""Numbers of a model on their way into the core's structs: what float32 cannot hold is refused where it is written."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pellucid.core import abi
from pellucid.errors import ConfigError
from pellucid.layers.rotary import inverse_frequencies
from pellucid.ops.native import op_struct, run_on_arrays
from pellucid.ops.spec import OpSpec, core_floats
from pellucid.program.builder import encode_ops
from pellucid.program.tracer import RecordedOp, Recording

WRONG = [
    (math.nan, "finite"),
    (math.inf, "finite"),
    (1e39, "finite"),
    (-1e300, "finite"),
    (1e-46, "it is 0 in float32"),
]
GOOD = [0.0, -0.0, 1e-45, 1e-30, -2.5, 3.4e38]


@pytest.mark.parametrize(("value", "text"), WRONG)
def test_number_of_an_op_when_float32_cannot_hold_it_then_refused_where_it_is_written(value: float, text: str) -> None:
    x = np.ones((1, 4), np.float32)
    with pytest.raises(ConfigError, match=rf"number 0 of op scale is .*{text}"):
        op_struct(OpSpec("scale", (x,), floats=(value,), out_widths=(4,)))
    recording = Recording(widths=[4, 4], domains=["T", "T"], n_forward_ops=1, hidden=1, logits=1)
    recording.ops = [RecordedOp("attention", ((0, 0, 4),), (1,), (), (0, 1, 1, 4, 0), (0.5, value))]
    with pytest.raises(ConfigError, match=rf"number 1 of op attention is .*{text}"):
        encode_ops(recording)


@pytest.mark.parametrize("value", GOOD)
def test_number_of_an_op_when_it_is_written_then_the_core_takes_it(value: float) -> None:
    assert core_floats("scale", (value,)) == [value, 0.0, 0.0, 0.0]
    x = np.array([[1.0, -2.0]], np.float32)
    with np.errstate(over="ignore"):
        expected = x * np.float32(value)
    (found,) = run_on_arrays(abi.Context(1), OpSpec("scale", (x,), floats=(value,), out_widths=(2,)))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("theta", "scaling", "text"),
    [
        (1e-45, None, "frequencies and their factor must be finite in float32"),
        (1e4, {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1e39}, "must be finite in float32"),
        (1.0, {"rope_type": "yarn", "factor": 2.0}, "division by zero"),
        (1e4, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": -5}, "math domain error"),
        (1e4, {"rope_type": "factors", "factors": [1.0, 0.0] * 16}, "must be finite in float32"),
        (
            1e4,
            {
                "rope_type": "llama3",
                "factor": 1e-44,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "rope_scaling is",
        ),
    ],
)
def test_rotary_parameters_when_they_give_no_finite_frequencies_then_refused_with_them(
    theta: float, scaling: dict[str, Any] | None, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        inverse_frequencies(theta, 64, scaling, 512)
