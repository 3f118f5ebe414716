"""`NativeSampler`: the sampler chain of the core, a call a step for all rows that sample."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pellucid.api.structured_outputs import Matcher
from pellucid.core import abi, structs
from pellucid.errors import NativeError, reason_of
from pellucid.sampling import chain
from pellucid.sampling.chain import FloatArray
from pellucid.sampling.sampler import RowStats, SampledToken, SamplingRow, token_logprobs

_NOT_FINITE, _NONE_LEFT, _OVERFLOW = 1, 2, 3
_MIN_TEMPERATURE = 1e-30

_log = logging.getLogger(__name__)


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
        self._changes = row.repeats or row.counts_matter or bool(row.bad_words_token_ids)

    def _point(self, name: str, array: npt.NDArray[Any], count: str | None = None) -> None:
        self._kept[name] = array
        setattr(self.struct, name, array.ctypes.data)
        if count is not None:
            setattr(self.struct, count, len(array))

    def refresh(self, vocab_size: int) -> int:
        """Brings the struct to the row's present state; its address.

        Raises:
            ValueError: the matcher's mask is not one over the vocabulary.
        """
        self.struct.position = len(self.row.output_token_ids)
        if self._changes:
            self._count()
        if self.row.matcher is not None:
            self._mask(self.row.matcher, vocab_size)
        return self.address

    def _mask(self, matcher: Matcher, vocab_size: int) -> None:
        """The core reads as many words as the vocabulary needs: a custom matcher may have made fewer, or another array."""
        matcher.fill()
        self.struct.min_tokens = self.row.min_tokens
        mask = matcher.mask
        if mask is not None and mask is self._kept.get("mask"):
            return
        words = (vocab_size + 31) // 32
        if not isinstance(mask, np.ndarray):
            raise ValueError(f"the matcher's mask is a {type(mask).__name__}; it must be uint32 [{words}]")
        if mask.dtype != np.uint32 or mask.shape != (words,) or not mask.flags.c_contiguous:
            raise ValueError(f"the matcher's mask is {mask.dtype} {list(mask.shape)}; it must be uint32 [{words}]")
        self._point("mask", mask)

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


class NativeSampler:
    """Samples rows of logits over `vocab_size` tokens, at most `max_rows` at once, on the context's threads."""

    def __init__(self, context: abi.Context, vocab_size: int, max_rows: int) -> None:
        self.context, self.vocab_size = context, vocab_size
        self._results = np.zeros(max_rows, abi.SAMPLE_RESULT_DTYPE)

    def sample(self, logits_LV: FloatArray, rows: Sequence[NativeRow]) -> list[SampledToken]:
        """One outcome for each row; the rows are not advanced. A row that fails alone, here or in the core, has its error as
        the outcome, and the others are sampled as without it.

        Raises:
            NativeError: the core refused all of them.
            ValueError: the shapes do not agree.
        """
        if logits_LV.shape != (len(rows), self.vocab_size) or logits_LV.dtype != np.float32:
            raise ValueError(
                f"logits are {logits_LV.dtype} {list(logits_LV.shape)}; expected float32 [{len(rows)}, {self.vocab_size}]"
            )
        failed: dict[int, str] = {}
        addresses = self._refreshed(rows, failed)
        places = list(addresses)  # in `rows` of those that are sampled
        results = self._results[: len(rows)]
        while places:
            some = logits_LV if len(places) == len(rows) else logits_LV[places]
            try:
                abi.sample(self.context, some, [addresses[place] for place in places], results)
                break
            except NativeError as error:  # nothing was sampled
                if error.item != "sample_row":
                    raise
                failed[places.pop(error.index)] = reason_of(error)
        if not failed and not results["status"].any() and not any(row.struct.wants_log_sum_exp for row in rows):
            return [SampledToken(token) for token in results["token"].tolist()]
        outcomes = {}
        for index, place in enumerate(places):
            try:
                outcomes[place] = self._outcome(logits_LV[place], results, index, rows[place].row)
            except Exception as error:
                failed[place] = _noted(error)
        return [outcomes.get(place) or SampledToken(-1, None, failed[place]) for place in range(len(rows))]

    def _refreshed(self, rows: Sequence[NativeRow], failed: dict[int, str]) -> dict[int, int]:
        """The addresses of the rows that could be brought to their present state, by place."""
        addresses = {}
        for place, row in enumerate(rows):
            try:
                addresses[place] = row.refresh(self.vocab_size)
            except Exception as error:  # of a custom matcher: whatever it is, it is this row's alone
                failed[place] = _noted(error)
        return addresses

    def _outcome(self, logits_V: FloatArray, results: abi.AnyArray, index: int, row: SamplingRow) -> SampledToken:
        token, status = int(results["token"][index]), int(results["status"][index])
        if status == _NOT_FINITE:
            return SampledToken(-1, None, f"the logits are not finite: max is {results['max'][index]}")
        if status == _NONE_LEFT:
            return SampledToken(-1, None, row.nothing_left(self.vocab_size))
        if status == _OVERFLOW:
            return SampledToken(-1, None, row.overflow)
        top_n = row.sampling_params.logprobs
        if top_n is None:
            return SampledToken(token)
        stats = RowStats(results["token"], results["max"], results["log_sum_exp"])
        return SampledToken(token, token_logprobs(logits_V, stats, index, token, top_n))


def _noted(error: Exception) -> str:
    """Why a row's request ends, also told to the log."""
    _log.warning("a row cannot be sampled; its request ends with an error", exc_info=error)
    return reason_of(error)
