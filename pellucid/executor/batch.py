"""A plan's entries and the runner's state of each request become one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pellucid.ops.batch import BatchInput
from pellucid.plan import NewRequest, PlanEntry
from pellucid.sampling.native import NativeRow
from pellucid.sampling.sampler import SamplingRow

I32 = npt.NDArray[np.int32]


@dataclass
class RunnerRequest:
    """What the runner keeps of a request: its tokens and blocks in arrays that grow, and how it samples."""

    row: SamplingRow
    native_row: NativeRow
    token_ids: I32  # [capacity]; prompt, then outputs
    num_tokens: int
    block_ids: I32  # [W]
    num_blocks: int
    num_shared_tokens: int  # in blocks that came from the prefix cache: their K/V are there and are not written again

    @classmethod
    def from_new(cls, new: NewRequest, row: SamplingRow, block_size: int, max_blocks: int) -> RunnerRequest:
        """The state of a request that was admitted, or resumed after a preemption."""
        tokens = np.array([*new.prompt_token_ids, *new.output_token_ids], np.int32)
        block_ids = np.full(max_blocks, -1, np.int32)
        block_ids[: len(new.block_ids)] = new.block_ids
        return cls(
            row, NativeRow(row), tokens, len(tokens), block_ids, len(new.block_ids), len(new.block_ids) * block_size
        )

    def append_token(self, token_id: int) -> None:
        """Adds a sampled token."""
        if self.num_tokens == len(self.token_ids):
            self.token_ids = np.concatenate([self.token_ids, np.zeros(max(64, self.num_tokens // 2), np.int32)])
        self.token_ids[self.num_tokens] = token_id
        self.num_tokens += 1

    def append_blocks(self, block_ids: Sequence[int]) -> None:
        """Adds blocks behind those that it holds."""
        if block_ids:
            self.block_ids[self.num_blocks : self.num_blocks + len(block_ids)] = block_ids
            self.num_blocks += len(block_ids)


def build_batch(entries: Sequence[PlanEntry], requests: Sequence[RunnerRequest], block_size: int) -> BatchInput:
    """One sequence an entry, in order; logit rows are the last rows of the entries that sample."""
    counts = np.array([entry.num_tokens for entry in entries], np.int32)
    starts = np.array([entry.start for entry in entries], np.int32)
    query_start = np.zeros(len(entries) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    num_tokens = int(query_start[-1])
    row_of_token = np.repeat(np.arange(len(entries), dtype=np.int32), counts)
    positions = np.arange(num_tokens, dtype=np.int32) - np.repeat(query_start[:-1] - starts, counts)
    input_ids = np.empty(num_tokens, np.int32)
    width = max(request.num_blocks for request in requests)
    block_tables = np.empty((len(entries), width), np.int32)
    for i, (entry, request) in enumerate(zip(entries, requests, strict=True)):
        begin = int(query_start[i])
        input_ids[begin : begin + entry.num_tokens] = request.token_ids[entry.start : entry.start + entry.num_tokens]
        block_tables[i] = request.block_ids[:width]
    blocks = block_tables[row_of_token, positions // block_size].astype(np.int64)
    slots = blocks * block_size + positions % block_size
    shared = np.array([request.num_shared_tokens for request in requests], np.int32)
    slots[positions < shared[row_of_token]] = -1
    samples = np.array([entry.samples for entry in entries])
    return BatchInput(
        input_ids_T=input_ids,
        positions_T=positions,
        query_start=query_start,
        seq_lens=starts + counts,
        block_tables=block_tables,
        slot_mapping_T=slots,
        logit_rows=(query_start[1:] - 1)[samples].astype(np.int32),
    )
