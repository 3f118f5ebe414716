"""Under the address sanitizer: all of a mapped file but its weights is poisoned, so that reading anything else is an error."""

from __future__ import annotations

import ctypes
from pathlib import Path

SHORTER = 0  # bytes of each weight that are poisoned too: as if it were read beyond its end
_PROCESS = ctypes.CDLL(None)
_POISON = getattr(_PROCESS, "__asan_poison_memory_region", None)
_UNPOISON = getattr(_PROCESS, "__asan_unpoison_memory_region", None)
for _function in (_POISON, _UNPOISON):
    if _function is not None:
        _function.argtypes, _function.restype = [ctypes.c_void_p, ctypes.c_size_t], None


class Fences:
    """Around the weights of one mapping of a file, until it is closed. `weights`: (offset in the file or address, bytes)."""

    def __init__(self, path: Path, weights: list[tuple[int, int]]) -> None:
        self._ranges: list[tuple[int, int]] = []
        if _POISON is None:
            return
        begin, end = _mapping_of(path)
        weights = [(at if at >= begin else begin + at, max(0, count - SHORTER)) for at, count in weights]
        for at, count in sorted(weights):
            if at > begin:
                self._ranges.append((begin, at - begin))
            begin = max(begin, at + count)
        if end > begin:
            self._ranges.append((begin, end - begin))
        for at, count in self._ranges:
            _POISON(at, count)

    def close(self) -> None:
        """All may be read again."""
        for at, count in self._ranges:
            _UNPOISON(at, count)
        self._ranges.clear()


def _mapping_of(path: Path) -> tuple[int, int]:
    """[begin, end) of the newest mapping of a file; empty when there is none."""
    found = (0, 0)
    with open("/proc/self/maps") as lines:
        for line in lines:
            if line.rstrip().endswith(str(path)):
                begin, _, end = line.split(" ", 1)[0].partition("-")
                found = (int(begin, 16), int(end, 16))
    return found
