"""The packed program on disk: one file that is mapped at the next start.

Layout, little endian: magic `PLDPROG4`; u64 length of the header; the index that the core reads (offset and length in the file of plan,
ops, buffers, weights, data, as u64); header as JSON (what it is, and where its sections lie); sections, each 64-byte aligned: plan, ops,
buffers, weights (as the C structs), texts (JSON documents such as the tokenizer), data (packed weights, then the SHA-256 of each);
checksums of all that (`program/checksums.py`).
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pellucid.errors import DamagedFileError, WeightFormatError
from pellucid.files import hold, identity, make_folder, storage_errors, whole_file
from pellucid.program.checksums import BLOCK_BYTES, Bytes, Checksums, content_bytes, first_bad_block, table_bytes

MAGIC = b"PLDPROG4"
_OLD_MAGIC = b"PLDPROG"  # of any version
INDEXED = ("plan", "ops", "buffers", "weights", "data")
_START = len(MAGIC) + 8 + 16 * len(INDEXED)  # of the JSON header
ALIGNMENT = 64
MAX_HEADER_BYTES = 16 * 2**20
MAX_TEXT_BYTES = 256 * 2**20


def aligned(offset: int) -> int:
    """The next multiple of the alignment."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class ProgramFile:
    """A mapped program. `sections` are views of the file; `meta` is its header.

    The file is held as long as a view lives: nobody who tidies up removes it (`pellucid/files.py`).
    """

    path: Path
    meta: dict[str, Any]
    sections: dict[str, Bytes]
    identity: tuple[int, int]  # device and number of the mapped file, whatever is at `path` by now

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
        except (ValueError, RecursionError) as error:
            raise WeightFormatError(f"{self.path.name}: section {name!r} is not JSON: {error}") from None


def damaged(path: Path, block: int, what_next: str = "") -> DamagedFileError:
    """The error for a block that is not as it was written."""
    return DamagedFileError(
        f"{path.name} is damaged: block {block:,} of 1 MiB, at byte {block * BLOCK_BYTES:,}, differs from its "
        f"checksum{what_next}"
    )


def _index_of(sections: dict[str, tuple[int, int]], base: int) -> bytes:
    """Where the core finds its sections, from the start of the file."""
    places = [(base + sections[name][0], sections[name][1]) if name in sections else (0, 0) for name in INDEXED]
    limit = 2**64
    return b"".join((value % limit).to_bytes(8, "little") for place in places for value in place)


def open_program_file(path: Path) -> ProgramFile:
    """Maps a program file, checks every section against the file's size, and all but the data against its checksums.

    Raises:
        WeightFormatError: the file contradicts its format, or is of another version.
        DamagedFileError: it is not as it was written.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        hold(descriptor)
        whole = _mapped(descriptor, path)
        meta, sections, data_begin = _read(whole, path)
        bad = first_bad_block(descriptor, data_begin)
        if bad is not None:
            raise damaged(path, bad)
        return ProgramFile(path, meta, sections, identity(os.fstat(descriptor)))
    finally:
        os.close(descriptor)  # the mapping has a copy, and with it the lock


def read_meta(path: Path) -> dict[str, Any]:
    """The header of a program file alone. Raises as `open_program_file`, but for checksums, which are not looked at."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _read(_mapped(descriptor, path), path)[0]
    finally:
        os.close(descriptor)


def _mapped(descriptor: int, path: Path) -> Bytes:
    size = os.fstat(descriptor).st_size
    if size < _START:
        raise WeightFormatError(f"{path.name}: {size} bytes are too few for a program file")
    return np.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), np.uint8)


def _read(mapping: Bytes, path: Path) -> tuple[dict[str, Any], dict[str, Bytes], int]:
    """(header, sections, where the data begin)"""
    magic = mapping[: len(MAGIC)].tobytes()
    if magic != MAGIC:
        if magic.startswith(_OLD_MAGIC):
            raise WeightFormatError(
                f"{path.name}: a program of another version ({magic.decode(errors='replace')}; this one reads "
                f"{MAGIC.decode()}): compile the model again"
            )
        raise WeightFormatError(f"{path.name}: no program file (wrong magic)")
    start, content = _START, content_bytes(mapping.nbytes)
    size = mapping.nbytes - table_bytes(mapping.nbytes) if content is None else content
    length = int.from_bytes(mapping[len(MAGIC) : len(MAGIC) + 8].tobytes(), "little")
    if length > min(size - start, MAX_HEADER_BYTES):
        raise WeightFormatError(f"{path.name}: header of {length:,} bytes; the file has {size:,}")
    try:
        meta = json.loads(mapping[start : start + length].tobytes())
        table = {str(name): (int(at), int(n)) for name, (at, n) in meta["sections"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise WeightFormatError(f"{path.name}: the header is damaged: {error}") from None
    base = aligned(start + length)
    sections = {}
    for name, (offset, count) in table.items():
        if offset < 0 or count < 0 or base + offset + count > size or offset % ALIGNMENT:
            raise WeightFormatError(f"{path.name}: section {name!r} [{offset}, +{count}] lies outside {size:,} bytes")
        sections[name] = mapping[base + offset : base + offset + count]
    if mapping[len(MAGIC) + 8 : start].tobytes() != _index_of(table, base):
        raise WeightFormatError(f"{path.name}: the index and the header say different things")
    if content is None:
        raise WeightFormatError(
            f"{path.name}: {mapping.nbytes:,} bytes are no size of a program file: it was cut, or something was added"
        )
    return meta, sections, base + table["data"][0] if "data" in table else size


def write_program_file(
    path: Path,
    meta: dict[str, Any],
    small: dict[str, bytes],
    data_bytes: int,
    fill_data: Callable[[Bytes], Iterable[int] | None],
) -> None:
    """Writes a program file whole or not at all.

    `fill_data` gets the mapped data section ([data_bytes], zero) and packs the weights straight into the file. What it yields, if
    anything, says how many bytes from the start are final: their checksums are taken while they are at hand.

    Raises:
        StorageError: the file cannot be written. Room for all of it is reserved first (`posix_fallocate`): a full disk is told before
            the first weight is packed, and is no signal later.
    """
    sections, offset = {}, 0
    for name, content in [*small.items(), ("data", None)]:
        length = data_bytes if content is None else len(content)
        sections[name] = (offset, length)
        offset = aligned(offset + length)
    header = json.dumps({**meta, "sections": sections}).encode()
    base = aligned(_START + len(header))
    content_end = base + offset
    size = content_end + table_bytes(content_end)
    make_folder(path.parent)
    with whole_file(path, size) as file:
        mapping = mmap.mmap(file.fileno(), size)
        whole: Bytes = np.frombuffer(mapping, np.uint8)
        _put(whole, 0, MAGIC + len(header).to_bytes(8, "little") + _index_of(sections, base) + header)
        for name, content in small.items():
            _put(whole, base + sections[name][0], content)
        data_begin = base + sections["data"][0]
        checksums = Checksums(whole[:content_end])
        for final in fill_data(whole[data_begin : data_begin + data_bytes]) or ():
            checksums.advance(data_begin + final)
        _put(whole, content_end, checksums.finish())
        with storage_errors(path, size):
            mapping.flush()


def _put(whole: Bytes, at: int, content: bytes) -> None:
    whole[at : at + len(content)] = np.frombuffer(content, np.uint8)
