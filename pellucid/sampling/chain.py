"""The sampler chain on one row of logits: plain numpy, in the order in which the sampler applies it.

Penalties, logit bias, bad words, allowed ids and minimum length edit a private copy of the row (`logits_V`, float32, in
place). Temperature, top-k, top-p and min-p then narrow a `Candidates` set, and `draw` picks from it.

Ties, so that a result is a function of the row alone:
- argmax: the lowest id of the greatest logit;
- top-k: all logits that are at least the k-th greatest stay (as in transformers and vLLM), so there may be more than k;
- top-p: candidates in descending order of logit, equal ones by ascending id; the shortest prefix whose mass
  reaches p stays;
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
IdArray = npt.NDArray[np.integer[Any]]

# the smallest divisor: below it all mass is on the greatest logits anyway, and float32 would round it to zero
_MIN_TEMPERATURE = 1e-30
# distances below the greatest logit at which top-k looks for its k candidates, before it takes the whole row
_TOP_K_WINDOWS = (4.0, 8.0, 16.0, 32.0)
# at most so many candidates are sorted; larger sets are binned by logit first
_SORT_LIMIT = 1024
_BINS = 1024
_HISTOGRAM_PIECE = 8192
# logits that differ by less count as equal when they are binned: their weights are
_SMALLEST_SPREAD = 1e-30
_DRAW_BLOCK = 256
_SMALLEST_WEIGHT = float(np.finfo(np.float32).tiny)


# -- editing the row ---------------------------------------------------------------------------------------------------


def apply_repetition_penalty(logits_V: FloatArray, seen_ids_S: IdArray, penalty: float) -> None:
    """Divide positive and multiply negative logits of the tokens of prompt and output by `penalty`, in place.

    Keskar et al. 2019, https://arxiv.org/abs/1909.05858. `seen_ids_S` holds each id once.
    """
    seen = logits_V[seen_ids_S]
    with np.errstate(over="ignore"):  # to infinity: the sampler says so
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
    """The tokens that would complete a bad word: the last of each sequence whose other tokens end the output.

    As in vLLM, the prompt is not looked at.
    """
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


def keep_masked(logits_V: FloatArray, mask: npt.NDArray[np.uint32]) -> None:
    """Set all logits to minus infinity but those of tokens i with bit i % 32 of word i / 32 of `mask` set, in place."""
    bits = np.unpackbits(mask.astype("<u4").view(np.uint8), count=logits_V.size, bitorder="little")
    logits_V[bits == 0] = -np.inf


# -- narrowing and drawing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidates:
    """Tokens that can still be drawn.

    `weights` is exp((logit - greatest logit) / temperature): proportional to the probability, 1 for the most likely,
    0 for a token that is out.
    """

    logits: FloatArray  # [C]
    weights: FloatArray  # [C]
    ids: IdArray | None = None  # [C], ascending; None stands for the whole vocabulary, 0 .. V-1

    def ids_at(self, index: IdArray) -> IdArray:
        """The ids of the candidates at positions `index`."""
        return index if self.ids is None else self.ids[index]

    def narrow(self, stays: npt.NDArray[np.bool_]) -> Candidates:
        """The candidates where `stays` holds. Where most do, the others stay at weight 0: a copy would cost more."""
        if 2 * np.count_nonzero(stays) > stays.size > _SORT_LIMIT:
            return Candidates(self.logits, self.weights * stays, self.ids)
        index: IdArray = np.flatnonzero(stays)
        return Candidates(self.logits[index], self.weights[index], self.ids_at(index))


def top_k_ids(logits_V: FloatArray, k: int, greatest: float) -> IdArray:
    """The ascending ids of all logits that are at least the k-th greatest, 1 <= k < V. `greatest`: the maximum."""
    for window in _TOP_K_WINDOWS:
        near = np.flatnonzero(logits_V >= np.float32(greatest - window))
        if near.size >= k:
            return near[_at_least_kth(logits_V[near], k)]
    return _at_least_kth(logits_V, k)


def _at_least_kth(logits: FloatArray, k: int) -> IdArray:
    """The positions of all logits that are at least the k-th greatest."""
    place = logits.size - k
    positions: IdArray = np.flatnonzero(logits >= np.partition(logits, place)[place])
    return positions


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

    Holtzman et al. 2019, https://arxiv.org/abs/1904.09751. Only the candidates around the boundary are sorted.
    """
    total = float(candidates.weights.sum(dtype=np.float64))
    # what weighs less than this adds up to less than 1 - p: it cannot be needed
    floor = max((1.0 - p) * total / candidates.weights.size, _SMALLEST_WEIGHT)
    head = candidates.narrow(candidates.weights >= np.float32(floor))
    boundary, last_id = _top_p_boundary(head, p * total)
    stays = head.logits >= boundary
    ties = np.flatnonzero(head.logits == boundary)
    stays[ties[head.ids_at(ties) > last_id]] = False
    return head.narrow(stays)


