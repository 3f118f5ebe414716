"""The sampler chain against transformers' processors, and its own rules for ties and edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pellucid.api.sampling_params import SamplingParams
from pellucid.sampling import SamplingRow, chain
from pellucid.sampling.reference import edit

V = 3000  # more than are sorted directly, so that top-p bins
PROMPT = [5, 7, 7, 2999]
OUTPUT = [10, 11, 10, 42, 7]


def random_row(seed: int, scale: float = 3.0, size: int = V) -> chain.FloatArray:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def edited(logits: chain.FloatArray, params: SamplingParams, **state: object) -> torch.Tensor:
    arguments: dict[str, object] = {"prompt_token_ids": PROMPT, "output_token_ids": list(OUTPUT), **state}
    row = SamplingRow(params, 0, **arguments)  # type: ignore[arg-type]
    result = logits.copy()
    edit(row, result)
    return torch.from_numpy(result)


def kept(candidates: chain.Candidates) -> set[int]:
    return set(candidates.ids_at(np.flatnonzero(candidates.weights > 0)).tolist())


def of(logits: chain.FloatArray, temperature: float = 1.0, top_k: int = 0) -> chain.Candidates:
    return chain.candidates_of(logits, float(logits.max()), temperature, top_k)


def finite_ids(scores: torch.Tensor) -> set[int]:
    return set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repeated_tokens_when_repetition_penalty_then_as_transformers(penalty: float) -> None:
    logits = random_row(0)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([PROMPT + OUTPUT]), torch.from_numpy(logits)[None].clone()
    )
    assert torch.equal(edited(logits, SamplingParams(repetition_penalty=penalty)), expected[0])


def test_repeated_output_when_count_penalties_then_openai_formula() -> None:
    logits = random_row(1)
    counts = torch.bincount(torch.tensor(OUTPUT), minlength=V).float()
    expected = torch.from_numpy(logits) - 0.5 * counts - 0.25 * (counts > 0)
    actual = edited(logits, SamplingParams(frequency_penalty=0.5, presence_penalty=0.25))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert actual[5] == float(logits[5])  # the prompt does not count


def test_counts_when_output_grows_step_by_step_or_is_cut_then_as_counted_at_once() -> None:
    params = SamplingParams(frequency_penalty=0.5, repetition_penalty=1.2)
    logits = random_row(2)
    growing = SamplingRow(params, 0, prompt_token_ids=PROMPT)
    for token in [*OUTPUT, *range(100, 160), 1]:
        growing.output_token_ids.append(token)
        result = logits.copy()
        edit(growing, result)
    growing.truncate(len(OUTPUT))
    again = logits.copy()
    edit(growing, again)
    at_once = edited(logits, params, output_token_ids=[*OUTPUT, *range(100, 160), 1])
    assert torch.equal(torch.from_numpy(result), at_once)
    assert torch.equal(torch.from_numpy(again), edited(logits, params))


def test_logit_bias_when_applied_then_added_to_its_ids_alone() -> None:
    logits = random_row(3)
    expected = torch.from_numpy(logits).clone()
    expected[17] += 2.5
    expected[3] -= 100
    assert torch.equal(edited(logits, SamplingParams(logit_bias={17: 2.5, 3: -100})), expected)


@pytest.mark.parametrize(
    "words",
    [((9,),), ((42, 7, 8),), ((42, 8),), ((7, 7), (9,)), ((1, 2, 3, 4, 5, 6, 7, 8),), ((10, 11, 10, 42, 7, 6),)],
)
def test_bad_words_when_prefix_ends_the_output_then_last_token_banned_as_transformers(
    words: tuple[tuple[int, ...], ...],
) -> None:
    logits = random_row(4)
    processor = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=0)
    expected = processor(torch.tensor([OUTPUT]), torch.from_numpy(logits)[None].clone())
    assert torch.equal(edited(logits, SamplingParams(), bad_words_token_ids=words), expected[0])


def test_bad_word_when_its_prefix_stands_in_the_prompt_alone_then_not_banned() -> None:
    assert chain.banned_by_bad_words([(2999, 4)], []) == []


@pytest.mark.parametrize(("min_tokens", "masked"), [(5, False), (6, True)])
def test_eos_when_output_is_shorter_than_min_tokens_then_masked_as_transformers(min_tokens: int, masked: bool) -> None:
    logits = random_row(5)
    expected = MinLengthLogitsProcessor(min_tokens, [0, 8])(
        torch.tensor([OUTPUT]), torch.from_numpy(logits)[None].clone()
    )
    params = SamplingParams(min_tokens=min_tokens, stop_token_ids=[8])
    assert torch.equal(edited(logits, params, eos_token_ids=(0,)), expected[0])
    assert bool(expected[0, 8] == -torch.inf) is masked


def test_allowed_ids_when_biased_and_stopped_too_then_chain_order_holds() -> None:
    logits = random_row(6)
    params = SamplingParams(allowed_token_ids=[8, 3, 3, 77], logit_bias={3: 1.0, 4: 100}, min_tokens=9)
    actual = edited(logits, params, eos_token_ids=(8, V + 5))
    assert set(torch.isfinite(actual).nonzero()[:, 0].tolist()) == {3, 77}
    assert actual[3] == float(logits[3] + np.float32(1))


@pytest.mark.parametrize("k", [1, 2, 50, 1500, V - 1, V, V + 7, 0, -1])
def test_top_k_when_narrowed_then_as_transformers(k: int) -> None:
    logits = random_row(7)
    expected = TopKLogitsWarper(k if k > 0 else V)(None, torch.from_numpy(logits)[None])
    assert kept(of(logits, top_k=k)) == finite_ids(expected)


def test_top_k_when_ties_at_the_kth_then_all_of_them_stay_as_transformers() -> None:
    logits = np.array([1, 3, 2, 2, 2, 0], dtype=np.float32)
    assert (
        kept(of(logits, top_k=2)) == {1, 2, 3, 4} == finite_ids(TopKLogitsWarper(2)(None, torch.tensor(logits)[None]))
    )


def test_top_k_when_most_logits_are_minus_infinity_then_the_finite_ones_stay() -> None:
    logits = np.full(V, -np.inf, dtype=np.float32)
    logits[[4, 9]] = [1.0, -60.0]
    assert kept(of(logits, top_k=5)) == {4, 9}


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("size", [40, V, 20_000])
def test_top_p_when_narrowed_then_as_a_sort_in_double_precision(scale: float, p: float, size: int) -> None:
    logits = random_row(8, scale, size)
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits - logits.max()).astype(np.float64))
    reached = np.cumsum(weights[order]) / weights.sum()
    least = int(np.searchsorted(reached, p)) + 1
    actual = kept(chain.top_p(of(logits), p))
    # weights are float32: the boundary may lie off by the tokens whose mass is within its rounding
    assert abs(len(actual) - least) <= 1
    assert actual == set(order[: len(actual)].tolist())


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_top_p_when_row_is_peaked_then_as_transformers(p: float) -> None:
    logits = random_row(9, 5.0)
    expected = TopPLogitsWarper(p)(None, torch.from_numpy(logits)[None])
    assert kept(chain.top_p(of(logits), p)) == finite_ids(expected)


@pytest.mark.parametrize("size", [8, V])
def test_top_p_when_all_are_equal_then_lowest_ids_stay(size: int) -> None:
    logits = np.full(size, 2.5, dtype=np.float32)
    assert kept(chain.top_p(of(logits), 0.5)) == set(range(size // 2))
    assert kept(chain.top_p(of(logits), 1e-9)) == {0}


def test_top_p_when_two_levels_tie_across_bins_then_higher_level_first_and_lowest_ids() -> None:
    logits = np.zeros(V, dtype=np.float32)
    logits[1::2] = 1e-6
    actual = kept(chain.top_p(of(logits), 0.75))
    assert set(range(1, V, 2)) < actual
    lower = sorted(actual - set(range(1, V, 2)))
    assert lower == list(range(0, 2 * len(lower), 2))


@pytest.mark.parametrize("p", [0.4, 0.999999, 1 - 2**-53])
def test_top_p_when_row_holds_minus_infinity_then_never_kept_and_never_empty(p: float) -> None:
    logits = random_row(10)
    logits[: V // 3] = -np.inf
    actual = kept(chain.top_p(of(logits), p))
    assert actual
    assert min(actual) >= V // 3


def test_top_k_and_top_p_when_combined_then_mass_is_that_of_the_top_k() -> None:
    logits = random_row(11)
    scores = TopKLogitsWarper(40)(None, torch.from_numpy(logits)[None] / 0.7)
    expected = TopPLogitsWarper(0.8)(None, scores)
    assert kept(chain.top_p(of(logits, 0.7, 40), 0.8)) == finite_ids(expected)


@pytest.mark.parametrize("p", [1e-6, 0.02, 0.3, 1.0])
def test_min_p_when_narrowed_then_as_transformers(p: float) -> None:
    logits = random_row(12)
    expected = MinPLogitsWarper(p)(None, torch.from_numpy(logits)[None])
    assert kept(chain.min_p(of(logits), p)) == finite_ids(expected)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_when_applied_then_weights_are_the_softmax(temperature: float) -> None:
    logits = random_row(13)
    weights = torch.from_numpy(of(logits, temperature).weights)
    expected = torch.softmax(torch.from_numpy(logits) / temperature, -1)
    torch.testing.assert_close(weights / weights.sum(), expected, rtol=2e-5, atol=1e-9)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-9])
def test_temperature_near_zero_when_applied_then_only_the_greatest_has_mass(temperature: float) -> None:
    logits = random_row(14)
    assert kept(of(logits, temperature)) == {int(logits.argmax())}


def test_draw_when_uniform_sweeps_then_inverse_of_the_cumulative_mass_by_id() -> None:
    logits = np.log(np.array([0.1, 0.2, 1.0, 0.3, 0.4], dtype=np.float32))
    logits[2] = -np.inf
    candidates = of(logits)
    drawn = [chain.draw(candidates, u) for u in (0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.5999, 0.6001, 1 - 2**-53)]
    assert drawn == [0, 0, 1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("u", [0.0, 0.123, 0.5, 0.987654321, 1 - 2**-53])
@pytest.mark.parametrize("size", [1, 255, 256, 257, V])
def test_draw_when_mass_is_in_blocks_then_as_one_cumulative_sum(u: float, size: int) -> None:
    logits = random_row(15, size=size)
    weights = of(logits).weights.astype(np.float64)
    reached = np.cumsum(weights)
    expected = int(np.searchsorted(reached, u * reached[-1], side="right"))
    assert chain.draw(of(logits), u) == min(expected, size - 1)


def test_draw_when_the_last_tokens_have_no_mass_then_never_drawn() -> None:
    logits = np.full(1000, -np.inf, dtype=np.float32)
    logits[[3, 700]] = 0.0
    assert {chain.draw(of(logits), u) for u in np.linspace(0, 1 - 2**-53, 99)} == {3, 700}
