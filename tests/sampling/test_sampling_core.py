"""The core's sampler beside its oracle: the same tokens over the whole chain, on every instruction set and any number of threads."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from pellucid.api.sampling_params import SamplingParams
from pellucid.core import abi
from pellucid.errors import NativeError
from pellucid.sampling.native import NativeRow, NativeSampler
from pellucid.sampling.reference import Sampler, row_stats_numpy
from pellucid.sampling.sampler import SampledToken, SamplingRow

V = 5000
ISAS = [name for code, name in abi.ISA_NAMES.items() if 1 <= code <= abi.ISA_CODES[abi.cpu_info().best_isa]]


def random_params(generator: np.random.Generator) -> SamplingParams:
    """Any mixture of the chain's fields."""
    asked: dict[str, Any] = {"temperature": float(generator.choice([0.0, 0.3, 1.0, 2.5]))}
    choices: dict[str, list[Any]] = {
        "top_k": [0, 1, 7, 200, V],
        "top_p": [1.0, 0.999, 0.9, 0.3, 1e-6],
        "min_p": [0.0, 0.01, 0.5, 1.0],
        "repetition_penalty": [1.0, 0.7, 1.4],
        "frequency_penalty": [0.0, 0.6, -0.5],
        "presence_penalty": [0.0, 0.9],
        "min_tokens": [0, 2, 12],
    }
    for name, values in choices.items():
        if generator.random() < 0.5:
            asked[name] = values[int(generator.integers(len(values)))]
    if generator.random() < 0.3:
        asked["logit_bias"] = {int(i): float(generator.normal() * 5) for i in generator.integers(0, V, 4)}
    if generator.random() < 0.2:
        asked["allowed_token_ids"] = sorted({int(i) for i in generator.integers(0, V, 30)})
    return SamplingParams(**asked, max_tokens=16)


def rows_of(generator: np.random.Generator, count: int) -> list[SamplingRow]:
    return [
        SamplingRow(
            random_params(generator),
            int(generator.integers(2**62)),
            int(generator.integers(3)),
            generator.integers(0, V, 20).tolist(),
            generator.integers(0, V, 5).tolist(),
            tuple((int(i),) for i in generator.integers(0, V, 2)) if generator.random() < 0.3 else (),
            (2, 7),
        )
        for _ in range(count)
    ]


def logits_of(generator: np.random.Generator, count: int) -> np.ndarray:
    logits = generator.standard_normal((count, V)).astype(np.float32)
    logits *= generator.choice([0.01, 1.0, 6.0], (count, 1)).astype(np.float32)
    logits[::3] = np.round(logits[::3], 1)  # many ties
    return np.ascontiguousarray(logits)


def sampled(context: abi.Context, logits: np.ndarray, rows: list[SamplingRow]) -> list[SampledToken]:
    return NativeSampler(context, V, len(rows)).sample(logits, [NativeRow(row) for row in rows])


