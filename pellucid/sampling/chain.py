"""The sampler chain on one row of logits: plain numpy, in the order in which the sampler applies it.

Penalties, logit bias, bad words, allowed ids and minimum length edit a private copy of the row (`logits_V`, float32, in place).
Temperature, top-k, top-p and min-p then narrow a `Candidates` set, and `draw` picks from it.

Ties, so that a result is a function of the row alone:
- argmax: the lowest id of the greatest logit;
- top-k: all logits that are at least the k-th greatest stay (as in transformers and vLLM), so there may be more than k;
- top-p: candidates in descending order of logit, equal ones by ascending id; the shortest prefix whose mass reaches p stays;
- draw: inverse CDF over the candidates in ascending order of id, summed in float64.

Order and ties are decided on the logits before the division by the temperature, which rounding could otherwise merge.

Shape suffixes: V vocabulary, C candidates, S tokens of a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int64]

# the smallest divisor: below it all mass is on the greatest logits anyway, and float32 would round it to zero
_MIN_TEMPERATURE = 1e-30
# distances below the greatest logit at which top-k looks for its k candidates, before it takes the whole row
_TOP_K_WINDOWS = (4.0, 8.0, 16.0, 32.0)
# at most so many candidates are sorted; larger sets are bisected first
_SORT_LIMIT = 1024


# -- editing the row ---------------------------------------------------------------------------------------------------


def apply_repetition_penalty(logits_V: FloatArray, seen_ids_S: IdArray, penalty: float) -> None:
    """Divide positive and multiply negative logits of the tokens of prompt and output by `penalty`, in place.

    Keskar et al. 2019, https://arxiv.org/abs/1909.05858. `seen_ids_S` holds each id once.
    """
    seen = logits_V[seen_ids_S]
    logits_V[seen_ids_S] = np.where(seen > 0, seen / np.float32(penalty), seen * np.float32(penalty))


def apply_count_penalties(
    logits_V: FloatArray, output_ids_S: IdArray, counts_S: FloatArray, frequency: float, presence: float
) -> None:
    """Subtract `frequency` x count and then `presence` from the logits of the tokens of the output, in place.

    The OpenAI formula. `output_ids_S` holds each id once, `counts_S` how often it occurred.
    """
    logits_V[output_ids_S] -= np.float32(frequency) * counts_S
    logits_V[output_ids_S] -= np.float32(presence)


def apply_logit_bias(logits_V: FloatArray, ids_S: IdArray, biases_S: FloatArray) -> None:
    """Add `biases_S` to the logits of `ids_S`, in place."""
    logits_V[ids_S] += biases_S


def banned_by_bad_words(bad_words: Sequence[Sequence[int]], output_token_ids: Sequence[int]) -> list[int]:
    """The tokens that would complete a bad word: the last of each sequence whose other tokens end the output (as in vLLM)."""
    banned = []
    for word in bad_words:
        prefix = list(word[:-1])
        if not word or len(prefix) > len(output_token_ids):
            continue
        if not prefix or list(output_token_ids[-len(prefix) :]) == prefix:
            banned.append(word[-1])
    return banned


def mask_tokens(logits_V: FloatArray, token_ids: Sequence[int]) -> None:
    """Set the logits of `token_ids` to minus infinity, in place. Ids outside of the row are passed over."""
    ids = np.asarray(token_ids, dtype=np.int64)
    logits_V[ids[(ids >= 0) & (ids < logits_V.size)]] = -np.inf


def keep_tokens(logits_V: FloatArray, allowed_ids_S: IdArray) -> None:
    """Set all logits but those of `allowed_ids_S` to minus infinity, in place."""
    allowed = logits_V[allowed_ids_S]
    logits_V.fill(-np.inf)
    logits_V[allowed_ids_S] = allowed


# -- narrowing and drawing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidates:
    """Tokens that can still be drawn. `weights_C` is exp((logit - greatest logit) / temperature): proportional to probability.

    `ids_C` ascends; None stands for the whole vocabulary, 0 .. V-1.
    """

    logits_C: FloatArray
    weights_C: FloatArray
    ids_C: IdArray | None = None

    def take(self, index: npt.NDArray[Any]) -> Candidates:
        """The candidates at ascending positions `index`."""
        ids = index if self.ids_C is None else self.ids_C[index]
        return Candidates(self.logits_C[index], self.weights_C[index], ids)


def top_k_ids(logits_V: FloatArray, k: int, greatest: float) -> IdArray:
    """The ascending ids of all logits that are at least the k-th greatest, 1 <= k < V. `greatest` is the row's maximum."""
    threshold = np.float32(-np.inf)
    ids = None
    for window in _TOP_K_WINDOWS:
        ids = np.flatnonzero(logits_V >= np.float32(greatest - window))
        if ids.size >= k:
            break
    if ids is None or ids.size < k:
        threshold = np.partition(logits_V, logits_V.size - k)[logits_V.size - k]
        return np.flatnonzero(logits_V >= threshold)
    logits = logits_V[ids]
    threshold = np.partition(logits, logits.size - k)[logits.size - k]
    return ids[logits >= threshold]


