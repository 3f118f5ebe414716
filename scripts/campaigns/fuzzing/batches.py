"""Batches: good ones, damaged ones, and the plain rules by which a batch is good. The rules are those of the header, once more."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, sizeof
from dataclasses import dataclass, field
from typing import Any

from utils.sequence_model import MAX_POSITION

from fuzzing.core import ABORTED, INVALID_ARGUMENT, INVALID_BATCH, NOT_SUPPORTED, OK
from fuzzing.draws import MAX_STRUCT_SIZE, Draw, chars, ints, longs, tail, with_tail
from fuzzing.world import SEQS, Cache, Program
from pellucid.core import structs

_OLDEST_SIZE = structs.DecodeBatchStruct.more_start.offset
_SIZE, _RUN_SIZE = sizeof(structs.DecodeBatchStruct), sizeof(structs.BatchStruct)


@dataclass
class DecodeDraw:
    """A pld_decode_batch as lists; None is a null pointer."""

    tokens: list[int] | None
    seq_ids: list[int] | None
    positions: list[int] | None = None
    logits: list[int] | None = None
    slot_mapping: list[int] | None = None
    tables: list[list[int]] | None = None
    context_lens: list[int] | None = None
    n_tokens: int = 0
    width: int = 0
    more: list[list[int]] | None = None  # further sequences of each token
    struct_size: int = _SIZE
    tail: bytes = b""  # fields that the core does not know
    abort: str = "never"  # never, no, yes; way: set by the step itself

    def struct(self, abort_at: int | None) -> tuple[structs.DecodeBatchStruct, list[Any]]:
        """As C sees it, and the memory that it points to."""
        struct = structs.DecodeBatchStruct(self.struct_size, self.n_tokens, self.width)
        table = None if self.tables is None else [block for row in self.tables for block in row]
        memory: list[Any] = []
        starts = None if self.more is None else [sum(map(len, self.more[:i])) for i in range(len(self.more) + 1)]
        for name, values, make in (
            ("tokens", self.tokens, ints),
            ("positions", self.positions, ints),
            ("seq_ids", self.seq_ids, ints),
            ("logits", self.logits, chars),
            ("slot_mapping", self.slot_mapping, longs),
            ("block_tables", table, ints),
            ("context_lens", self.context_lens, ints),
            ("more_start", starts, ints),
            ("more_seq_ids", None if self.more is None else [seq for row in self.more for seq in row], ints),
        ):
            if values is not None:
                memory.append(make(values))
                setattr(struct, name, addressof(memory[-1]))
        struct.abort = abort_at
        return with_tail(struct, self.tail), memory


@dataclass
class RunDraw:
    """A pld_batch as lists."""

    token_ids: list[int] | None
    positions: list[int] | None
    query_start: list[int] | None
    seq_lens: list[int] | None
    tables: list[list[int]] | None
    slot_mapping: list[int] | None
    logit_rows: list[int] | None
    n_tokens: int = 0
    n_seqs: int = 0
    n_logit_rows: int = 0
    width: int = 0
    struct_size: int = _RUN_SIZE
    tail: bytes = b""
    memory: list[Any] = field(default_factory=list, repr=False)

    def struct(self) -> structs.BatchStruct:
        """As C sees it."""
        table = None if self.tables is None else [block for row in self.tables for block in row]
        arrays = (
            (self.token_ids, ints),
            (self.positions, ints),
            (self.query_start, ints),
            (self.seq_lens, ints),
            (table, ints),
            (self.slot_mapping, longs),
            (self.logit_rows, ints),
        )
        pointers = []
        for values, make in arrays:
            if values is None:
                pointers.append(None)
                continue
            self.memory.append(make(values))
            pointers.append(addressof(self.memory[-1]))
        counts = (self.n_tokens, self.n_seqs, self.n_logit_rows, self.width)
        return with_tail(structs.BatchStruct(self.struct_size, *counts, *pointers), self.tail)


# ---- good ones -----------------------------------------------------------------------------------------------------


def good_slot(draw: Draw, program: Program, cache: Cache) -> DecodeDraw:
    """Tokens of some sequences; positions that are free, or the next."""
    count = min(draw.one((1, 1, 2, 3, 4, 6)), program.max_tokens)
    seqs = [draw.one(SEQS[: draw.one((1, 2, 4, 6))]) for _ in range(count)]
    positions = None
    if draw.chance(0.4):
        top = draw.one((6, 12, 40, MAX_POSITION))
        positions = [draw.between(0, top) for _ in seqs]
    return _finish(draw, program, DecodeDraw(_tokens(draw, program, count), seqs, positions, n_tokens=count))


def _tokens(draw: Draw, program: Program, count: int) -> list[int]:
    return [draw.below(program.vocab_size) for _ in range(count)]


def _finish(draw: Draw, program: Program, batch: DecodeDraw) -> DecodeDraw:
    """Which rows are wanted, and the flag that stops it."""
    if draw.chance(0.3 if batch.slot_mapping is None else 0.02):
        batch.more = [[draw.one(SEQS) for _ in range(draw.one((0, 0, 1, 1, 2)))] for _ in range(batch.n_tokens)]
        if draw.chance(0.03):
            draw.one(batch.more).append(draw.one((-1, -(2**31))))
    if draw.chance(0.7):
        batch.logits = [draw.one((0, 1, 1, -1, 127)) for _ in range(batch.n_tokens)]
    batch.abort = draw.one(("never", "never", "never", "no", "yes", "way"))
    return batch


def table_of(draw: Draw, cache: Cache, seq: int) -> list[int]:
    """The blocks of a sequence of a BLOCK cache. Sequences may share some."""
    n = cache.params.n_blocks
    if seq not in cache.tables:
        cache.tables[seq] = [draw.below(n) for _ in range(draw.one((1, 2, 3)))]
        if draw.chance(0.6):  # without a block twice
            cache.tables[seq] = list(dict.fromkeys(cache.tables[seq]))
    return cache.tables[seq]


def good_block(draw: Draw, program: Program, cache: Cache) -> DecodeDraw:
    """Tokens of some sequences in any order, with tables; some cells are not written."""
    size, rows = cache.params.block_size, []
    for seq in dict.fromkeys(draw.one(SEQS[:4]) for _ in range(draw.one((1, 1, 2, 3)))):
        table = table_of(draw, cache, seq)
        room = min(len(table) * size, 64)
        begin = draw.below(room)
        for position in range(begin, min(room, begin + draw.one((1, 1, 2, 5)))):
            cell = table[position // size] * size + position % size
            rows.append((seq, position, -1 if draw.chance(0.1) else cell, table))
    rows = rows[: program.max_tokens]
    draw.shuffle(rows)
    width = max(len(row[3]) for row in rows) + draw.below(2)
    batch = DecodeDraw(
        _tokens(draw, program, len(rows)),
        [row[0] for row in rows],
        [row[1] for row in rows] if draw.chance(0.5) else None,
        None,
        [row[2] for row in rows],
        [row[3] + [-1] * (width - len(row[3])) for row in rows],
        [row[1] + 1 for row in rows],
        len(rows),
        width,
    )
    return _finish(draw, program, batch)


_SPAN = 1024  # positions between two merges of attention


def good_run(draw: Draw, program: Program, cache: Cache) -> RunDraw:
    """A step as an engine would make it; at times with a sequence that is long, whose table has blocks more than once."""
    size = cache.params.block_size
    batch = RunDraw([], [], [0], [], [], [], [])
    longest = _SPAN * draw.one((1, 1, 2, 3)) + draw.one((-1, 0, 1, 40)) if draw.chance(0.05) else 0
    width = max(draw.one((1, 2, 3)), -(-longest // size))
    for _ in range(draw.one((1, 1, 2, 3))):
        table = [draw.below(cache.params.n_blocks) for _ in range(width)]
        room = longest or min(width * size, 64)
        begin = room - draw.between(1, 5) if longest else draw.below(room)
        count = min(room - begin, draw.one((1, 1, 2, 5)), program.max_tokens - len(batch.positions))
        longest = 0 if draw.chance(0.5) else longest
        if count < 1:
            break
        positions = range(begin, begin + count)
        batch.positions += positions
        batch.slot_mapping += [table[p // size] * size + p % size if draw.chance(0.9) else -1 for p in positions]
        batch.query_start.append(len(batch.positions))
        batch.seq_lens.append(begin + count)
        batch.tables.append(table)
    batch.token_ids = _tokens(draw, program, len(batch.positions))
    batch.n_tokens, batch.n_seqs, batch.width = len(batch.positions), len(batch.seq_lens), width
    batch.n_logit_rows = draw.below(min(program.max_logit_rows, 8) + 1)
    batch.logit_rows = [draw.below(batch.n_tokens) for _ in range(batch.n_logit_rows)]
    return batch


# ---- damage --------------------------------------------------------------------------------------------------------

_LISTS = ("tokens", "seq_ids", "positions", "slot_mapping", "context_lens", "logits")
_RUN_LISTS = ("token_ids", "positions", "query_start", "seq_lens", "slot_mapping", "logit_rows")


def _damage_list(draw: Draw, batch: DecodeDraw | RunDraw, names: Sequence[str]) -> None:
    name = draw.one(names)
    values = getattr(batch, name)
    if values is None:
        return
    kind = draw.below(8)
    if kind == 0:
        setattr(batch, name, None)
    elif values:
        place = draw.below(len(values))
        if kind == 1:
            values[place] = values[draw.below(len(values))]
        elif name == "slot_mapping":
            values[place] = draw.hostile64(values[place])
        elif name == "logits":
            values[place] = draw.between(-128, 127)
        else:
            values[place] = draw.hostile(values[place])


def _damage_tables(draw: Draw, batch: DecodeDraw | RunDraw) -> None:
    if not batch.tables:
        return
    row = batch.tables[draw.below(len(batch.tables))]
    if row:
        place = draw.below(len(row))
        row[place] = draw.hostile(row[place])
    if draw.chance(0.1):
        batch.tables = None


def damage_decode(draw: Draw, batch: DecodeDraw) -> None:
    """Changes one thing, with lists as long as they say."""
    kind = draw.below(10)
    if kind < 6:
        _damage_list(draw, batch, _LISTS)
    elif kind < 8:
        _damage_tables(draw, batch)
        if draw.chance(0.2):
            batch.width = draw.one((0, -1, -(2**31), max(batch.width - 1, 0)))
            batch.tables = None if batch.tables is None else [row[: max(batch.width, 0)] for row in batch.tables]
    elif kind == 8:
        batch.n_tokens = draw.one((0, -1, -(2**31), 2**31 - 1, batch.n_tokens - 1))
    else:
        _damage_size(draw, batch, _SIZE)


def damage_run(draw: Draw, batch: RunDraw) -> None:
    """Changes one thing, with lists as long as they say."""
    kind = draw.below(10)
    if kind < 5:
        _damage_list(draw, batch, _RUN_LISTS)
    elif kind < 7:
        _damage_tables(draw, batch)
        if draw.chance(0.2):
            batch.width = draw.one((0, -1, -(2**31), max(batch.width - 1, 0)))
            batch.tables = None if batch.tables is None else [row[: max(batch.width, 0)] for row in batch.tables]
    elif kind < 9:
        name = draw.one(("n_tokens", "n_seqs", "n_logit_rows"))
        good = getattr(batch, name)
        setattr(batch, name, draw.one((0, -1, -(2**31), good - 1)))
        if draw.chance(0.3):
            setattr(batch, name, 2**31 - 1)
    else:
        _damage_size(draw, batch, _RUN_SIZE)


def _damage_size(draw: Draw, batch: DecodeDraw | RunDraw, size: int) -> None:
    batch.struct_size = draw.one((0, 1, 8, size - 8, size - 1, 4097, size + 4096, 2**64 - 1))
    if draw.chance(0.5):
        batch.tail = tail(draw)
        batch.struct_size = size + len(batch.tail)


# ---- rules ---------------------------------------------------------------------------------------------------------


def _wanted(batch: DecodeDraw) -> list[bool]:
    if batch.logits is None:
        return [t + 1 == batch.n_tokens for t in range(batch.n_tokens)]
    return [value != 0 for value in batch.logits[: batch.n_tokens]]


def _is_good_size(batch: DecodeDraw | RunDraw, oldest: int, today: int) -> bool:
    is_known = oldest <= batch.struct_size <= MAX_STRUCT_SIZE
    return is_known and not any(batch.tail[: max(0, batch.struct_size - today)])


def more_of(batch: DecodeDraw) -> list[list[int]] | None:
    """Further sequences, as far as the core reads the struct."""
    return batch.more if batch.struct_size > _OLDEST_SIZE else None


def _is_sane(batch: DecodeDraw, program: Program) -> bool:
    """By itself, on either layout."""
    n = batch.n_tokens
    if not 1 <= n <= program.max_tokens or batch.tokens is None or batch.seq_ids is None:
        return False
    if any(not 0 <= token < program.vocab_size for token in batch.tokens[:n]) or min(batch.seq_ids[:n]) < 0:
        return False
    if batch.positions is not None and any(not 0 <= p <= MAX_POSITION for p in batch.positions[:n]):
        return False
    return sum(_wanted(batch)) <= program.max_logit_rows


def _is_good_block(batch: DecodeDraw, cache: Cache) -> bool:
    n, lens, slots, tables = batch.n_tokens, batch.context_lens, batch.slot_mapping, batch.tables
    if lens is None or slots is None or tables is None or batch.width < 1 or min(lens[:n]) < 1:
        return False
    if batch.positions is not None and any(lens[t] != batch.positions[t] + 1 for t in range(n)):
        return False
    rows: list[tuple[int, int, Sequence[int]]] = []
    for seq in dict.fromkeys(batch.seq_ids[:n]):
        own = sorted((t for t in range(n) if batch.seq_ids[t] == seq), key=lambda t: lens[t])
        last = tables[own[-1]]
        for i, t in enumerate(own):
            if lens[t] != lens[own[0]] + i:
                return False
            used = min(-(-lens[t] // cache.params.block_size), batch.width)
            if tables[t][:used] != last[:used]:
                return False
            rows.append((lens[t] - 1, slots[t], last))
    return _are_good_cells(rows, cache)


def _are_good_cells(rows: Sequence[tuple[int, int, Sequence[int]]], cache: Cache) -> bool:
    """(position, slot, table): all blocks up to a position exist, slots are those of the tables, and none is written twice."""
    size, written = cache.params.block_size, set()
    for position, slot, table in rows:
        used = position // size + 1
        if used > len(table) or any(not 0 <= block < cache.params.n_blocks for block in table[:used]):
            return False
        if slot == -1:
            continue
        if slot != table[position // size] * size + position % size or slot in written:
            return False
        written.add(slot)
    return True


def expected_decode(batch: DecodeDraw, program: Program, cache: Cache) -> int | None:
    """The status that the header asks for; None: with a flag that the step sets itself, ok or aborted. A SLOT cache's model is
    told of what was accepted by the caller."""
    if not cache.fits(program.recipe):
        return INVALID_ARGUMENT
    if not _is_good_size(batch, _OLDEST_SIZE, _SIZE):
        return INVALID_BATCH
    more = more_of(batch)
    if cache.model is None and more is not None:
        return NOT_SUPPORTED
    if not _is_sane(batch, program):
        return INVALID_BATCH
    if cache.model is None and not _is_good_block(batch, cache):
        return INVALID_BATCH
    if cache.model is not None:
        n = batch.n_tokens
        positions = None if batch.positions is None else batch.positions[:n]
        if more is not None and batch.struct_size <= _SIZE - 8 and any(more[:n]):
            return INVALID_BATCH  # it says how many there are, and not which
        status = cache.model.judge(batch.seq_ids[:n], positions, more)
        if status != OK:
            return status
    return {"never": OK, "no": OK, "yes": ABORTED}.get(batch.abort)


def expected_run(batch: RunDraw, program: Program, cache: Cache) -> int:
    """The status that the header asks for."""
    if not cache.fits(program.recipe):
        return INVALID_ARGUMENT
    if cache.model is not None:
        return NOT_SUPPORTED
    limits = (program.max_tokens, program.max_logit_rows, program.vocab_size)
    return OK if is_good_run(batch, cache, limits) else INVALID_BATCH


def is_good_run(batch: RunDraw, cache: Cache, limits: tuple[int, int, int]) -> bool:
    """`limits`: tokens, logit rows, vocabulary (0: ids are not looked at)."""
    n, r, n_logits, width = batch.n_tokens, batch.n_seqs, batch.n_logit_rows, batch.width
    arrays = (batch.token_ids, batch.positions, batch.query_start, batch.seq_lens, batch.tables, batch.slot_mapping)
    if not _is_good_size(batch, _RUN_SIZE, _RUN_SIZE) or not 1 <= n <= limits[0] or not 1 <= r <= n:
        return False
    if not 0 <= n_logits <= limits[1] or width < 1 or None in arrays or (n_logits > 0 and batch.logit_rows is None):
        return False
    if limits[2] > 0 and any(not 0 <= token < limits[2] for token in batch.token_ids[:n]):
        return False
    if any(not 0 <= row < n for row in (batch.logit_rows or ())[:n_logits]):
        return False
    starts = batch.query_start
    if starts[0] != 0 or starts[r] != n or any(starts[i + 1] <= starts[i] for i in range(r)):
        return False
    rows: list[tuple[int, int, Sequence[int]]] = []
    for i in range(r):
        begin, end = starts[i], starts[i + 1]
        if batch.seq_lens[i] < end - begin:
            return False
        for t in range(begin, end):
            position = batch.seq_lens[i] - (end - t)
            if batch.positions[t] != position:
                return False
            rows.append((position, batch.slot_mapping[t], batch.tables[i]))
    return _are_good_cells(rows, cache)


def wanted_rows(batch: DecodeDraw) -> list[bool]:
    """Which rows of an accepted batch have logits."""
    return _wanted(batch)
