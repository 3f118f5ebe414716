"""The sampler as the runner uses it: distribution, determinism, rows that do not touch one another, logprobs."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from pellucid.api.sampling_params import SamplingParams
from pellucid.core import abi
from pellucid.sampling import RowStats, SampledToken, SamplingRow, reference
from pellucid.sampling.native import NativeRow, NativeSampler
from pellucid.sampling.reference import Sampler, row_stats_numpy
from pellucid.sampling.sampler import prompt_logprobs

V = 2048

MIXED: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 40, "logprobs": 5},
    {"top_k": 1, "repetition_penalty": 1.3},
    {"temperature": 0.9, "min_p": 0.02, "frequency_penalty": 0.4, "logprobs": 0},
    {"logit_bias": {5: 50.0}, "top_p": 0.5},
    {"allowed_token_ids": [1, 2, 3], "temperature": 3.0},
]


class CoreSampler:
    """The core's sampler, called as the oracle is."""

    def __init__(self, vocab_size: int) -> None:
        self._sampler = NativeSampler(abi.Context(2), vocab_size, 64)
        self._rows: dict[int, tuple[SamplingRow, NativeRow]] = {}

    def sample(self, logits: np.ndarray[Any, Any], stats: RowStats, rows: list[SamplingRow]) -> list[SampledToken]:
        for row in rows:
            self._rows.setdefault(id(row), (row, NativeRow(row)))
        return self._sampler.sample(logits, [self._rows[id(row)][1] for row in rows])


@pytest.fixture(autouse=True, params=["numpy", "core"])
def _chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "core":
        monkeypatch.setattr(sys.modules[__name__], "Sampler", CoreSampler)


def random_logits(num_rows: int, seed: int = 0, scale: float = 2.0, vocab_size: int = V) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((num_rows, vocab_size)) * scale).astype(np.float32)


def sample(logits: np.ndarray[Any, Any], rows: list[SamplingRow], sampler: Sampler | None = None) -> list[SampledToken]:
    return (sampler or Sampler(logits.shape[1])).sample(logits, row_stats_numpy(logits), rows)


def make_row(arguments: dict[str, Any], seed: int = 0) -> SamplingRow:
    return SamplingRow(SamplingParams(**arguments), seed, 0, [1, 2, 3], [4, 5])


def chi_square(counts: np.ndarray[Any, Any], probabilities: np.ndarray[Any, Any]) -> float:
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


def drawn_counts(logits_V: np.ndarray[Any, Any], params: SamplingParams, num_draws: int) -> np.ndarray[Any, Any]:
    """Counts over one request's successive positions, all with the same logits."""
    sampler, logits = Sampler(logits_V.size), logits_V[None]
    stats = row_stats_numpy(logits)
    row = SamplingRow(params, seed=1234)
    for _ in range(num_draws):
        row.output_token_ids.append(sampler.sample(logits, stats, [row])[0].token_id)
    return np.bincount(row.output_token_ids, minlength=logits_V.size)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_many_draws_when_temperature_alone_then_softmax_distribution(temperature: float) -> None:
    logits = random_logits(1, 3, 1.0, 20)[0]
    counts = drawn_counts(logits, SamplingParams(temperature=temperature), 6000)
    probabilities = torch.softmax(torch.from_numpy(logits).double() / temperature, -1).numpy()
    assert chi_square(counts, probabilities) < 43.8  # 19 degrees of freedom, p = 0.001


def test_many_draws_when_top_k_then_renormalised_over_the_top_k() -> None:
    logits = random_logits(1, 4, 1.0, 400)[0]
    counts = drawn_counts(logits, SamplingParams(top_k=10), 6000)
    top = np.argsort(-logits)[:10]
    assert counts.sum() == counts[top].sum()
    assert chi_square(counts[top], torch.softmax(torch.from_numpy(logits[top]).double(), -1).numpy()) < 27.9  # 9 d.o.f.


def test_many_draws_when_top_p_and_min_p_then_none_outside_of_both() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], dtype=np.float32))
    counts = drawn_counts(logits, SamplingParams(top_p=0.8, min_p=0.5), 3000)
    assert counts[2:].tolist() == [0, 0, 0]
    assert chi_square(counts[:2], np.array([4 / 7, 3 / 7])) < 10.8  # 1 d.o.f.


