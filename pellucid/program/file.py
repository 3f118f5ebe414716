"""The packed program on disk: one file that is mapped at the next start.

Layout, little endian: magic `PLDPROG2`; u64 length of the header; the index that the core reads (offset and length in the file of plan,
ops, buffers, weights, data, as u64); header as JSON (what it is, and where its sections lie); sections, each 64-byte aligned: plan, ops,
buffers, weights (as the C structs), data (packed weights), texts (JSON documents such as the tokenizer).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pellucid.errors import WeightFormatError

MAGIC = b"PLDPROG2"
INDEXED = ("plan", "ops", "buffers", "weights", "data")
_START = len(MAGIC) + 8 + 16 * len(INDEXED)  # of the JSON header
ALIGNMENT = 64
MAX_HEADER_BYTES = 16 * 2**20
MAX_TEXT_BYTES = 256 * 2**20
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def aligned(offset: int) -> int:
    """The next multiple of the alignment."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class ProgramFile:
    """A mapped program. `sections` are views of the file; `meta` is its header."""

    path: Path
    meta: dict[str, Any]
    sections: dict[str, Bytes]

    def text(self, name: str) -> Any:
        """A JSON document stored beside the program.

        Raises:
            WeightFormatError: it is absent, too long or not JSON.
        """
        section = self.sections.get(name)
        if section is None or section.nbytes > MAX_TEXT_BYTES:
            raise WeightFormatError(f"{self.path.name}: section {name!r} is absent or over {MAX_TEXT_BYTES:,} bytes")
        try:
            return json.loads(section.tobytes())
        except ValueError as error:
            raise WeightFormatError(f"{self.path.name}: section {name!r} is not JSON: {error}") from None


def _index_of(sections: dict[str, tuple[int, int]], base: int) -> bytes:
    """Where the core finds its sections, from the start of the file."""
    places = [(base + sections[name][0], sections[name][1]) if name in sections else (0, 0) for name in INDEXED]
    limit = 2**64
    return b"".join((value % limit).to_bytes(8, "little") for place in places for value in place)


def open_program_file(path: Path) -> ProgramFile:
    """Maps a program file and checks every section against the file's size.

    Raises:
        WeightFormatError: the file contradicts its format.
    """
    size = path.stat().st_size
    if size < _START:
        raise WeightFormatError(f"{path.name}: {size} bytes are too few for a program file")
    mapping: Bytes = np.memmap(path, dtype=np.uint8, mode="r")
    if mapping[: len(MAGIC)].tobytes() != MAGIC:
        raise WeightFormatError(f"{path.name}: no program file (wrong magic)")
    start = _START
    length = int.from_bytes(mapping[len(MAGIC) : len(MAGIC) + 8].tobytes(), "little")
    if length > min(size - start, MAX_HEADER_BYTES):
        raise WeightFormatError(f"{path.name}: header of {length:,} bytes; the file has {size:,}")
    try:
        meta = json.loads(mapping[start : start + length].tobytes())
        table = {str(name): (int(at), int(n)) for name, (at, n) in meta["sections"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightFormatError(f"{path.name}: the header is damaged: {error}") from None
    base = aligned(start + length)
    sections = {}
    for name, (offset, count) in table.items():
        if offset < 0 or count < 0 or base + offset + count > size or offset % ALIGNMENT:
            raise WeightFormatError(f"{path.name}: section {name!r} [{offset}, +{count}] lies outside {size:,} bytes")
        sections[name] = np.asarray(mapping[base + offset : base + offset + count])
    if mapping[len(MAGIC) + 8 : start].tobytes() != _index_of(table, base):
        raise WeightFormatError(f"{path.name}: the index and the header say different things")
    return ProgramFile(path, meta, sections)


def write_program_file(
    path: Path, meta: dict[str, Any], small: dict[str, bytes], data_bytes: int, fill_data: Callable[[Bytes], None]
) -> None:
    """Writes a program file whole or not at all: to a temporary name in the same folder, then renamed.

    `fill_data` gets the mapped data section ([data_bytes], zero) and packs the weights straight into the file.
    """
    sections, offset = {}, 0
    for name, content in [*small.items(), ("data", None)]:
        length = data_bytes if content is None else len(content)
        sections[name] = (offset, length)
        offset = aligned(offset + length)
    header = json.dumps({**meta, "sections": sections}).encode()
    base = aligned(_START + len(header))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w+b") as file:
            _write_small(file, header, base, sections, small)
            file.truncate(base + sections["data"][0] + data_bytes)
            if data_bytes:
                data: Any = np.memmap(
                    file, dtype=np.uint8, mode="r+", offset=base + sections["data"][0], shape=(data_bytes,)
                )
                fill_data(data)
                data.flush()
                del data
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write_small(
    file: BinaryIO, header: bytes, base: int, sections: dict[str, tuple[int, int]], small: dict[str, bytes]
) -> None:
    file.write(MAGIC + len(header).to_bytes(8, "little") + _index_of(sections, base) + header)
    for name, content in small.items():
        file.seek(base + sections[name][0])
        file.write(content)
    file.flush()