@pytest.mark.parametrize("seed", range(8))
def test_random_chains_when_sampled_then_the_tokens_of_the_oracle(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows, logits = rows_of(generator, 60), logits_of(generator, 60)
    expected = Sampler(V).sample(logits, row_stats_numpy(logits), rows)
    found = sampled(abi.Context(2), logits, rows)
    assert [token.token_id for token in found] == [token.token_id for token in expected]
    assert [token.error is None for token in found] == [token.error is None for token in expected]
    assert len({token.token_id for token in found}) > 20


@pytest.mark.parametrize("isa", ISAS)
def test_rows_when_alone_or_together_on_one_or_two_threads_then_the_same_tokens(isa: str) -> None:
    generator = np.random.default_rng(99)
    rows, logits = rows_of(generator, 40), logits_of(generator, 40)
    one, two = abi.Context(1, isa), abi.Context(2, isa)
    together = sampled(two, logits, rows)
    assert sampled(one, logits, rows) == together
    assert [sampled(two, logits[i : i + 1], [row])[0] for i, row in enumerate(rows)] == together


def test_mask_when_given_then_only_its_tokens_come() -> None:
    allowed = np.array([3, 64, 65, V - 1])
    mask = np.zeros((V + 31) // 32, np.uint32)
    np.bitwise_or.at(mask, allowed // 32, np.uint32(1) << (allowed % 32).astype(np.uint32))
    context, generator = abi.Context(1), np.random.default_rng(1)
    drawn = set()
    for position in range(60):
        row = NativeRow(SamplingRow(SamplingParams(temperature=5.0), 7, 0, [], [0] * position))
        row.struct.mask = mask.ctypes.data
        drawn.add(NativeSampler(context, V, 1).sample(logits_of(generator, 1), [row])[0].token_id)
    assert drawn == set(allowed.tolist())


CONTRADICTIONS = [
    ("temperature", np.nan, "temperature is nan; it must be in [0, 100]"),
    ("top_p", 0.0, "top_p is 0; it must be in (0, 1]"),
    ("min_p", 2.0, "min_p is 2; it must be in [0, 1]"),
    ("repetition_penalty", 0.0, "repetition_penalty is 0; it must be in [1e-06, 10]"),
    ("repetition_penalty", 1e-45, "repetition_penalty is 1.4013e-45; it must be in [1e-06, 10]"),
    ("frequency_penalty", -np.inf, "frequency_penalty is -inf; it must be in [-2, 2]"),
    ("n_seen", 3, "3 seen ids, but no array"),
    ("struct_size", 8, "struct_size is 8"),
]


@pytest.mark.parametrize(("field", "value", "text"), CONTRADICTIONS)
def test_row_that_contradicts_itself_when_sampled_then_the_core_names_it_and_nothing_is_written(
    field: str, value: float, text: str
) -> None:
    rows = [NativeRow(SamplingRow(SamplingParams(), seed)) for seed in range(4)]
    setattr(rows[2].struct, field, value)
    results = np.full(4, 7, abi.SAMPLE_RESULT_DTYPE)
    with pytest.raises(NativeError, match=re.escape(text)) as caught:
        abi.sample(abi.Context(1), np.zeros((4, V), np.float32), [row.refresh(V) for row in rows], results)
    assert (caught.value.item, caught.value.index) == ("sample_row", 2)
    assert np.array_equal(results, np.full(4, 7, abi.SAMPLE_RESULT_DTYPE))


@pytest.mark.parametrize(("field", "value", "text"), CONTRADICTIONS)
def test_row_that_contradicts_itself_when_among_others_then_it_fails_alone(field: str, value: float, text: str) -> None:
    generator = np.random.default_rng(5)
    rows, logits = rows_of(generator, 12), logits_of(generator, 12)
    expected = sampled(abi.Context(1), logits, rows)
    natives = [NativeRow(row) for row in rows]
    for place in (0, 5, 11):
        natives[place] = NativeRow(SamplingRow(SamplingParams(), 1))
        setattr(natives[place].struct, field, value)
    found = NativeSampler(abi.Context(2), V, 12).sample(logits, natives)
    assert [place for place, token in enumerate(found) if text in (token.error or "")] == [0, 5, 11]
    assert [token for place, token in enumerate(found) if place not in (0, 5, 11)] == [
        token for place, token in enumerate(expected) if place not in (0, 5, 11)
    ]


class BrokenMatcher:
    """Fails in one of several ways."""

    error = None
    is_complete = False

    def __init__(self, mask: Any, problem: Exception | None = None) -> None:
        self.mask, self._problem = mask, problem

    def fill(self) -> None:
        if self._problem is not None:
            raise self._problem

    def accept(self, token_id: int) -> bool:
        return True


@pytest.mark.parametrize(
    ("matcher", "text"),
    [
        (BrokenMatcher(np.zeros(V // 32, np.uint32)), "mask is uint32 [156]; it must be uint32 [157]"),
        (BrokenMatcher(np.zeros((V + 31) // 32, np.int64)), "mask is int64 [157]; it must be uint32 [157]"),
        (
            BrokenMatcher(np.zeros(2 * ((V + 31) // 32), np.uint32)[::2]),
            "mask is uint32 [157]; it must be uint32 [157]",
        ),
        (BrokenMatcher(None), "mask is a NoneType"),
        (BrokenMatcher(None, RuntimeError("lost its place")), "RuntimeError: lost its place"),
    ],
    ids=["too short", "other type", "with gaps", "none", "raises"],
)
def test_matcher_when_it_fails_then_its_row_fails_alone(matcher: Any, text: str) -> None:
    generator = np.random.default_rng(6)
    rows, logits = rows_of(generator, 6), logits_of(generator, 6)
    expected = sampled(abi.Context(1), logits, rows)
    rows[3] = SamplingRow(SamplingParams(), 1, matcher=matcher)
    found = sampled(abi.Context(1), logits, rows)
    assert text in (found[3].error or "")
    assert [*found[:3], *found[4:]] == [*expected[:3], *expected[4:]]


def test_logits_when_the_edits_make_them_infinite_then_the_core_and_its_oracle_say_so() -> None:
    """Of a model whose logits are beyond all measure: the penalty is well in its range."""
    logits = np.full((2, V), 3e33, np.float32)
    rows = [SamplingRow(SamplingParams(repetition_penalty=penalty), 1, 0, [7]) for penalty in (1e-6, 0.5)]
    for found in (
        sampled(abi.Context(1), logits, rows),
        Sampler(V).sample(logits, row_stats_numpy(logits), rows),
    ):
        assert found[0].error == (
            "the logits are not finite behind repetition_penalty 1e-06, frequency_penalty 0, presence_penalty 0 and 0 biases"
        )
        assert found[1].token_id == 7


def test_top_p_when_the_least_number_above_zero_then_the_most_likely_token() -> None:
    logits = logits_of(np.random.default_rng(3), 4)
    rows = [SamplingRow(SamplingParams(top_p=5e-324), seed) for seed in range(4)]
    assert [token.token_id for token in sampled(abi.Context(1), logits, rows)] == logits.argmax(1).tolist()
