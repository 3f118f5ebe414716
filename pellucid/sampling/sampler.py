"""`Sampler`: one token for each row of logits, and log-probabilities under the model's own distribution.

A row's token depends on that row's logits and on its own `SamplingRow` alone, never on its neighbours.

Shape suffixes: L rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pellucid.outputs import TokenLogprobs
from pellucid.params import SamplingParams
from pellucid.sampling import chain
from pellucid.sampling.chain import FloatArray, IdArray
from pellucid.sampling.rng import uniform


@dataclass(frozen=True)
class RowStats:
    """What the core's sample operation says of each row. A logit x has logprob (x - max) - log_sum_exp, in float32."""

    argmax: npt.NDArray[np.int64]  # [L] lowest id of the greatest logit
    max: npt.NDArray[np.float32]  # [L]
    log_sum_exp: npt.NDArray[np.float32]  # [L] log(sum(exp(x - max)))


@dataclass(frozen=True)
class SampledToken:
    """The outcome of one row: a token, or `error` and token id -1 when that request must end."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


class _Counts:
    """Ids that occurred, each once, in order of first occurrence, with their counts; grows by doubling."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._ids = np.empty(16, dtype=np.int64)
        self._counts = np.zeros(16, dtype=np.float32)

    def add(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            slot = self._slots.setdefault(token_id, len(self._slots))
            if slot == self._ids.size:
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[slot] = token_id
            self._counts[slot] += 1

    @property
    def ids(self) -> IdArray:
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> FloatArray:
        return self._counts[: len(self._slots)]


@dataclass
class SamplingRow:
    """The sampling state of one request, kept by the model runner from step to step.

    The runner appends each sampled token to `output_token_ids`; the position of the next draw is its length. The list
    may only grow, except through `truncate`.
    """

    sampling_params: SamplingParams
    seed: int
    choice_index: int = 0
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: list[int] = field(default_factory=list)
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        params = self.sampling_params
        self._greedy = params.is_greedy
        self._repeats = params.repetition_penalty != 1.0
        self._counts_matter = params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
        self._stop_ids = (*self.eos_token_ids, *params.stop_token_ids) if params.min_tokens else ()
        self._bias_ids = np.fromiter(params.logit_bias.keys(), dtype=np.int64)
        self._biases = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        allowed = params.allowed_token_ids
        self._allowed_ids = None if allowed is None else np.unique(np.asarray(allowed, dtype=np.int64))
        self._edits_always = bool(
            self._repeats
            or self._counts_matter
            or params.logit_bias
            or self.bad_words_token_ids
            or self._allowed_ids is not None
        )
        self.truncate(len(self.output_token_ids))

    def truncate(self, num_output_tokens: int) -> None:
        """Forget output tokens from `num_output_tokens` on; the counts are built again at the next use."""
        del self.output_token_ids[num_output_tokens:]
        self._seen: _Counts | None = None
        self._output = _Counts()
        self._num_counted = 0

    @property
    def position(self) -> int:
        """The index in the output of the token that is sampled next."""
        return len(self.output_token_ids)

    @property
    def edits_logits(self) -> bool:
        """True when anything changes the logits before the temperature."""
        return self._edits_always or (bool(self._stop_ids) and self.position < self.sampling_params.min_tokens)

    def edit(self, logits_V: FloatArray) -> None:
        """Apply penalties, logit bias, bad words, allowed ids and the minimum length to `logits_V`, in place."""
        params = self.sampling_params
        if self._repeats or self._counts_matter:
            self._count()
        if self._repeats and self._seen is not None:
            chain.apply_repetition_penalty(logits_V, self._seen.ids, params.repetition_penalty)
        if self._counts_matter:
            output = self._output
            chain.apply_count_penalties(
                logits_V, output.ids, output.counts, params.frequency_penalty, params.presence_penalty
            )
        if self._bias_ids.size:
            chain.apply_logit_bias(logits_V, self._bias_ids, self._biases)
        if self.bad_words_token_ids:
            banned = chain.banned_by_bad_words(self.bad_words_token_ids, self.output_token_ids)
            chain.mask_tokens(logits_V, banned)
        if self._allowed_ids is not None:
            chain.keep_tokens(logits_V, self._allowed_ids)
        if self._stop_ids and self.position < params.min_tokens:
            chain.mask_tokens(logits_V, self._stop_ids)

    def _count(self) -> None:
        """Count the tokens that came since the last call; on the first call, those of the prompt too."""
        new = self.output_token_ids[self._num_counted :]
        self._num_counted = self.position
        if self._repeats:
            if self._seen is None:
                self._seen = _Counts()
                self._seen.add(list(dict.fromkeys(self.prompt_token_ids)))
            self._seen.add(new)
        if self._counts_matter:
            self._output.add(new)


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

    def prompt_logprobs(
        self, logits: FloatArray, stats: RowStats, target_ids: Sequence[int], top_n: int
    ) -> list[TokenLogprobs]:
        """The logprobs of `target_ids` [L] under the rows of `logits` [L, V], with the `top_n` most likely beside.

        Raises:
            ValueError: when the shapes do not agree.
        """
        self._check(logits, stats, len(target_ids))
        return [
            _token_logprobs(logits[index], stats, index, int(target), top_n) for index, target in enumerate(target_ids)
        ]

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
        if token_id is None:
            return _failed(
                f"no token can be sampled: all {self.vocab_size:,} are excluded"
                " by allowed_token_ids, bad_words or min_tokens"
            )
        top_n = row.sampling_params.logprobs
        logprobs = None if top_n is None else _token_logprobs(logits_V, stats, index, token_id, top_n)
        return SampledToken(token_id, logprobs)

    def _choose(self, logits_V: FloatArray, argmax: int, greatest: float, row: SamplingRow) -> int | None:
        """The token of one row, or None when none is left. `argmax` and `greatest` describe `logits_V`."""
        if row.edits_logits:
            np.copyto(self._edited_V, logits_V)
            logits_V = self._edited_V
            row.edit(logits_V)
            argmax = int(logits_V.argmax())
            greatest = float(logits_V[argmax])
            if not np.isfinite(greatest):
                return None
        if row._greedy:
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


def _token_logprobs(logits_V: FloatArray, stats: RowStats, index: int, token_id: int, top_n: int) -> TokenLogprobs:
    top_ids = _most_likely(logits_V, top_n, float(stats.max[index]))
    ids = np.concatenate([np.array([token_id], dtype=np.int64), top_ids])
    logprobs = (logits_V[ids] - stats.max[index]) - stats.log_sum_exp[index]
    rank = 1 + int(np.count_nonzero(logits_V > logits_V[token_id]))
    return TokenLogprobs(
        token_id, float(logprobs[0]), rank, tuple(zip(top_ids.tolist(), logprobs[1:].tolist(), strict=True))
    )


def _most_likely(logits_V: FloatArray, top_n: int, greatest: float) -> IdArray:
    """The ids of the `top_n` greatest logits, or of all, greatest first and equal ones by ascending id."""
    if top_n == 0:
        return np.empty(0, dtype=np.int64)
    is_all = top_n >= logits_V.size
    ids = np.arange(logits_V.size) if is_all else chain.top_k_ids(logits_V, top_n, greatest)
    return ids[np.argsort(-logits_V[ids], kind="stable")][:top_n]
