"""`TraceFile`: writes the lines of a trace into files of bounded size, and gives up rather than stop the engine."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from msgspec.structs import replace

from pellucid.errors import ConfigError, StorageError
from pellucid.files import LineFile
from pellucid.trace.lines import Header, Line, StepLine, encode

# A trace has at most this many files: FILE, the newest, then FILE.1 and so on, the older the larger the number.
NUM_PARTS = 4

_log = logging.getLogger(__name__)


class TraceFile:
    """Each line is with the operating system when `write` returns, so that a crash of the process loses none.

    When a file has its share of `max_mb` megabytes it is renamed to FILE.1, FILE.1 to FILE.2 and so on; what was the oldest is
    lost. The first failure to write ends the trace, behind its last whole line, with a line in the log and `has_failed`: a full disk
    is no reason to stop serving. Only its owner can read the file, for it holds all prompts.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(self, path: str, max_mb: int, header: Header) -> None:
        self._path, self._limit, self._header = path, max_mb * 1_000_000 // NUM_PARTS, header
        self._file: LineFile | None = None
        self.has_failed = False
        self._waiting: list[str] | None = None
        self._running: list[str] | None = None
        try:
            self._file = _open(path)
        except StorageError as error:
            raise ConfigError(f"trace file {error}") from error
        self._turns = self._file.is_regular  # a pipe or a device has no parts
        self.write(header)

    def write(self, line: Line) -> None:
        """Appends a line. Raises nothing: see above."""
        if self._file is None:
            return
        try:
            text = encode(self._shortened(line))
            if self._turns and self._file.num_bytes and self._file.num_bytes + len(text) > self._limit:
                self._turn_over()
                text = encode(self._shortened(line))
            self._put(text)
        except OSError as error:
            _log.error("the trace ends here: %s", error)
            self.has_failed = True
            self.close()

    def close(self) -> None:
        """Closes the file; harmless when called again."""
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(StorageError):  # what was not written before cannot be written now
                file.close()

    def _put(self, text: bytes) -> None:
        if self._file is not None:
            self._file.write(text)

    def _turn_over(self) -> None:
        """Begins the next file. It says all queues anew."""
        self.close()
        for number in range(NUM_PARTS - 1, 0, -1):
            older = part_path(self._path, number - 1)
            if os.path.exists(older):
                os.replace(older, part_path(self._path, number))
        self._file = _open(self._path)
        self._waiting = self._running = None
        self._header = replace(self._header, part=self._header.part + 1)
        self._put(encode(self._header))

    def _shortened(self, line: Line) -> Line:
        """Queues that are as in the line before are left out: under load they are the most of a line, and rarely change."""
        if not isinstance(line, StepLine):
            return line
        waiting = None if line.waiting == self._waiting else line.waiting
        running = None if line.running == self._running else line.running
        self._waiting, self._running = line.waiting, line.running
        return replace(line, waiting=waiting, running=running)


def part_path(path: str, number: int) -> str:
    """Where the part stands that `number` newer ones have followed."""
    return f"{path}.{number}" if number else path


def _open(path: str) -> LineFile:
    return LineFile(Path(path), mode=0o600)
