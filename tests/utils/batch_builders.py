"""Batches for `pld_decode`: no test assembles one by hand."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pellucid.core import structs


@dataclass
class BlockBatchState:
    """Block tables and next positions of sequences, carried from call to call. Blocks are handed out in order."""

    n_blocks: int
    next_block: int = 0
    tables: dict[int, list[int]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)

    def cell(self, seq: int, position: int, block_size: int) -> int:
        """Where a position lies; a block is taken when it is the first of one."""
        table = self.tables.setdefault(seq, [])
        while len(table) * block_size <= position:
            if self.next_block == self.n_blocks:
                raise ValueError(f"all {self.n_blocks} blocks are taken")
            table.append(self.next_block)
            self.next_block += 1
        return table[position // block_size] * block_size + position % block_size


@dataclass(frozen=True)
class DecodeBatch:
    """The struct, and the arrays that it points to."""

    struct: structs.DecodeBatchStruct
    arrays: dict[str, npt.NDArray[np.generic]]


def build_decode_batch(
    token_ids: Sequence[int],
    *,
    logits_mask: Sequence[bool] | None = None,
    seq_ids: Sequence[int] | None = None,
    pos_ids: Sequence[int] | None = None,
    layout: str = "slot",
    block_size: int = 4,
    block_state: BlockBatchState | None = None,
    more: Sequence[Sequence[int]] | None = None,
) -> DecodeBatch:
    """One decode batch; sequence 0 unless told; `more`: further sequences of each token. With layout "block", metadata come from
    `block_state`, which is advanced."""
    seq_ids = [0] * len(token_ids) if seq_ids is None else seq_ids
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "tokens": np.array(token_ids, np.int32),
        "seq_ids": np.array(seq_ids, np.int32),
    }
    if logits_mask is not None:
        arrays["logits"] = np.array(logits_mask, np.int8)
    if pos_ids is not None:
        arrays["positions"] = np.array(pos_ids, np.int32)
    if more is not None:
        arrays["more_start"] = np.cumsum([0, *map(len, more)], dtype=np.int32)
        arrays["more_seq_ids"] = np.array([seq for row in more for seq in row], np.int32)
    width = 0
    if layout == "block":
        if block_state is None:
            raise ValueError("layout block needs a block_state")
        width = _add_blocks(arrays, seq_ids, pos_ids, block_size, block_state)
    struct = structs.DecodeBatchStruct(ctypes.sizeof(structs.DecodeBatchStruct), len(token_ids), width)
    for name, array in arrays.items():
        setattr(struct, name, array.ctypes.data)
    return DecodeBatch(struct, arrays)


def _add_blocks(
    arrays: dict[str, npt.NDArray[np.generic]],
    seq_ids: Sequence[int],
    pos_ids: Sequence[int] | None,
    block_size: int,
    state: BlockBatchState,
) -> int:
    cells, lengths = [], []
    for i, seq in enumerate(seq_ids):
        position = state.lengths.get(seq, 0) if pos_ids is None else pos_ids[i]
        cells.append(state.cell(seq, position, block_size))
        state.lengths[seq] = position + 1
        lengths.append(position + 1)
    width = max(len(state.tables[seq]) for seq in seq_ids)
    tables = np.full((len(seq_ids), width), -1, np.int32)
    for row, seq in zip(tables, seq_ids, strict=True):
        row[: len(state.tables[seq])] = state.tables[seq]
    arrays["slot_mapping"], arrays["block_tables"] = np.array(cells, np.int64), tables
    arrays["context_lens"] = np.array(lengths, np.int32)
    return width
