"""The sampler in plain numpy: the oracle of the core's. A row's token depends on its logits and its own `SamplingRow` alone.

Shape suffixes: L rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pellucid.sampling import chain
from pellucid.sampling.chain import FloatArray
from pellucid.sampling.rng import uniform
from pellucid.sampling.sampler import RowStats, SampledToken, SamplingRow, token_logprobs


def edits_logits(row: SamplingRow) -> bool:
    """True when anything changes the logits before the temperature."""
    return row.edits_always or (bool(row.stop_ids) and row.position < row.sampling_params.min_tokens)


def edit(row: SamplingRow, logits_V: FloatArray) -> None:
    """Apply penalties, logit bias, bad words, allowed ids and the minimum length to `logits_V`, in place."""
    params = row.sampling_params
    if row.repeats or row.counts_matter:
        row.count()
    if row.repeats and row.seen is not None:
        chain.apply_repetition_penalty(logits_V, row.seen.ids, params.repetition_penalty)
    if row.counts_matter:
        output = row.output
        chain.apply_count_penalties(
            logits_V, output.ids, output.counts, params.frequency_penalty, params.presence_penalty
        )
    if row.bias_ids.size:
        chain.apply_logit_bias(logits_V, row.bias_ids, row.biases)
    if row.bad_words_token_ids:
        banned = chain.banned_by_bad_words(row.bad_words_token_ids, row.output_token_ids)
        chain.mask_tokens(logits_V, banned)
    if row.allowed_ids is not None:
        chain.keep_tokens(logits_V, row.allowed_ids)
    if row.matcher is not None:
        row.matcher.fill()
        chain.keep_masked(logits_V, row.matcher.mask)
    if row.stop_ids and row.position < row.min_tokens:
        chain.mask_tokens(logits_V, row.stop_ids)


class Sampler:
    """Samples rows of logits over `vocab_size` tokens. For one thread at a time: it owns two rows of scratch."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._edited_V = np.empty(vocab_size, dtype=np.float32)
        self._weights_V = np.empty(vocab_size, dtype=np.float32)

    def sample(self, logits: FloatArray, stats: RowStats, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """One outcome for each row.

        Args:
            logits: [L, V] float32, left as they are.
            stats: of the same rows.
            rows: the L requests' states; not advanced: the caller appends the tokens that it keeps.

        Raises:
            ValueError: when the shapes do not agree.
        """
        self._check(logits, stats, len(rows))
        return [self._sample_row(logits[index], stats, index, row) for index, row in enumerate(rows)]

    def _check(self, logits: FloatArray, stats: RowStats, num_rows: int) -> None:
        if logits.shape != (num_rows, self.vocab_size) or logits.dtype != np.float32:
            raise ValueError(
                f"logits are {logits.dtype} {list(logits.shape)}; expected float32 [{num_rows}, {self.vocab_size}]"
            )
        if len(stats.argmax) != num_rows:
            raise ValueError(f"stats cover {len(stats.argmax)} rows; logits have {num_rows}")

    def _sample_row(self, logits_V: FloatArray, stats: RowStats, index: int, row: SamplingRow) -> SampledToken:
        greatest, log_sum_exp = float(stats.max[index]), float(stats.log_sum_exp[index])
        # a NaN anywhere in the row makes its log-sum-exp NaN, an infinity makes its max or log-sum-exp infinite or NaN
        if not (np.isfinite(greatest) and np.isfinite(log_sum_exp)):
            return _failed(f"the logits are not finite: max is {greatest}, log-sum-exp is {log_sum_exp}")
        token_id = self._choose(logits_V, int(stats.argmax[index]), greatest, row)
        if isinstance(token_id, str):
            return _failed(token_id)
        top_n = row.sampling_params.logprobs
        logprobs = None if top_n is None else token_logprobs(logits_V, stats, index, token_id, top_n)
        return SampledToken(token_id, logprobs)

    def _choose(self, logits_V: FloatArray, argmax: int, greatest: float, row: SamplingRow) -> int | str:
        """The token of one row, or why there is none. `argmax` and `greatest` describe `logits_V`."""
        if edits_logits(row):
            np.copyto(self._edited_V, logits_V)
            logits_V = self._edited_V
            edit(row, logits_V)
            argmax = int(logits_V.argmax())
            greatest = float(logits_V[argmax])
            if not np.isfinite(greatest):  # a NaN is the greatest, for argmax
                return row.nothing_left(self.vocab_size) if greatest == -np.inf else row.overflow
        if row.greedy:
            return argmax
        params = row.sampling_params
        candidates = chain.candidates_of(logits_V, greatest, params.temperature, params.top_k, self._weights_V)
        if params.top_p < 1.0:
            candidates = chain.top_p(candidates, params.top_p)
        if params.min_p > 0.0:
            candidates = chain.min_p(candidates, params.min_p)
        return chain.draw(candidates, uniform(row.seed, row.position, row.choice_index))


def row_stats_numpy(logits: FloatArray) -> RowStats:
    """`RowStats` of `logits` [L, V], by numpy: the oracle of the core's sample operation, and its stand-in."""
    greatest = logits.max(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        sums = np.exp((logits - greatest[:, None]).astype(np.float64)).sum(axis=1)
        log_sum_exp = np.log(sums).astype(np.float32)
    return RowStats(logits.argmax(axis=1).astype(np.int64), greatest, log_sum_exp)


def _failed(error: str) -> SampledToken:
    return SampledToken(-1, None, error)