def test_choices_and_seeds_when_sampled_then_draws_differ() -> None:
    logits = np.repeat(random_logits(1), 30, axis=0)
    by_choice = sample(logits, [SamplingRow(SamplingParams(), 9, choice) for choice in range(30)])
    by_seed = sample(logits, [SamplingRow(SamplingParams(), seed) for seed in range(30)])
    by_position = sample(logits, [SamplingRow(SamplingParams(), 9, 0, (), [1] * n) for n in range(30)])
    for outcomes in (by_choice, by_seed, by_position):
        assert len({outcome.token_id for outcome in outcomes}) > 15
    assert by_choice[0] == by_position[0]


def test_rows_when_sampled_alone_in_any_order_or_from_other_memory_then_same_outcome() -> None:
    logits = random_logits(len(MIXED))
    rows = [make_row(arguments, seed) for seed, arguments in enumerate(MIXED)]
    together = sample(logits, rows)
    sampler = Sampler(V)
    alone = [sample(logits[i : i + 1], [make_row(MIXED[i], i)], sampler)[0] for i in range(len(MIXED))]
    backwards = sample(logits[::-1].copy(), rows[::-1])[::-1]
    shifted_memory = np.empty(logits.size + 1, dtype=np.float32)[1:].reshape(logits.shape)
    shifted_memory[:] = logits
    assert together == alone == backwards == sample(shifted_memory, rows)
    assert all(outcome.error is None for outcome in together)


def test_logits_when_sampled_with_edits_then_left_as_they_were() -> None:
    logits = random_logits(len(MIXED))
    before = logits.copy()
    sample(logits, [make_row(arguments) for arguments in MIXED])
    assert torch.equal(torch.from_numpy(logits), torch.from_numpy(before))


def test_greedy_row_when_ties_then_lowest_id_with_and_without_edits() -> None:
    logits = np.zeros((3, V), dtype=np.float32)
    logits[:, [70, 900]] = 3.0
    rows = [make_row({"temperature": 0}), make_row({"top_k": 1}), make_row({"temperature": 0, "logit_bias": {70: -1}})]
    assert [outcome.token_id for outcome in sample(logits, rows)] == [70, 70, 900]


def test_eos_row_when_min_tokens_reached_then_eos_may_come() -> None:
    logits = np.zeros((1, V), dtype=np.float32)
    logits[0, 6] = 9.0
    row = SamplingRow(SamplingParams(temperature=0, min_tokens=2), 0, eos_token_ids=(6,))
    tokens = []
    for _ in range(3):
        tokens.append(sample(logits, [row])[0].token_id)
        row.output_token_ids.append(tokens[-1])
    assert tokens == [0, 0, 6]


def poisoned(value: float, everywhere: bool = False) -> np.ndarray[Any, Any]:
    row = random_logits(1, 5)
    row[0, slice(None) if everywhere else 77] = value
    return row


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize(
    ("bad_row", "arguments", "text"),
    [
        (poisoned(np.nan), {}, "the logits are not finite: max is nan"),
        (poisoned(np.inf), {}, "the logits are not finite: max is inf"),
        (poisoned(-np.inf, everywhere=True), {}, "the logits are not finite: max is -inf"),
        (random_logits(1), {"bad_words_token_ids": ((2,),), "allowed": [2]}, "no token can be sampled: all 2,048"),
    ],
)
def test_bad_row_when_sampled_among_neighbours_then_it_alone_errs(
    bad_row: np.ndarray[Any, Any], arguments: dict[str, Any], text: str, greedy: bool
) -> None:
    good = random_logits(2)
    logits = np.concatenate([good[:1], bad_row, good[1:]])
    params = SamplingParams(temperature=0.0 if greedy else 1.0, allowed_token_ids=arguments.get("allowed"))
    bad = SamplingRow(params, 3, bad_words_token_ids=arguments.get("bad_words_token_ids", ()))
    before, failed, after = sample(logits, [make_row({}), bad, make_row({"temperature": 0})])
    assert failed.token_id == -1
    assert failed.error is not None
    assert failed.error.startswith(text)
    assert [before, after] == sample(good, [make_row({}), make_row({"temperature": 0})])


def test_one_minus_infinity_when_sampled_then_no_error_and_never_drawn() -> None:
    logits = np.full((1, 4), -np.inf, dtype=np.float32)
    logits[0, 2] = 0.0
    assert sample(logits, [make_row({"temperature": 2.0, "top_p": 0.9})]) == [SampledToken(2)]


