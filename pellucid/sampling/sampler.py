"""What a request samples by, and log-probabilities under the model's own distribution.

Shape suffixes: L rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pellucid.api.outputs import TokenLogprobs
from pellucid.api.sampling_params import SamplingParams
from pellucid.api.structured_outputs import Matcher
from pellucid.sampling import chain
from pellucid.sampling.chain import FloatArray, IdArray


@dataclass(frozen=True)
class RowStats:
    """What the core's sample operation says of each row. A logit x has logprob (x - max) - log_sum_exp, in float32."""

    argmax: npt.NDArray[np.int64]  # [L] lowest id of the greatest logit
    max: npt.NDArray[np.float32]  # [L]
    log_sum_exp: npt.NDArray[np.float32]  # [L] log(sum(exp(x - max)))


class SampledToken(NamedTuple):
    """The outcome of one row: a token, or `error` and token id -1 when that request must end."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


class _Counts:
    """Ids that occurred, each once, in order of first occurrence, with their counts; grows by doubling."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._ids = np.empty(16, dtype=np.int32)
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
    def ids(self) -> npt.NDArray[np.int32]:
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
    matcher: Matcher | None = None

    def __post_init__(self) -> None:
        params = self.sampling_params
        self.greedy = params.is_greedy
        self.repeats = params.repetition_penalty != 1.0
        self.counts_matter = params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
        self.stop_ids = (*self.eos_token_ids, *params.stop_token_ids) if params.min_tokens else ()
        self.bias_ids = np.fromiter(params.logit_bias.keys(), dtype=np.int64)
        self.biases = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        allowed = params.allowed_token_ids
        self.allowed_ids = None if allowed is None else np.unique(np.asarray(allowed, dtype=np.int64))
        self.edits_always = bool(
            self.repeats
            or self.counts_matter
            or params.logit_bias
            or self.bad_words_token_ids
            or self.allowed_ids is not None
            or self.matcher is not None
        )
        self.truncate(len(self.output_token_ids))

    def truncate(self, num_output_tokens: int) -> None:
        """Forget output tokens from `num_output_tokens` on; the counts are built again at the next use."""
        del self.output_token_ids[num_output_tokens:]
        self.seen: _Counts | None = None
        self.output = _Counts()
        self._num_counted = 0

    @property
    def position(self) -> int:
        """The index in the output of the token that is sampled next."""
        return len(self.output_token_ids)

    @property
    def min_tokens(self) -> int:
        """The least number of tokens that holds now: a structure that is complete ends before it."""
        is_complete = self.matcher is not None and self.matcher.is_complete
        return 0 if is_complete else self.sampling_params.min_tokens

    def advance(self, token_id: int) -> str | None:
        """Takes a sampled token; why it cannot be taken, if so."""
        self.output_token_ids.append(token_id)
        if self.matcher is not None and not self.matcher.accept(token_id):
            return self.matcher.error
        return None

    def nothing_left(self, vocab_size: int) -> str:
        """Why no token can be sampled, when all are excluded."""
        if self.matcher is not None and self.matcher.error is not None:
            return self.matcher.error
        edits = {
            "allowed_token_ids": self.allowed_ids is not None,
            "bad_words": bool(self.bad_words_token_ids),
            "structured_outputs": self.matcher is not None,
            "min_tokens": bool(self.stop_ids),
        }
        names = ", ".join(name for name, is_given in edits.items() if is_given)
        return f"no token can be sampled: all {vocab_size:,} are excluded by {names}"

    @property
    def overflow(self) -> str:
        """Why no token can be sampled, when the greatest logit is not finite behind the edits."""
        params = self.sampling_params
        names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
        values = ", ".join(f"{name} {getattr(params, name):g}" for name in names)
        return f"the logits are not finite behind {values} and {len(params.logit_bias):,} biases"

    def count(self) -> None:
        """Count the tokens that came since the last call; on the first call, those of the prompt too."""
        new = self.output_token_ids[self._num_counted :]
        self._num_counted = self.position
        if self.repeats:
            if self.seen is None:
                self.seen = _Counts()
                self.seen.add(list(dict.fromkeys(self.prompt_token_ids)))
            self.seen.add(new)
        if self.counts_matter:
            self.output.add(new)


def prompt_logprobs(
    logits_LV: FloatArray, stats: RowStats, target_ids: Sequence[int], top_n: int
) -> list[TokenLogprobs]:
    """The logprobs of `target_ids` [L] under the rows of `logits_LV`, with the `top_n` most likely beside.

    Raises:
        ValueError: when the shapes do not agree.
    """
    if len(logits_LV) != len(target_ids) or len(stats.argmax) != len(target_ids):
        raise ValueError(f"{len(logits_LV)} rows of logits, {len(stats.argmax)} of stats, {len(target_ids)} targets")
    return [
        token_logprobs(row, stats, i, int(target), top_n)
        for i, (row, target) in enumerate(zip(logits_LV, target_ids, strict=True))
    ]


def token_logprobs(logits_V: FloatArray, stats: RowStats, index: int, token_id: int, top_n: int) -> TokenLogprobs:
    """The logprob and rank of `token_id` under the model's own distribution, and the `top_n` most likely tokens."""
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
