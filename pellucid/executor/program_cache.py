"""`ProgramCache`: packed programs by fingerprint, in one folder that is kept within bounds."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pellucid.errors import StorageError, WeightFormatError
from pellucid.files import is_at, make_folder, remove_parts, remove_unused
from pellucid.program.file import ProgramFile, open_program_file, read_meta

PROGRAM_SUFFIX = ".pld"
_HINT = "; PELLUCID_CACHE names another place for the cache"

_log = logging.getLogger(__name__)


class ProgramCache:
    """Programs under `folder`. Those that were not used for the longest go first when all together have more than `max_bytes`;
    never one that a living process has mapped.

    Raises:
        StorageError: the folder cannot be made.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self._max_bytes = make_folder(folder, _HINT), max_bytes

    def path(self, key: str) -> Path:
        """Where a program lies, or will."""
        return self.folder / f"{key}{PROGRAM_SUFFIX}"

    def open(self, key: str) -> ProgramFile | None:
        """A program, marked as used now; None when there is none. One that is damaged is removed.

        Raises:
            StorageError: it is there and cannot be read.
        """
        path = self.path(key)
        try:
            file = open_program_file(path)
        except FileNotFoundError:
            return None
        except WeightFormatError as error:
            _log.warning("%s; it is packed anew", error)
            path.unlink(missing_ok=True)
            return None
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror or error}{_HINT}") from error
        if not is_at(path, file.identity):  # it was removed before it was held
            return None
        _mark_used(path)
        return file

    def tidy(self, keep: Path) -> None:
        """Removes the parts of packers that were killed, then programs beyond the bound. `keep` stays."""
        remove_parts(self.folder)
        entries = sorted(_entries(self.folder))
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= self._max_bytes:
                return
            if path != keep and remove_unused(path):
                total -= size

    def drop_stale(self, keep: Path, meta: Mapping[str, Any]) -> None:
        """Removes older programs of the same model files and precision: their keys can never be asked for again."""
        precision = ("source", "dtype", "quantization", "keeps")
        for path in self.folder.glob(f"*{PROGRAM_SUFFIX}"):
            if path == keep:
                continue
            try:
                other = read_meta(path)
            except (WeightFormatError, OSError):
                continue
            if all(other.get(name) == meta.get(name) for name in precision):
                remove_unused(path)


def _entries(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """(last used, bytes on the disk, path) of each program."""
    for path in folder.glob(f"*{PROGRAM_SUFFIX}"):
        try:
            status = path.stat()
        except OSError:
            continue
        yield max(status.st_atime_ns, status.st_mtime_ns), status.st_size, path


def _mark_used(path: Path) -> None:
    """By the time of its last access, which few file systems keep by themselves; that of its last change stays."""
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except OSError:  # a cache that may only be read
        return
