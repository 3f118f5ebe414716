"""A model file in pieces, and the ways in which it is mutated: bits and bytes anywhere, fields of its tables, its header, its places."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing.draws import EDGES_32, EDGES_64, Draw
from fuzzing.programs import damage_op
from pellucid.core import abi
from pellucid.program.builder import PLAN_DTYPE, WEIGHT_DTYPE
from pellucid.program.file import INDEXED, MAGIC, aligned

_INDEX = len(MAGIC) + 8  # where the core's index begins
_START = _INDEX + 16 * len(INDEXED)  # where the JSON header begins
_TABLES = {"plan": PLAN_DTYPE, "weights": WEIGHT_DTYPE, "ops": abi.OP_DTYPE, "buffers": abi.BUFFER_DTYPE}


def reseal(path: Path) -> None:
    """Makes the checksums of a file right again, where its format has some: what was changed is then what is read."""
    if find_spec("pellucid.program.checksums") is not None and path.stat().st_size > 0:
        import_module("pellucid.program.checksums").reseal(path)


@dataclass
class Image:
    """A good file, taken apart."""

    whole: bytes
    meta: dict[str, Any]
    sections: dict[str, tuple[int, int]]  # offset in the file, length

    @classmethod
    def of(cls, whole: bytes) -> Image:
        """Reads a good file."""
        length = int.from_bytes(whole[len(MAGIC) : _INDEX], "little")
        meta = json.loads(whole[_START : _START + length])
        base = aligned(_START + length)
        return cls(whole, meta, {name: (base + at, count) for name, (at, count) in meta["sections"].items()})

    def header(self) -> bytes:
        """The JSON header."""
        return self.whole[_START : _START + int.from_bytes(self.whole[len(MAGIC) : _INDEX], "little")]


def with_header(image: bytes, header: bytes, sections: dict[str, tuple[int, int]] | None) -> bytes:
    """The file with another header, whose sections move with it. `sections` (offsets behind the header) give the index; None: it
    keeps what it said, moved."""
    length = int.from_bytes(image[len(MAGIC) : _INDEX], "little")
    old_base, base = aligned(_START + length), aligned(_START + len(header))
    if sections is None:
        words = [int.from_bytes(image[at : at + 8], "little") for at in range(_INDEX, _START, 8)]
        places = [(words[i] - old_base, words[i + 1]) for i in range(0, len(words), 2)]
    else:
        places = [sections.get(name, (0, 0)) for name in INDEXED]
    index = b"".join(_word(base + at) + _word(count) for at, count in places)
    start = MAGIC + _word(len(header)) + index + header
    return start + bytes(base - len(start)) + image[old_base:]


def _word(value: int) -> bytes:
    return (value % 2**64).to_bytes(8, "little")


# ---- mutations -----------------------------------------------------------------------------------------------------

Mutation = Callable[[Draw, Image, bytes], bytes]


def _region(draw: Draw, image: Image, size: int) -> tuple[int, int]:
    """[begin, end) of a part of the file; the small ones as often as the data."""
    kind = draw.below(len(image.sections) + 3)
    if kind == 0:
        return 0, _START
    if kind == 1:
        return _START, min(size, _START + len(image.header()))
    if kind == 2:
        return 0, size
    at, count = list(image.sections.values())[kind - 3]
    return at, at + count


def _flip(draw: Draw, image: Image, whole: bytes) -> bytes:
    """Bits or bytes of one part."""
    begin, end = _region(draw, image, len(whole))
    changed, end = bytearray(whole), min(end, len(whole))
    for _ in range(draw.one((1, 1, 2, 8))):
        if begin < end:
            at = draw.between(begin, end - 1)
            changed[at] = changed[at] ^ (1 << draw.below(8)) if draw.chance(0.5) else draw.one((0, 1, 127, 128, 255))
    return bytes(changed)


def _set_number(draw: Draw, image: Image, whole: bytes) -> bytes:
    """An int of 4 or 8 bytes at a place of a part that is a multiple of its size."""
    begin, end = _region(draw, image, len(whole))
    size, end = draw.one((4, 8)), min(end, len(whole))
    if end - begin < size:
        return whole
    at = begin + draw.below((end - begin) // size) * size
    old = int.from_bytes(whole[at : at + size], "little", signed=True)
    new = draw.one(EDGES_32 if size == 4 else EDGES_64) if draw.chance(0.5) else old + draw.one((-64, -1, 1, 64, old))
    return whole[:at] + (new % 2 ** (8 * size)).to_bytes(size, "little") + whole[at + size :]


def _rows_of(image: Image, whole: bytes, name: str) -> np.ndarray:
    """The whole rows of a table that are left of it."""
    at, count = image.sections[name]
    size = _TABLES[name].itemsize
    return np.frombuffer(whole[at : at + len(whole[at : at + count]) // size * size], _TABLES[name]).copy()


def _with_rows(image: Image, whole: bytes, name: str, rows: np.ndarray) -> bytes:
    at = image.sections[name][0]
    return whole[:at] + rows.tobytes() + whole[at + rows.nbytes :]


def _set_field(draw: Draw, image: Image, whole: bytes) -> bytes:
    """A named field of a row of a table."""
    name = draw.one(("plan", "weights", "weights", "ops", "ops", "buffers"))
    rows = _rows_of(image, whole, name)
    if not len(rows):
        return whole
    if name == "ops":
        damage_op(draw, rows)
    else:
        row = rows[draw.below(len(rows))]
        field = draw.one(rows.dtype.names or ())
        if row[field].shape:
            row[field][draw.below(len(row[field]))] = draw.hostile(0)
        elif rows.dtype[field].itemsize == 8:
            row[field] = draw.hostile64(int(row[field]))
        else:
            row[field] = draw.hostile(int(row[field]))
    return _with_rows(image, whole, name, rows)


def _swap_rows(draw: Draw, image: Image, whole: bytes) -> bytes:
    """A row of a table over another, or two swapped."""
    name = draw.one(("weights", "ops", "buffers"))
    rows = _rows_of(image, whole, name)
    if not len(rows):
        return whole
    first, second = draw.below(len(rows)), draw.below(len(rows))
    if draw.chance(0.5):
        rows[[first, second]] = rows[[second, first]]
    else:
        rows[first] = rows[second]
    return _with_rows(image, whole, name, rows)


def _swap_weights(draw: Draw, image: Image, whole: bytes) -> bytes:
    """One weight's shape, type or place becomes another's, in the table and in the header alike."""
    meta, rows = json.loads(json.dumps(image.meta)), _rows_of(image, whole, "weights")
    if len(rows) < 2 or len(rows) != len(meta["weights"]):
        return whole
    first, second = draw.below(len(rows)), draw.below(len(rows))
    names = draw.one(
        (("rows", "cols"), ("dtype",), ("layout",), ("offset",), ("rows", "cols", "bytes"), ("offset", "bytes"))
    )
    fields = ("name", "rows", "cols", "dtype", "layout", "offset", "bytes")
    for name in names:
        value = int(rows[second][name])
        if draw.chance(0.3):
            value += draw.one((-64, -4, -1, 1, 2, 64))
        rows[first][name] = value
        meta["weights"][first][fields.index(name)] = value
    changed = _with_rows(image, whole, "weights", rows)
    return with_header(changed, json.dumps(meta).encode(), dict(meta["sections"]))


def _move_sections(draw: Draw, image: Image, whole: bytes) -> bytes:
    """Offsets and lengths of sections, in the header and in the index, or in one of them."""
    meta = json.loads(json.dumps(image.meta))
    places = meta["sections"]
    for _ in range(draw.one((1, 1, 2))):
        name, part = draw.one(list(places)), draw.below(2)
        old = places[name][part]
        values = (old - 64, old + 64, old + 1, 0, len(whole), *EDGES_64, places[draw.one(list(places))][part])
        places[name][part] = draw.one(values)
    kind = draw.below(3)
    header = json.dumps(meta if kind != 1 else image.meta).encode()
    return with_header(whole, header, {name: tuple(place) for name, place in places.items()} if kind else None)


_LEAVES: tuple[Any, ...] = (
    None,
    True,
    "",
    "x",
    "9" * 400,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**64,
    10**30,
    1.5,
    1e308,
    1e309,
    -0.0,
)
_LEAVES = (*_LEAVES, math.nan, math.inf, [], {}, [1, 2], {"a": 1}, "\ud800", [[]])


def _change_value(draw: Draw, value: Any, depth: int = 0) -> Any:
    """A JSON document with one thing changed."""
    if isinstance(value, dict) and value and depth < 6 and draw.chance(0.9):
        name = draw.one(list(value))
        kind = draw.below(10)
        if kind == 0:
            return {key: item for key, item in value.items() if key != name}
        if kind == 1:
            return {**value, draw.one(("", "sections", "weights", "x" * 100)): draw.one(_LEAVES)}
        return {**value, name: _change_value(draw, value[name], depth + 1)}
    if isinstance(value, list) and value and depth < 6 and draw.chance(0.9):
        place, kind = draw.below(len(value)), draw.below(10)
        if kind == 0:
            return value[:place] + value[place + 1 :]
        if kind == 1:
            return [*value, value[place]]
        return [_change_value(draw, item, depth + 1) if i == place else item for i, item in enumerate(value)]
    if isinstance(value, int) and not isinstance(value, bool) and draw.chance(0.6):
        return draw.hostile64(value)
    return draw.one(_LEAVES)


def _change_header(draw: Draw, image: Image, whole: bytes) -> bytes:
    """A value of the header; or what is no header."""
    kind = draw.below(12)
    if kind == 0:
        header = draw.one((b"", b"{}", b"[]", b"null", b"{", b"\xff" * 9, b"[" * 100_000, b'{"a":' * 5000, b"1e999"))
    elif kind == 1:
        text = image.header()
        cut = draw.below(len(text) + 1)
        header = text[:cut] + draw.one((b"", b"\x00", b"}", b"\xc3", b" " * 100)) + text[cut + draw.below(3) :]
    else:
        header = json.dumps(_change_value(draw, image.meta)).encode()
    return with_header(whole, header, dict(image.meta["sections"]) if draw.chance(0.8) else None)


def _change_text(draw: Draw, image: Image, whole: bytes) -> bytes:
    """A JSON document beside the program, where there is room for it."""
    names = [name for name in image.sections if name not in INDEXED]
    if not names:
        return whole
    at, count = image.sections[draw.one(names)]
    try:
        document = json.loads(whole[at : at + count])
    except ValueError:
        document = None
    text = json.dumps(_change_value(draw, document)).encode()
    if draw.chance(0.1):
        text = draw.one((b"[" * count, b"\xff" * count, b"", b'"' + b"a" * (count - 2) + b'"'))
    return whole[:at] + text[:count].ljust(count) + whole[at + count :]


def _cut(draw: Draw, image: Image, whole: bytes) -> bytes:
    """Truncated anywhere or at the edge of a section, or with more behind it."""
    edges = [edge for at, count in image.sections.values() for edge in (at, at + count)]
    kind = draw.below(4)
    if kind == 0:
        return whole[: draw.below(len(whole) + 1)]
    if kind == 1:
        return whole[: max(0, draw.one([*edges, _INDEX, _START]) + draw.one((-1, 0, 0, 1)))]
    if kind == 2:
        return whole + bytes(draw.one((1, 63, 64, 4096)))
    return whole[: draw.below(len(MAGIC) + 200)]


def _splice(draw: Draw, image: Image, whole: bytes) -> bytes:
    """A piece of one section over another."""
    names = list(image.sections)
    (source, available), (target, room) = image.sections[draw.one(names)], image.sections[draw.one(names)]
    count = min(available, room, draw.one((4, 16, 64, 92, 4096)))
    if count < 1:
        return whole
    begin, at = draw.below(available - count + 1), draw.below(room - count + 1)
    step = draw.one((1, 4, 64))
    begin, at = source + begin // step * step, target + at // step * step
    return whole[:at] + whole[begin : begin + count] + whole[at + count :]


_MUTATIONS: tuple[tuple[int, Mutation], ...] = (
    (12, _flip),
    (10, _set_number),
    (26, _set_field),
    (6, _swap_rows),
    (10, _swap_weights),
    (8, _move_sections),
    (12, _change_header),
    (6, _change_text),
    (4, _cut),
    (6, _splice),
)
MUTATIONS = tuple(mutation for weight, mutation in _MUTATIONS for _ in range(weight))


def write_mutated(draw: Draw, image: Image, path: Path) -> None:
    """One to three mutations; checksums are right again."""
    whole = image.whole
    for _ in range(draw.one((1, 1, 1, 2, 3))):
        whole = draw.one(MUTATIONS)(draw, image, whole)
    path.write_bytes(whole)
    reseal(path)
