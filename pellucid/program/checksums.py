"""The checksums at the end of a program file: a CRC-32 for each MiB before them.

A file is its content, C bytes, a multiple of 64; then a u32 for each begun MiB of the content, in order; then a u32 over these. All
are CRC-32 as gzip and PNG have it, little endian. The size of the file alone says where they begin. They find what disks,
memory and cut copies do to a file; they are no defence against somebody who means to change it.

`csrc/src/checksums.cpp` reads them too.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from pellucid.errors import WeightFormatError

BLOCK_BYTES = 1 << 20
_CRC_BYTES = 4
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def num_blocks(content_bytes: int) -> int:
    """How many blocks have a checksum."""
    return -(-content_bytes // BLOCK_BYTES)


def table_bytes(content_bytes: int) -> int:
    """Bytes of the checksums of so much content."""
    return _CRC_BYTES * (num_blocks(content_bytes) + 1)


def content_bytes(file_bytes: int) -> int | None:
    """Bytes of the content of a file; None when no file has that size."""
    blocks = -(-(file_bytes - _CRC_BYTES) // (BLOCK_BYTES + _CRC_BYTES))
    content = file_bytes - _CRC_BYTES * (blocks + 1)
    return content if content > 0 and num_blocks(content) == blocks and content % 64 == 0 else None


class Checksums:
    """Checksums that are taken while the content is made, in order, so that it is read while it is still at hand."""

    def __init__(self, content: Bytes) -> None:
        self._content, self._sums = content, list[int]()

    def advance(self, final: int) -> None:
        """The first `final` bytes of the content will not change any more."""
        while (len(self._sums) + 1) * BLOCK_BYTES <= final:
            self._add()

    def finish(self) -> bytes:
        """The table, now that all of the content is final."""
        while len(self._sums) < num_blocks(self._content.nbytes):
            self._add()
        table = np.array(self._sums, "<u4").tobytes()
        return table + zlib.crc32(table).to_bytes(_CRC_BYTES, "little")

    def _add(self) -> None:
        begin = len(self._sums) * BLOCK_BYTES
        self._sums.append(zlib.crc32(self._content[begin : begin + BLOCK_BYTES].data))


def first_bad_block(descriptor: int, end: int | None = None) -> int | None:
    """The first block of an open file that differs from its checksum or cannot be read; with `end`, of those that begin before
    it. The table counts as the block behind the last.

    It is read by its descriptor, not through a mapping: these are the same pages, but one that cannot be read is no signal.

    Raises:
        ValueError: no file has this size.
    """
    file_bytes = os.fstat(descriptor).st_size
    size = content_bytes(file_bytes)
    if size is None:
        raise ValueError(f"a file of {file_bytes:,} bytes has no checksums: it was cut, or something was added")
    table = _read(descriptor, size, file_bytes - size)
    if len(table) != file_bytes - size or zlib.crc32(table[:-_CRC_BYTES]) != int.from_bytes(
        table[-_CRC_BYTES:], "little"
    ):
        return num_blocks(size)
    sums = np.frombuffer(table, "<u4")
    for block in range(num_blocks(size if end is None else min(end, size))):
        begin = block * BLOCK_BYTES
        if zlib.crc32(_read(descriptor, begin, min(BLOCK_BYTES, size - begin))) != sums[block]:
            return block
    return None


def _read(descriptor: int, begin: int, count: int) -> bytes:
    """What can be read of it."""
    try:
        return os.pread(descriptor, count, begin)
    except OSError:
        return b""


def reseal(path: str | os.PathLike[str]) -> None:
    """Writes the checksums of a file anew, for tests and fuzzers that have changed it: what they changed is then what is read.

    The file may say whatever it likes; only its size counts. One that was cut or lengthened gets zeros up to the next size
    that a file can have.

    Raises:
        WeightFormatError: it is empty.
    """
    path = Path(path)
    whole = path.read_bytes()
    size = content_bytes(len(whole))
    content = whole if size is None else whole[:size]
    if not content:
        raise WeightFormatError(f"{path.name}: an empty file has no checksums")
    content += bytes(-len(content) % 64)
    path.write_bytes(content + Checksums(np.frombuffer(content, np.uint8)).finish())
