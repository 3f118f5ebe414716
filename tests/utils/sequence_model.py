"""What SLOT caches do with sequences, in the plainest words: the oracle of the core's bookkeeping."""

from __future__ import annotations

from collections.abc import Sequence

OK, NO_SPACE, INVALID_BATCH, NOT_SUPPORTED, INVALID_SEQ, INVALID_POS, EMPTY_RANGE = 0, 1, -1, -4, -6, -7, -8
MAX_POSITION = 2**31 - 2
_END = 2**31 - 1


class SequenceModel:
    """Sequences as maps from positions to cells, which are only counted."""

    def __init__(self, n_cells: int) -> None:
        self._n_cells, self._made = n_cells, 0
        self._sequences: dict[int, dict[int, int]] = {}

    @property
    def free_cells(self) -> int:
        """Cells that no sequence holds."""
        return self._n_cells - len({cell for held in self._sequences.values() for cell in held.values()})

    @property
    def ids(self) -> list[int]:
        """The sequences that there are."""
        return list(self._sequences)

    def pos_max(self, seq: int) -> int:
        """-1 when absent."""
        return max(self._sequences.get(seq, {}), default=-1)

    def decode(
        self, seqs: Sequence[int], positions: Sequence[int] | None, more: Sequence[Sequence[int]] | None = None
    ) -> int:
        """Status of a batch with these sequences and positions, which are held from now on if it is ok. `more`: further sequences
        of each token, which hold its cell too."""
        wanted = self._wanted(seqs, positions, more)
        status = self._judge(wanted)
        for owners, position in wanted if status == OK else ():
            cell = self._new_cell()
            for seq in owners:
                self._sequences.setdefault(seq, {})[position] = cell
        return status

    def judge(
        self, seqs: Sequence[int], positions: Sequence[int] | None, more: Sequence[Sequence[int]] | None = None
    ) -> int:
        """The same, but nothing is held."""
        return self._judge(self._wanted(seqs, positions, more))

    def _wanted(
        self, seqs: Sequence[int], positions: Sequence[int] | None, more: Sequence[Sequence[int]] | None
    ) -> list[tuple[list[int], int]]:
        wanted: list[tuple[list[int], int]] = []
        for i, seq in enumerate(seqs):
            before = [position for owners, position in wanted if seq in owners]
            following = max([self.pos_max(seq), *before]) + 1
            owners = [seq, *(more[i] if more is not None else ())]
            wanted.append((owners, following if positions is None else positions[i]))
        return wanted

    def _judge(self, wanted: list[tuple[list[int], int]]) -> int:
        places = [(seq, position) for owners, position in wanted for seq in owners]
        if any(seq < 0 or not 0 <= position <= MAX_POSITION for seq, position in places):
            return INVALID_BATCH
        if len(set(places)) < len(places) or any(p in self._sequences.get(seq, {}) for seq, p in places):
            return INVALID_BATCH
        return NO_SPACE if len(wanted) > self.free_cells else OK

    def reset(self) -> None:
        """Forgets all sequences."""
        self._sequences = {}

    def cp(self, dst: int, src: int, p0: int, p1: int) -> int:
        """Status of a copy."""
        if dst < 0:
            return INVALID_SEQ
        status, held = self._range(src, p0, p1)
        if status != OK:
            return status
        there = self._sequences.get(dst, {})
        if any(there.get(position, cell) != cell for position, cell in held.items()):
            return INVALID_POS
        self._put(dst, {**there, **held})
        return OK

    def rm(self, seq: int, p0: int, p1: int) -> int:
        """Status of a removal."""
        status, held = self._range(seq, p0, p1)
        if status == OK:
            self._put(seq, {p: cell for p, cell in self._sequences[seq].items() if p not in held})
        return status

    def add(self, seq: int, p0: int, p1: int, delta: int, *, can_rotate: bool = True) -> int:
        """Status of a shift, by a program whose keys the core can rotate or cannot."""
        status, held = self._range(seq, p0, p1)
        if status != OK or not held or delta == 0:
            return status
        stays = {p: cell for p, cell in self._sequences[seq].items() if p not in held}
        if any(not 0 <= p + delta <= MAX_POSITION or p + delta in stays for p in held):
            return INVALID_POS
        if not can_rotate:
            return NOT_SUPPORTED
        shared = {cell for owner, cells in self._sequences.items() if owner != seq for cell in cells.values()}
        if sum(cell in shared for cell in held.values()) > self.free_cells:
            return NO_SPACE
        moved = {p + delta: self._new_cell() if cell in shared else cell for p, cell in held.items()}
        self._put(seq, {**stays, **moved})
        return OK

    def free(self, seq: int) -> int:
        """Status of forgetting one sequence."""
        return INVALID_SEQ if self._sequences.pop(seq, None) is None else OK

    def keep(self, seq: int) -> int:
        """Status of letting all others go."""
        if seq not in self._sequences:
            return INVALID_SEQ
        self._sequences = {seq: self._sequences[seq]}
        return OK

    def _range(self, seq: int, p0: int, p1: int) -> tuple[int, dict[int, int]]:
        begin, end = max(p0, 0), _END if p1 < 0 else p1
        if seq not in self._sequences:
            return INVALID_SEQ, {}
        if begin >= end:
            return (INVALID_POS if begin > end else EMPTY_RANGE), {}
        return OK, {p: cell for p, cell in self._sequences[seq].items() if begin <= p < end}

    def _put(self, seq: int, held: dict[int, int]) -> None:
        self._sequences[seq] = held
        if not held:
            del self._sequences[seq]

    def _new_cell(self) -> int:
        self._made += 1
        return self._made
