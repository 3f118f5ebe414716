"""The frame of a fuzzer: numbered cases in a worker process, watched by a parent that reports crashes and hangs as findings.

A case depends on the seed and its own number alone, so that one case can be run again. The worker writes the number of the case at
hand, and what it has counted, into a file that both processes have mapped: after a crash the parent knows where it was and goes on
behind it with a new worker.

Exit status: 0 nothing was found, 1 something was found, 2 the options are wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

CLEAN, FOUND = 0, 1
_POLL_SECONDS = 0.05
_START_SECONDS = 120.0  # beside the time of the first case: imports, programs that are packed
_LAST_LINES = 25
_MAX_COUNT = 2**62


class FindingError(Exception):
    """An oracle disagrees. `calls` tells what was called, the last one last."""

    def __init__(self, text: str, calls: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.calls = list(calls)


class Tally:
    """Counters that outlive the process that counts: int64 numbers in a mapped file."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.names = ("case", "beats", "cases", *names)
        size = 8 * len(self.names)
        with open(path, "r+b") as file:
            file.truncate(size)
            self._memory = mmap.mmap(file.fileno(), size)
        self.numbers = (ctypes.c_int64 * len(self.names)).from_buffer(self._memory)
        self.place = {name: index for index, name in enumerate(self.names)}

    def add(self, name: str, count: int = 1) -> None:
        """Counts."""
        self.numbers[self.place[name]] += count

    def get(self, name: str) -> int:
        """A counter."""
        return int(self.numbers[self.place[name]])

    def begin(self, case: int) -> None:
        """A case begins."""
        self.numbers[0] = case
        self.numbers[1] += 1


class Cases(Protocol):
    """What runs the cases in a worker."""

    def run(self, case: int) -> None:
        """Runs one case.

        Raises:
            FindingError: what is wrong.
        """

    def close(self) -> None:
        """Frees what the cases share."""


@dataclass(frozen=True)
class Fuzzer:
    """A fuzzer's word about itself. `counters` are summed up in the summary; `plants` are faults to be found: name -> what it does."""

    script: Path
    description: str
    counters: Sequence[str]
    plants: dict[str, str]
    start: Callable[[argparse.Namespace, Tally], Cases]
    summary: Callable[[dict[str, int]], str]
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    # Writes a file that reproduces a case without the fuzzer; and the file's suffix.
    write_artefact: Callable[[argparse.Namespace, int, Path], object] | None = None
    suffix: str = ""


@dataclass(frozen=True)
class Found:
    """A finding, as it is told."""

    case: int
    kind: str
    text: str
    calls: Sequence[str]


def main(fuzzer: Fuzzer, arguments: Sequence[str] | None = None) -> int:
    """Runs a fuzzer; gives the exit status."""
    options = _parser(fuzzer).parse_args(arguments)
    return _work(fuzzer, options) if options.worker else _Parent(fuzzer, options).run()


