"""Progress of a transfer: a bar with speed and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_EVERY_SECONDS = 5.0
_MEBIBYTE = 2**20

Report = Callable[[int], None]  # bytes done so far, all counted


@contextmanager
def transfer_progress(label: str, total: int | None, *, shown: bool) -> Iterator[Report]:
    """Yields report(bytes done so far). `total` None: unknown. Writes to standard error; nothing when not `shown`."""
    if not shown:
        yield lambda done: None
        return
    if not sys.stderr.isatty():
        yield _lines(label, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)


def _lines(label: str, total: int | None) -> Report:
    """A reporter that prints at the start, every few seconds and at the end."""
    started = last = time.monotonic()
    first: int | None = None

    def report(done: int) -> None:
        nonlocal last, first
        now = time.monotonic()
        if first is not None and now - last < _LINE_EVERY_SECONDS and done != total:
            return
        first, last = done if first is None else first, now
        speed = (done - first) / max(now - started, 1e-9)
        of = f" of {total / _MEBIBYTE:.1f}" if total else ""
        left = f", {(total - done) / speed:.0f} s left" if total and speed and done < total else ""
        rate = f", {speed / _MEBIBYTE:.1f} MiB/s" if speed else ""
        print(f"{label}: {done / _MEBIBYTE:.1f}{of} MiB{rate}{left}", file=sys.stderr, flush=True)

    return report