def candidates_of(
    logits_V: FloatArray, greatest: float, temperature: float, top_k: int, scratch_V: FloatArray | None = None
) -> Candidates:
    """Temperature and top-k. `greatest` is the row's maximum, finite; `top_k` outside of [1, V) means all.

    `scratch_V`, when given, receives the weights of a whole row: the result is then valid until its next use.
    """
    ids = top_k_ids(logits_V, top_k, greatest) if 0 < top_k < logits_V.size else None
    logits = logits_V if ids is None else logits_V[ids]
    weights = np.subtract(logits, np.float32(greatest), out=scratch_V if ids is None else None)
    if temperature != 1.0:
        with np.errstate(over="ignore"):  # to minus infinity: weight zero, as it should be
            np.divide(weights, np.float32(max(temperature, _MIN_TEMPERATURE)), out=weights)
    np.exp(weights, out=weights)
    return Candidates(logits, weights, ids)


def top_p(candidates: Candidates, p: float) -> Candidates:
    """The shortest prefix, in descending order of logit, whose mass reaches `p` of the candidates' mass. Never empty.

    Holtzman et al. 2019, https://arxiv.org/abs/1904.09751. Found by bisection over logits instead of a sort of all candidates.
    """
    total = float(candidates.weights_C.sum(dtype=np.float64))
    # what weighs less than this adds up to less than 1 - p: it cannot be needed
    floor = np.float32((1.0 - p) * total / candidates.weights_C.size)
    head = candidates.take(np.flatnonzero((candidates.weights_C >= floor) & (candidates.weights_C > 0)))
    boundary, last_id = _top_p_boundary(head, p * total)
    logits, ids = head.logits_C, head.ids_C
    return head.take(np.flatnonzero((logits > boundary) | ((logits == boundary) & (ids <= last_id))))  # type: ignore[operator]


def _top_p_boundary(candidates: Candidates, mass: float) -> tuple[np.float32, int]:
    """The logit of the last candidate that is needed to reach `mass`, and its id."""
    logits, weights, ids = candidates.logits_C, candidates.weights_C, candidates.ids_C
    if ids is None:
        raise ValueError("candidates have no ids")
    above = 0.0  # mass of all candidates that stand before those still undecided
    low, high = logits.min(), logits.max()
    while logits.size > _SORT_LIMIT and low < high:
        pivot = np.float32((float(low) + float(high)) / 2)
        pivot = low if pivot >= high else pivot
        is_above = logits > pivot
        mass_above = float(weights[is_above].sum(dtype=np.float64))
        if above + mass_above < mass:
            above += mass_above
            is_above = ~is_above
        logits, weights, ids = logits[is_above], weights[is_above], ids[is_above]
        low, high = logits.min(), logits.max()
    order = np.argsort(-logits, kind="stable")
    reached = above + np.cumsum(weights[order], dtype=np.float64)
    last = order[min(int(np.searchsorted(reached, mass)), order.size - 1)]
    return logits[last], int(ids[last])


def min_p(candidates: Candidates, p: float) -> Candidates:
    """The candidates that are at least `p` times as likely as the most likely one, whose weight is 1.

    Nguyen et al. 2024, https://arxiv.org/abs/2407.01082.
    """
    return candidates.take(np.flatnonzero(candidates.weights_C >= np.float32(p)))


def draw(candidates: Candidates, uniform: float) -> int:
    """The id at which the cumulative mass, in ascending order of id, passes `uniform` in [0, 1) of the whole."""
    reached = np.cumsum(candidates.weights_C, dtype=np.float64)
    total = reached[-1]
    index = int(np.searchsorted(reached, uniform * total, side="right"))
    if index == reached.size:  # the product was rounded up to the total: the last candidate that has any mass
        index = int(np.searchsorted(reached, total, side="left"))
    return index if candidates.ids_C is None else int(candidates.ids_C[index])