def _parser(fuzzer: Fuzzer) -> argparse.ArgumentParser:
    plants = "".join(f"\n  {name}: {text}" for name, text in fuzzer.plants.items())
    parser = argparse.ArgumentParser(
        description=f"{fuzzer.description}\n\nplanted faults, each of which must be found:{plants}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="number of the first case (default %(default)s)")
    parser.add_argument("--count", type=int, default=_MAX_COUNT, help="cases to run (default: until the time is over)")
    parser.add_argument("--seconds", type=float, help="time budget (default: 60, or none with --count)")
    parser.add_argument("--hang-seconds", type=float, default=60.0, help="a case that takes longer hangs")
    parser.add_argument("--max-findings", type=int, default=5, help="stop behind so many (default %(default)s)")
    parser.add_argument("--keep", type=Path, help="folder for files that reproduce findings")
    parser.add_argument("--plant", choices=list(fuzzer.plants), help="plant a fault that must be found")
    parser.add_argument("--verbose", action="store_true", help="print every call before it is made")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    fuzzer.add_options(parser)
    return parser


# ---- the worker ----------------------------------------------------------------------------------------------------


def _work(fuzzer: Fuzzer, options: argparse.Namespace) -> int:
    """Runs cases until the budget is spent; findings go to a file, a line each."""
    faulthandler.enable()
    tally = Tally(options.worker / "tally", fuzzer.counters)
    tally.begin(options.start)  # the first beat: the worker starts
    cases = fuzzer.start(options, tally)
    end = time.monotonic() + options.seconds
    found = 0
    with open(options.worker / "findings", "a") as findings:
        for case in range(options.start, options.start + options.count):
            if time.monotonic() >= end or found >= options.max_findings:
                break
            tally.begin(case)
            told = _run_case(cases, case)
            tally.add("cases")
            if told is not None:
                found += 1
                print(json.dumps(told), file=findings, flush=True)
    cases.close()
    return CLEAN


def _run_case(cases: Cases, case: int) -> dict[str, object] | None:
    try:
        cases.run(case)
    except FindingError as finding:
        return {"case": case, "kind": "wrong", "text": str(finding), "calls": finding.calls}
    except Exception:
        return {"case": case, "kind": "untyped error", "text": traceback.format_exc(), "calls": []}
    return None


# ---- the parent ----------------------------------------------------------------------------------------------------


class _Parent:
    """Starts workers one after the other and tells what they found."""

    def __init__(self, fuzzer: Fuzzer, options: argparse.Namespace) -> None:
        self._fuzzer, self._options = fuzzer, options
        if options.seconds is None:
            options.seconds = 60.0 if options.count == _MAX_COUNT else 1e9
        self._totals = dict.fromkeys(("cases", *fuzzer.counters), 0)
        self._found: list[Found] = []

    def run(self) -> int:
        """Until the budget is spent, or enough was found."""
        options, began = self._options, time.monotonic()
        start, end = options.start, options.start + options.count
        while start < end and len(self._found) < options.max_findings:
            left = options.seconds - (time.monotonic() - began)
            if left <= 0:
                break
            with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
                start = self._watch(Path(folder), start, end - start, left)
        seconds = time.monotonic() - began
        speed = self._totals["cases"] / max(seconds, 1e-9)
        print(
            f"{self._fuzzer.script.name}: seed {options.seed}, {self._totals['cases']:,} cases from {options.start:,}, "
            f"{self._fuzzer.summary(self._totals)}, {seconds:.1f} s, {speed:,.0f} cases/s, {len(self._found)} findings",
            flush=True,
        )
        return FOUND if self._found else CLEAN

    def _watch(self, folder: Path, start: int, count: int, seconds: float) -> int:
        """One worker; the case behind its last."""
        (folder / "tally").touch()
        (folder / "findings").touch()
        tally = Tally(folder / "tally", self._fuzzer.counters)
        limit = self._options.max_findings - len(self._found)
        process, ended = self._run_worker(folder, start, count, seconds, limit, tally)
        for line in (folder / "findings").read_text().splitlines():
            self._tell(Found(**json.loads(line)))
        for name in self._totals:
            self._totals[name] += tally.get(name)
        if process == 0:
            return start + count
        case = tally.get("case")
        self._totals["cases"] += 1
        log = (folder / "output").read_text(errors="replace")
        self._tell(Found(case, ended or _how_ended(process), log[-12000:], self._last_calls(case)))
        return case + 1

    def _run_worker(
        self, folder: Path, start: int, count: int, seconds: float, limit: int, tally: Tally, *more: str
    ) -> tuple[int, str]:
        """The exit status, and why the parent ended it."""
        with open(folder / "output", "wb") as output:
            command = self._command(start, count, seconds, limit, folder, *more)
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            beats, since = -1, time.monotonic()
            while True:
                try:
                    return process.wait(_POLL_SECONDS), ""
                except subprocess.TimeoutExpired:
                    pass
                if tally.get("beats") != beats:
                    beats, since = tally.get("beats"), time.monotonic()
                elif time.monotonic() - since > self._options.hang_seconds + (_START_SECONDS if beats < 2 else 0.0):
                    process.send_signal(signal.SIGABRT)  # so that its stack is told
                    try:
                        process.wait(10)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()
                    return -signal.SIGABRT, f"hang: no end after {self._options.hang_seconds:g} s"

    def _command(self, start: int, count: int, seconds: float, limit: int, folder: Path, *more: str) -> list[str]:
        options = {**vars(self._options), "start": start, "count": count, "seconds": seconds, "max_findings": limit}
        options = {**options, "worker": folder}
        words = [sys.executable, str(self._fuzzer.script)]
        for name, value in options.items():
            if isinstance(value, bool):
                words += [_flag(name)] if value else []
            elif value is not None:
                words += [_flag(name), str(value)]
        return [*words, *more]

    def _last_calls(self, case: int) -> list[str]:
        """The case once more, alone, with every call told before it is made."""
        with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
            folder = Path(name)
            (folder / "tally").touch()
            tally = Tally(folder / "tally", self._fuzzer.counters)
            status, _ = self._run_worker(folder, case, 1, 1e9, 1, tally, "--verbose")
            calls = [line for line in (folder / "output").read_text(errors="replace").splitlines() if _is_call(line)]
        return calls if status != 0 else ["(alone it does not fail: run the cases before it as well)", *calls]

    def _tell(self, found: Found) -> None:
        self._found.append(found)
        print(f"---- case {found.case}: {found.kind}")
        for call in found.calls[-_LAST_LINES:]:
            print(f"  {call}")
        print(found.text.rstrip())
        plant = f" --plant {self._options.plant}" if self._options.plant else ""
        print(
            f"again: python {_shown(self._fuzzer.script)} --seed {self._options.seed} --start {found.case} --count 1{plant}"
        )
        if self._options.keep is not None and self._fuzzer.write_artefact is not None:
            self._options.keep.mkdir(parents=True, exist_ok=True)
            target = self._options.keep / f"seed-{self._options.seed}-case-{found.case}{self._fuzzer.suffix}"
            self._fuzzer.write_artefact(self._options, found.case, target)
            print(f"kept: {target}")
        sys.stdout.flush()


def _is_call(line: str) -> bool:
    return line.startswith(("pld_", "# "))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(script: Path) -> str:
    return os.path.relpath(script, Path.cwd()) if script.is_relative_to(Path.cwd()) else str(script)


def _how_ended(status: int) -> str:
    if status >= 0:
        return f"crash: exit status {status}"
    try:
        return f"crash: {signal.Signals(-status).name}"
    except ValueError:
        return f"crash: signal {-status}"
