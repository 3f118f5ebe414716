"""The core's sampler beside its oracle: the same tokens over the whole chain, on every instruction set and any number of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pellucid.errors import NativeError
from pellucid.ops import abi
from pellucid.params import SamplingParams
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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", np.nan),
        ("top_p", 0.0),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("n_seen", 3),
        ("struct_size", 8),
    ],
)
def test_row_that_contradicts_itself_when_sampled_then_refused(field: str, value: float) -> None:
    row = NativeRow(SamplingRow(SamplingParams(), 1))
    setattr(row.struct, field, value)
    with pytest.raises(NativeError):
        NativeSampler(abi.Context(1), V, 1).sample(np.zeros((1, V), np.float32), [row])
