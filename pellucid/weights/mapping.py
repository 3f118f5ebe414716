"""Files as bytes: read-only mappings, and the check that spans of a file do not overlap."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pellucid.errors import ModelNotFoundError, shown
from pellucid.weights.json_files import GIT_LFS_POINTER, format_error, refuse_pointer, unreadable


def map_file(path: Path) -> NDArray[np.uint8]:
    """The file's bytes as a read-only mapped uint8 array that keeps the mapping alive.

    Raises ModelNotFoundError when there is no such regular file, WeightFormatError when it is empty.
    """
    try:
        if not path.is_file():
            raise ModelNotFoundError(f"no weight file at {path}")
        with path.open("rb") as file:
            size = path.stat().st_size
            if size == 0:
                raise format_error(path, "file size", 0, "it must not be empty")
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ModelNotFoundError:
        raise
    except OSError as error:
        raise unreadable(path, error) from None
    refuse_pointer(path, mapping[: len(GIT_LFS_POINTER)])
    return np.frombuffer(mapping, dtype=np.uint8)


def check_spans(path: Path, spans: list[tuple[int, int, str]], *, contiguous_to: int | None = None) -> None:
    """Refuses overlapping (begin, end, name) spans; with `contiguous_to`, also any gap between 0 and that end."""
    position = 0
    last = "the start"
    for begin, end, name in sorted(spans):
        if begin < position:
            raise format_error(
                path, f"begin of tensor {shown(name)}", begin, f"it overlaps {shown(last)}, which ends at {position}"
            )
        if contiguous_to is not None and begin != position:
            raise format_error(path, f"begin of tensor {shown(name)}", begin, f"there is a gap after {position}")
        position, last = end, name
    if contiguous_to is not None and position != contiguous_to:
        raise format_error(path, "end of the last tensor", position, f"the data section has {contiguous_to} bytes")
