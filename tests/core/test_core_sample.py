"""Row statistics of logits: argmax, maximum and log-sum-exp."""

from __future__ import annotations

import numpy as np
import pytest
from utils.core_attention import Array, available_isas, context, same_bits

from pellucid.ops import native
from pellucid.ops.spec import OpSpec

isas = pytest.mark.parametrize("isa", available_isas())


def _sample(isa: str, x: Array, num_threads: int = 2) -> tuple[np.ndarray, Array, Array]:
    (out,) = native.run_on_arrays(context(isa, num_threads), OpSpec("sample", (x,), out_widths=(4,)))
    return out[:, 0].copy().view(np.int32), out[:, 1], out[:, 2]


@isas
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 100, 1000, 49152, 151936])
def test_logits_when_sampled_then_close_to_float64(isa: str, vocab: int) -> None:
    x = (np.random.default_rng(vocab).standard_normal((3, vocab)) * 4).astype(np.float32)
    index, top, log_sum = _sample(isa, x)
    assert index.tolist() == x.argmax(1).tolist()
    assert same_bits(top, x.max(1))
    expected = np.log(np.exp(x.astype(np.float64) - x.max(1, keepdims=True)).sum(1))
    np.testing.assert_allclose(log_sum, expected, rtol=3e-6, atol=1e-6)


@isas
@pytest.mark.parametrize("places", [[3, 20, 77], [98, 99], [0, 99], [31, 16], [50, 34, 18]])
def test_greatest_when_tied_then_lowest_index(isa: str, places: list[int]) -> None:
    x = np.full((1, 100), -1.0, np.float32)
    x[0, places] = 2.5
    assert _sample(isa, x)[0].tolist() == [min(places)]


@isas
def test_all_logits_when_equal_then_index_zero_and_log_of_the_width(isa: str) -> None:
    index, top, log_sum = _sample(isa, np.full((1, 1000), -7.0, np.float32))
    assert index.tolist() == [0]
    assert top.tolist() == [-7.0]
    np.testing.assert_allclose(log_sum, np.log(1000), rtol=1e-6)


@isas
def test_masked_logits_when_sampled_then_they_do_not_count(isa: str) -> None:
    x = np.full((1, 300), -np.inf, np.float32)
    x[0, [40, 290]] = [1.0, 1.0]
    index, top, log_sum = _sample(isa, x)
    assert (index[0], top[0]) == (40, 1.0)
    np.testing.assert_allclose(log_sum, np.log(2), rtol=1e-6)


@isas
@pytest.mark.parametrize("place", [0, 17, 99])
def test_row_when_it_holds_nan_then_its_sum_is_nan_and_its_neighbours_are_right(isa: str, place: int) -> None:
    x = np.random.default_rng(1).standard_normal((3, 100)).astype(np.float32)
    clean = _sample(isa, x)[2]
    x[1, place] = np.nan
    dirty = _sample(isa, x)[2]
    assert np.isnan(dirty[1])
    assert same_bits(dirty[[0, 2]], clean[[0, 2]])


@isas
def test_row_when_all_masked_then_its_sum_is_nan(isa: str) -> None:
    assert np.isnan(_sample(isa, np.full((1, 40), -np.inf, np.float32))[2][0])


@isas
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_rows_when_sampled_together_then_bitwise_as_alone(isa: str, num_threads: int) -> None:
    x = np.random.default_rng(2).standard_normal((9, 1003)).astype(np.float32)
    together = _sample(isa, x, num_threads)
    for row in range(9):
        alone = _sample(isa, x[row : row + 1], 1)
        assert all(
            same_bits(a.view(np.float32), b[row : row + 1].view(np.float32))
            for a, b in zip(alone, together, strict=True)
        )