@pytest.mark.parametrize("arguments", [{"temperature": 0}, {"temperature": 0.3, "presence_penalty": 1, "top_k": 9}])
def test_logprobs_when_asked_then_those_of_the_raw_distribution(arguments: dict[str, Any]) -> None:
    logits = random_logits(4, 6)
    expected = torch.log_softmax(torch.from_numpy(logits), -1)
    rows = [make_row({**arguments, "logprobs": 7}, seed) for seed in range(4)]
    for index, outcome in enumerate(sample(logits, rows)):
        logprobs = outcome.logprobs
        assert logprobs is not None
        assert logprobs.token_id == outcome.token_id
        assert logprobs.logprob == pytest.approx(float(expected[index, outcome.token_id]), abs=1e-5)
        top = torch.topk(expected[index], 7)
        assert [token for token, _ in logprobs.top] == top.indices.tolist()
        assert [value for _, value in logprobs.top] == pytest.approx(top.values.tolist(), abs=1e-5)
        assert logprobs.rank == 1 + int((expected[index] > expected[index, outcome.token_id]).sum())


def test_logprobs_when_ties_then_ranks_are_equal_and_top_is_by_lower_id() -> None:
    logits = np.zeros((1, 6), dtype=np.float32)
    logits[0, [4, 2]] = 1.0
    row = make_row({"temperature": 0, "logit_bias": {4: 1.0}, "logprobs": 3})
    logprobs = sample(logits, [row])[0].logprobs
    assert logprobs is not None
    assert (logprobs.token_id, logprobs.rank, [token for token, _ in logprobs.top]) == (4, 1, [2, 4, 0])


def test_logprobs_when_more_are_asked_than_tokens_exist_then_all() -> None:
    logprobs = sample(random_logits(1, vocab_size=5), [make_row({"logprobs": 20})])[0].logprobs
    assert logprobs is not None
    assert len(logprobs.top) == 5
    assert sum(np.exp(value) for _, value in logprobs.top) == pytest.approx(1.0, abs=1e-6)


def test_logprobs_when_not_asked_then_absent_and_when_zero_then_chosen_alone() -> None:
    logits = random_logits(2)
    without, alone = sample(logits, [make_row({}), make_row({"logprobs": 0})])
    assert without.logprobs is None
    assert alone.logprobs is not None
    assert alone.logprobs.top == ()


def test_prompt_logprobs_when_computed_then_those_of_the_targets() -> None:
    logits = random_logits(5, 8)
    targets = [0, 5, 9, V - 1, 77]
    actual = prompt_logprobs(logits, row_stats_numpy(logits), targets, 2)
    expected = torch.log_softmax(torch.from_numpy(logits), -1)
    assert [entry.token_id for entry in actual] == targets
    assert [entry.logprob for entry in actual] == pytest.approx([float(expected[i, t]) for i, t in enumerate(targets)])
    assert [entry.top[0][0] for entry in actual] == expected.argmax(-1).tolist()


def test_logprob_when_computed_then_float32_arithmetic_on_the_given_stats() -> None:
    logits = random_logits(1)
    stats = row_stats_numpy(logits)
    logprobs = prompt_logprobs(logits, stats, [3], 0)[0]
    value = (torch.from_numpy(logits)[0, 3] - torch.from_numpy(stats.max)) - torch.from_numpy(stats.log_sum_exp)
    assert torch.equal(torch.tensor([logprobs.logprob]), value)


def test_row_stats_when_computed_then_lowest_argmax_max_and_log_sum_exp() -> None:
    logits = random_logits(3, 9)
    logits[1, [8, 20]] = 50.0
    stats = row_stats_numpy(logits)
    rows = torch.from_numpy(logits)
    assert stats.argmax.tolist() == [int(rows[0].argmax()), 8, int(rows[2].argmax())]
    assert torch.equal(torch.from_numpy(stats.max), rows.amax(-1))
    torch.testing.assert_close(torch.from_numpy(stats.max + stats.log_sum_exp), torch.logsumexp(rows, -1))


@pytest.mark.parametrize(
    ("logits", "num_rows", "text"),
    [
        (random_logits(2), 1, r"logits are float32 \[2, 2048\]; expected float32 \[1, 2048\]"),
        (random_logits(1)[:, :9], 1, r"logits are float32 \[1, 9\]"),
        (random_logits(1).astype(np.float64), 1, r"logits are float64 \[1, 2048\]"),
    ],
)
def test_shapes_when_they_disagree_then_value_error_names_both(
    logits: np.ndarray[Any, Any], num_rows: int, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        Sampler(V).sample(logits, row_stats_numpy(logits), [make_row({})] * num_rows)


def test_stats_when_of_other_rows_then_value_error() -> None:
    logits = random_logits(2)
    stats = row_stats_numpy(logits)
    shorter = RowStats(stats.argmax[:1], stats.max[:1], stats.log_sum_exp[:1])
    with pytest.raises(ValueError, match="stats cover 1 rows; logits have 2"):
        reference.Sampler(V).sample(logits, shorter, [make_row({})] * 2)
