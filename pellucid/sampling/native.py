"""`NativeSampler`: the sampler chain of the core, a call a step for all rows that sample."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pellucid.ops import abi, structs
from pellucid.sampling import chain
from pellucid.sampling.chain import FloatArray
from pellucid.sampling.sampler import RowStats, SampledToken, SamplingRow, token_logprobs

_NOT_FINITE, _NONE_LEFT = 1, 2
_MIN_TEMPERATURE = 1e-30


class NativeRow:
    """A request's `SamplingRow` as the core reads it. Arrays are kept here for as long as the core may look at them."""

    def __init__(self, row: SamplingRow) -> None:
        self.row = row
        params = row.sampling_params
        self.struct = structs.SampleRowStruct(
            struct_size=ctypes.sizeof(structs.SampleRowStruct),
            repetition_penalty=params.repetition_penalty,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            n_allowed=-1,
            min_tokens=params.min_tokens,
            temperature=0.0 if params.is_greedy else max(params.temperature, _MIN_TEMPERATURE),
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=row.seed & 0xFFFFFFFFFFFFFFFF,
            choice=row.choice_index,
            wants_log_sum_exp=params.logprobs is not None,
        )
        self.address = ctypes.addressof(self.struct)
        self._kept: dict[str, npt.NDArray[Any]] = {}
        self._point("bias_ids", np.fromiter(params.logit_bias.keys(), dtype=np.int32), "n_biases")
        self._point("biases", np.fromiter(params.logit_bias.values(), dtype=np.float32))
        if params.allowed_token_ids is not None:
            self._point("allowed_ids", np.array(params.allowed_token_ids, dtype=np.int32), "n_allowed")
        self._point("stop_ids", np.array(row.stop_ids, dtype=np.int32), "n_stops")
        if row.matcher is not None:
            self._point("mask", row.matcher.mask)
        self._changes = row.repeats or row.counts_matter or bool(row.bad_words_token_ids) or row.matcher is not None

    def _point(self, name: str, array: npt.NDArray[Any], count: str | None = None) -> None:
        self._kept[name] = array
        setattr(self.struct, name, array.ctypes.data)
        if count is not None:
            setattr(self.struct, count, len(array))

    def refresh(self) -> int:
        """Brings the struct to the row's present state; its address."""
        self.struct.position = len(self.row.output_token_ids)
        if self._changes:
            self._count()
        return self.address

    def _count(self) -> None:
        row = self.row
        if row.repeats or row.counts_matter:
            row.count()
        if row.repeats and row.seen is not None:
            self._point("seen_ids", row.seen.ids, "n_seen")
        if row.counts_matter:
            self._point("counted_ids", row.output.ids, "n_counted")
            self._point("counts", row.output.counts)
        if row.bad_words_token_ids:
            banned = chain.banned_by_bad_words(row.bad_words_token_ids, row.output_token_ids)
            self._point("banned_ids", np.array(banned, dtype=np.int32), "n_banned")
        if row.matcher is not None:
            row.matcher.fill()
            self.struct.min_tokens = row.min_tokens


class NativeSampler:
    """Samples rows of logits over `vocab_size` tokens, at most `max_rows` at once, on the context's threads."""

    def __init__(self, context: abi.Context, vocab_size: int, max_rows: int) -> None:
        self.context, self.vocab_size = context, vocab_size
        self._results = np.zeros(max_rows, abi.SAMPLE_RESULT_DTYPE)

    def sample(self, logits_LV: FloatArray, rows: Sequence[NativeRow]) -> list[SampledToken]:
        """One outcome for each row; the rows are not advanced.

        Raises:
            NativeError: a row contradicts itself.
            ValueError: the shapes do not agree.
        """
        if logits_LV.shape != (len(rows), self.vocab_size) or logits_LV.dtype != np.float32:
            raise ValueError(
                f"logits are {logits_LV.dtype} {list(logits_LV.shape)}; expected float32 [{len(rows)}, {self.vocab_size}]"
            )
        results = self._results[: len(rows)]
        abi.sample(self.context, logits_LV, [row.refresh() for row in rows], results)
        if not results["status"].any() and not any(row.struct.wants_log_sum_exp for row in rows):
            return [SampledToken(token) for token in results["token"].tolist()]
        return [self._outcome(logits_LV[i], results, i, row.row) for i, row in enumerate(rows)]

    def _outcome(self, logits_V: FloatArray, results: abi.AnyArray, index: int, row: SamplingRow) -> SampledToken:
        token, status = int(results["token"][index]), int(results["status"][index])
        if status == _NOT_FINITE:
            return SampledToken(-1, None, f"the logits are not finite: max is {results['max'][index]}")
        if status == _NONE_LEFT:
            return SampledToken(-1, None, row.nothing_left(self.vocab_size))
        top_n = row.sampling_params.logprobs
        if top_n is None:
            return SampledToken(token)
        stats = RowStats(results["token"], results["max"], results["log_sum_exp"])
        return SampledToken(token, token_logprobs(logits_V, stats, index, token, top_n))
