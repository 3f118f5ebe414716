"""A plan's entries and the runner's state of each request become one batch.

Shape suffixes: T tokens, R requests of the plan, L logit rows, W blocks a table, N places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pellucid.api.hidden_states import HiddenStatesParams, SteeringParams, WantedRows
from pellucid.contract.batch import BatchInput
from pellucid.contract.plan import NewRequest, PlanEntry
from pellucid.sampling.native import NativeRow
from pellucid.sampling.sampler import SamplingRow

I32 = npt.NDArray[np.int32]


class WantedStates:
    """Which rows and layers of a request its caller wants."""

    def __init__(self, params: HiddenStatesParams, num_prompt_tokens: int) -> None:
        self.rows, self.layers = WantedRows(params, num_prompt_tokens), params.wanted_layers


@dataclass
class RunnerRequest:
    """What the runner keeps of a request beside its place in `RequestRows`."""

    row: SamplingRow
    native_row: NativeRow
    place: int
    token_ids: I32  # prompt and outputs, as they were known when it was admitted
    hidden: WantedStates | None
    capture: tuple[str, ...]
    steering: SteeringParams | None
    num_blocks: int = 0

    @property
    def wants_rows(self) -> bool:
        """Whether its steps are more than tokens in and tokens out."""
        return self.hidden is not None or bool(self.capture) or self.steering is not None


class RequestRows:
    """What batches are made of, a row a request, kept from step to step: its newest token and its block table.

    A request has a place from `add` to `remove`. Its newest token comes from sampling and is known here alone until the
    step's result is read, so a step can be built on the one before without anybody having read that.
    """

    def __init__(self, block_size: int, max_blocks: int, num_places: int) -> None:
        self.block_size = block_size
        self._free_places = list(range(num_places - 1, -1, -1))
        self._newest_N = np.zeros(num_places, np.int32)
        self._num_shared_N = np.zeros(num_places, np.int32)  # tokens whose K/V came from the prefix cache: not written
        self._tables_NW = np.full((num_places, max_blocks), -1, np.int32)

    def add(self, new: NewRequest, row: SamplingRow) -> RunnerRequest:
        """Takes in a request that was admitted, or resumed after a preemption. One that cannot be has no place."""
        token_ids = np.array([*new.prompt_token_ids, *new.output_token_ids], np.int32)
        hidden = None if new.hidden_states is None else WantedStates(new.hidden_states, len(new.prompt_token_ids))
        native_row = NativeRow(row)
        if not self._free_places:
            self._grow()
        request = RunnerRequest(row, native_row, self._free_places.pop(), token_ids, hidden, new.capture, new.steering)
        self._tables_NW[request.place] = -1
        self._newest_N[request.place] = token_ids[-1]
        self._num_shared_N[request.place] = len(new.block_ids) * self.block_size
        self.add_blocks(request, new.block_ids)
        return request

    def remove(self, request: RunnerRequest) -> None:
        """Its place is free for another."""
        self._free_places.append(request.place)

    def add_blocks(self, request: RunnerRequest, block_ids: Sequence[int]) -> None:
        """Adds blocks behind those that it holds."""
        end = request.num_blocks + len(block_ids)
        self._tables_NW[request.place, request.num_blocks : end] = block_ids
        request.num_blocks = end

    def set_newest(self, requests: Sequence[RunnerRequest], token_ids: Sequence[int]) -> None:
        """Notes the sampled token of each request: the input of its next step."""
        self._newest_N[[request.place for request in requests]] = token_ids

    def build(self, entries: Sequence[PlanEntry], requests: Sequence[RunnerRequest]) -> BatchInput:
        """One sequence an entry, in order. Logit rows: of the entries that sample the last row, and those before it that
        verify drafts."""
        places_R = np.array([request.place for request in requests], np.int32)
        starts_R = np.array([entry.start for entry in entries], np.int32)
        counts_R = np.array([entry.num_tokens for entry in entries], np.int32)
        seq_lens_R = starts_R + counts_R
        width = -(-int(seq_lens_R.max()) // self.block_size)
        tables_RW = self._tables_NW[
            places_R, :width
        ]  # not `take`, which lets go of the lock that the host thread waits for
        query_start = np.zeros(len(entries) + 1, np.int32)
        counts_R.cumsum(out=query_start[1:])
        if query_start[-1] == len(entries):
            requests_T, positions_T = np.arange(len(entries), dtype=np.int32), starts_R
        else:
            requests_T = np.repeat(np.arange(len(entries), dtype=np.int32), counts_R)
            positions_T = np.arange(query_start[-1], dtype=np.int32) + (starts_R - query_start[:-1])[requests_T]
        return BatchInput(
            input_ids_T=self._input_ids(entries, requests, places_R, query_start),
            positions_T=positions_T,
            query_start=query_start,
            seq_lens=seq_lens_R,
            block_tables=tables_RW,
            slot_mapping_T=self._slots(tables_RW, positions_T, requests_T, places_R),
            logit_rows=_logit_rows(entries, query_start),
        )

    def _input_ids(
        self, entries: Sequence[PlanEntry], requests: Sequence[RunnerRequest], places_R: I32, query_start: I32
    ) -> I32:
        """Tokens known at admission, else the newest one and drafts behind it."""
        newest_R = self._newest_N[places_R]
        if query_start[-1] == len(entries) and all(
            entry.start >= len(request.token_ids) - 1 for entry, request in zip(entries, requests, strict=True)
        ):
            return newest_R
        input_ids = np.empty(query_start[-1], np.int32)
        for i, (entry, request) in enumerate(zip(entries, requests, strict=True)):
            begin, end = query_start[i], query_start[i + 1]
            if entry.start < len(request.token_ids) - 1:
                input_ids[begin:end] = request.token_ids[entry.start : entry.start + entry.num_tokens]
            else:
                input_ids[begin] = newest_R[i]
                input_ids[begin + 1 : end] = entry.draft_token_ids
        return input_ids

    def _slots(self, tables_RW: I32, positions_T: I32, requests_T: I32, places_R: I32) -> npt.NDArray[np.int64]:
        blocks_T, offsets_T = np.divmod(positions_T, self.block_size)
        slots_T = tables_RW[requests_T, blocks_T] * np.int64(self.block_size) + offsets_T
        slots_T[positions_T < self._num_shared_N[places_R][requests_T]] = -1
        return slots_T

    def _grow(self) -> None:
        count = len(self._newest_N)
        self._free_places = list(range(2 * count - 1, count - 1, -1))
        self._newest_N = np.concatenate([self._newest_N, np.zeros_like(self._newest_N)])
        self._num_shared_N = np.concatenate([self._num_shared_N, np.zeros_like(self._num_shared_N)])
        self._tables_NW = np.concatenate([self._tables_NW, np.full_like(self._tables_NW, -1)])


def _logit_rows(entries: Sequence[PlanEntry], query_start: I32) -> I32:
    if query_start[-1] == len(entries) and all(entry.samples for entry in entries):
        return query_start[:-1].copy()
    rows: list[int] = []
    for entry, end in zip(entries, query_start[1:].tolist(), strict=True):
        if entry.samples:
            rows += range(end - 1 - len(entry.draft_token_ids), end)
    return np.array(rows, np.int32)
