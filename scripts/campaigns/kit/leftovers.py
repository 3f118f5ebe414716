"""What may be left behind when work has ended: descriptors, threads, processes, temporary files; and how memory went."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_PATIENCE = 15.0


@dataclass(frozen=True)
class Holdings:
    """What a process holds at a moment."""

    descriptors: int
    threads: int
    children: int

    @classmethod
    def of(cls, pid: int) -> Holdings:
        """Of a process that lives. What nobody refers to any more does not count."""
        if pid == os.getpid():
            gc.collect()
        process = psutil.Process(pid)
        return cls(process.num_fds(), process.num_threads(), len(process.children(recursive=True)))

    def beyond(self, other: Holdings) -> dict[str, str]:
        """Name -> (more, before) of what there is more of."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in ("descriptors", "threads", "children")}
        return {name: f"{now} {name}, {before} before" for name, (now, before) in pairs.items() if now > before}


def left_over(pid: int, before: Holdings) -> dict[str, str]:
    """What a process holds beyond `before` once it had time to let go."""
    end = time.monotonic() + _PATIENCE
    while (found := Holdings.of(pid).beyond(before)) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def open_files(pid: int) -> str:
    """Descriptors by what they are, for a report."""
    folder = Path(f"/proc/{pid}/fd")
    names = []
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):
            names.append(os.readlink(entry))
    return ", ".join(sorted(names))


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Callable[[], list[str]]]:
    """Temporary files of this process and its children go to `folder`; gives what lists those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    before, had = os.environ.get("TMPDIR"), tempfile.tempdir
    os.environ["TMPDIR"], tempfile.tempdir = str(folder), str(folder)
    try:
        yield lambda: sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    finally:
        tempfile.tempdir = had
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


@dataclass
class Memory:
    """Resident bytes of a process and all that it started, sampled as work goes on."""

    pid: int
    samples: list[int] = field(default_factory=list)

    def sample(self) -> None:
        """One more."""
        total = 0
        root = psutil.Process(self.pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        self.samples.append(total)

    def growth(self) -> tuple[float, int, int]:
        """(per cent, bytes in the second quarter, bytes in the last): medians of the samples."""
        count = len(self.samples)
        second, last = _median(self.samples[count // 4 : count // 2]), _median(self.samples[3 * count // 4 :])
        return 100 * (last - second) / second if second else 0.0, second, last


def _median(values: Sequence[int]) -> int:
    return int(statistics.median(values)) if values else 0