def _top_p_boundary(candidates: Candidates, mass: float) -> tuple[np.float32, int]:
    """The logit of the last candidate that is needed to reach `mass`, and its id."""
    above = 0.0  # mass of all that stand before the candidates
    while candidates.logits.size > _SORT_LIMIT:
        logits, weights = candidates.logits, candidates.weights
        high = logits.max()
        spread = float(high - np.where(weights > 0, logits, high).min())
        if spread < _SMALLEST_SPREAD:
            break
        places = (high - logits) * np.float32((_BINS - 1) / spread)  # ascends as logits descend
        np.minimum(places, np.float32(_BINS - 1), out=places)
        reached = above + np.cumsum(_histogram(places, weights))
        last_bin = _first_reaching(reached, mass)
        above = float(reached[last_bin - 1]) if last_bin > 0 else above
        undecided = np.flatnonzero((places >= last_bin) & (places < last_bin + 1) & (weights > 0))
        candidates = Candidates(logits[undecided], weights[undecided], candidates.ids_at(undecided))
    order = np.argsort(-candidates.logits, kind="stable")
    reached = above + np.cumsum(candidates.weights[order], dtype=np.float64)
    last = order[_first_reaching(reached, mass) :][:1]
    return candidates.logits[last[0]], int(candidates.ids_at(last)[0])


def _first_reaching(ascending: npt.NDArray[np.float64], mass: float) -> int:
    """The first index whose value is at least `mass`, or where rounding left none, at least the last value."""
    return int(np.searchsorted(ascending, min(mass, float(ascending[-1]))))


def _histogram(places: FloatArray, weights: FloatArray) -> npt.NDArray[np.float64]:
    """The sum of `weights` by whole part of `places`; in pieces, so that the integers stay in the cache."""
    masses = np.zeros(_BINS)
    for start in range(0, places.size, _HISTOGRAM_PIECE):
        piece = slice(start, start + _HISTOGRAM_PIECE)
        masses += np.bincount(places[piece].astype(np.intp), weights=weights[piece], minlength=_BINS)
    return masses


def min_p(candidates: Candidates, p: float) -> Candidates:
    """The candidates that are at least `p` times as likely as the most likely one, whose weight is 1.

    Nguyen et al. 2024, https://arxiv.org/abs/2407.01082.
    """
    return candidates.narrow(candidates.weights >= np.float32(p))


def draw(candidates: Candidates, uniform: float) -> int:
    """The id at which the cumulative mass, in ascending order of id, passes `uniform` in [0, 1) of the whole.

    Mass is summed in blocks of `_DRAW_BLOCK` candidates, and token by token within the block that is hit.
    """
    weights = candidates.weights
    block_ends = np.cumsum(np.add.reduceat(weights, np.arange(0, weights.size, _DRAW_BLOCK), dtype=np.float64))
    target = uniform * float(block_ends[-1])
    block = _first_above(block_ends, target)
    start = block * _DRAW_BLOCK
    before = float(block_ends[block - 1]) if block > 0 else 0.0
    reached = before + np.cumsum(weights[start : start + _DRAW_BLOCK], dtype=np.float64)
    index = start + _first_above(reached, target)
    return index if candidates.ids is None else int(candidates.ids[index])


def _first_above(ascending: npt.NDArray[np.float64], target: float) -> int:
    """The first index whose value exceeds `target`; where rounding left none, the first that has the last value."""
    index = int(np.searchsorted(ascending, target, side="right"))
    return index if index < ascending.size else int(np.searchsorted(ascending, ascending[-1], side="left"))
