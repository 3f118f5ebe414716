"""`TraceReader`: the lines of a trace, checked and in order, one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from msgspec.structs import replace

from pellucid.errors import TraceError
from pellucid.trace.file import NUM_PARTS, part_path
from pellucid.trace.lines import FORMAT, MAX_LINE_BYTES, EndLine, Header, Line, StepLine, decode


class Placed(NamedTuple):
    """A line and where it stands."""

    place: str  # as an error names it: file and line
    line: Line


class TraceReader:
    """A trace in all its parts, the oldest first. `lines()` reads it from the beginning, as often as it is called.

    A last line that is cut off is left out: a process that died, or a disk that was full, leaves one. `end` tells how the
    reading ended.

    Raises:
        TraceError: the file cannot be opened or does not begin with the header of a trace that this version reads.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.header, self._parts = _parts_of(self.path)
        self.is_whole = self.header.part == 0  # nothing was lost at the beginning
        self.end = "it was not read yet"

    def lines(self) -> Iterator[Placed]:
        """All lines but headers; `waiting` and `running` of steps are whole.

        Raises:
            TraceError: a line is none, or stands where it cannot; the text names the file and the line.
        """
        order = _Order()
        self.end = "it has no end line: the engine still runs, or it died"
        for index, part in enumerate(self._parts):
            is_last = index == len(self._parts) - 1
            with _opened(part) as file:
                yield from self._lines_of(file, part, order, is_last)

    def last_step(self) -> int:
        """The number of the newest step, from the ends of the files; 0 when there is none."""
        return next((step for part in reversed(self._parts) if (step := _last_step_of(part)) is not None), 0)

    def _lines_of(self, file: BinaryIO, part: str, order: _Order, is_last: bool) -> Iterator[Placed]:
        number = 0
        while text := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            place = f"{os.path.basename(part)} line {number:,}"
            if not text.endswith(b"\n"):
                if len(text) > MAX_LINE_BYTES:
                    raise TraceError(f"{place}: it is longer than {MAX_LINE_BYTES:,} bytes")
                if not is_last:
                    raise TraceError(f"{place}: it is cut off, and another part follows")
                self.end = f"{place} is cut off"
                return
            if number > 1:  # the header was read before
                yield Placed(place, self._checked(place, text, order))

    def _checked(self, place: str, text: bytes, order: _Order) -> Line:
        try:
            line = order.check(decode(text))
        except TraceError as error:
            raise TraceError(f"{place}: {error}") from None
        if isinstance(line, EndLine):
            self.end = ""
        return line


class _Order:
    """What lines say of their place, and the queues that a step leaves out."""

    def __init__(self) -> None:
        self._turn, self._step = 0, -1
        self._has_ended = False
        self._waiting: list[str] = []
        self._running: list[str] = []

    def check(self, line: Line) -> Line:
        """The line with whole queues. Raises `TraceError` when it cannot stand here."""
        if self._has_ended:
            raise TraceError("it stands behind the end of the trace")
        if isinstance(line, Header):
            raise TraceError("it is a second header")
        if line.turn < self._turn:
            raise TraceError(f"it belongs to turn {line.turn:,}, but turn {self._turn:,} stands before it")
        self._turn = line.turn
        self._has_ended = isinstance(line, EndLine)
        return self._whole(line) if isinstance(line, StepLine) else line

    def _whole(self, line: StepLine) -> StepLine:
        if line.step <= self._step:
            raise TraceError(f"it is step {line.step:,}, but step {self._step:,} stands before it")
        self._step = line.step
        self._waiting = self._waiting if line.waiting is None else line.waiting
        self._running = self._running if line.running is None else line.running
        return replace(line, waiting=self._waiting, running=self._running)


def _parts_of(path: str) -> tuple[Header, list[str]]:
    """The header of the oldest part that is there, and all parts from it on."""
    header, parts = _header_of(path), [path]
    for number in range(1, NUM_PARTS):
        if header.part == 0 or not os.path.exists(part_path(path, number)):
            break
        older = _header_of(part_path(path, number))
        if older.run != header.run or older.part != header.part - 1:
            break  # of another trace, that was written to the same name before
        header = older
        parts.insert(0, part_path(path, number))
    return header, parts


def _header_of(path: str) -> Header:
    name = os.path.basename(path)
    with _opened(path) as file:
        text = file.readline(MAX_LINE_BYTES + 1)
    if not text:
        raise TraceError(f"{name} is empty; a trace begins with a header")
    try:
        line = decode(text)
    except TraceError as error:
        raise TraceError(f"{name} line 1: it is no header of a trace: {error}") from None
    if not isinstance(line, Header):
        raise TraceError(f"{name} line 1: a trace begins with a header; this is a {line.__struct_config__.tag}")
    if line.format != FORMAT:
        raise TraceError(f"{name} is a trace of format {line.format}; this version reads format {FORMAT}")
    return line


def _opened(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from None


def _last_step_of(path: str) -> int | None:
    with _opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        for reach in (1 << 16, 1 << 20, MAX_LINE_BYTES):
            file.seek(max(0, size - reach))
            steps = [line.step for line in map(_try_decode, file.readlines()) if isinstance(line, StepLine)]
            if steps:
                return steps[-1]
    return None


def _try_decode(text: bytes) -> Line | None:
    try:
        return decode(text)
    except TraceError:
        return None
