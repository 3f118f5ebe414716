"""One step's batch: the same arrays for torch, numpy and C. T tokens, R requests, L logit rows, W blocks a table, S block size."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


def _empty() -> I32:
    return np.zeros(0, np.int32)


@dataclass(frozen=True)
class BatchInput:
    """What a step computes and where its keys and values live. All arrays are C-contiguous."""

    input_ids_T: I32
    positions_T: I32
    query_start: I32  # [R + 1]
    seq_lens: I32  # [R], computed tokens after the step
    block_tables: I32  # [R, W], padded with -1
    slot_mapping_T: I64  # cell = block * S + offset
    logit_rows: I32 = field(default_factory=_empty)  # [L]

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.input_ids_T.shape[0])

    @property
    def num_seqs(self) -> int:
        """R."""
        return int(self.seq_lens.shape[0])


def single_sequence_batch(token_ids: list[int], block_size: int, *, start: int = 0, first_block: int = 0) -> BatchInput:
    """A batch of one sequence in consecutive blocks that wants logits for every row: for tests and for evaluation."""
    num_tokens = len(token_ids)
    positions = np.arange(start, start + num_tokens, dtype=np.int32)
    num_blocks = -(-(start + num_tokens) // block_size)
    return BatchInput(
        input_ids_T=np.asarray(token_ids, np.int32),
        positions_T=positions,
        query_start=np.array([0, num_tokens], np.int32),
        seq_lens=np.array([start + num_tokens], np.int32),
        block_tables=np.arange(first_block, first_block + num_blocks, dtype=np.int32)[None, :],
        slot_mapping_T=positions.astype(np.int64) + first_block * block_size,
        logit_rows=np.arange(num_tokens, dtype=np.int32),
    )
