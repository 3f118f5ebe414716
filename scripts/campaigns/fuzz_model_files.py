#!/usr/bin/env python3
"""Damages every kind of file that a user may hand over, and opens it: it must open, or get a typed error that says which file it was.

    python scripts/campaigns/fuzz_model_files.py --seconds 120
    python scripts/campaigns/fuzz_model_files.py --seed 7 --kind config.json --only 37     # one case again, with its traceback

Cases are tried in a process whose memory is limited; one that crashes or hangs is followed by another one. Exits with 1 and the line
that makes each finding again when there is an untyped error, a crash or a hang. Needs the test extra.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(_ROOT / "tests"))

from utils.children import child  # noqa: E402
from utils.file_mutations import KIND_NAMES  # noqa: E402

STALL_SECONDS = 90.0  # a case ends itself after 20 s; behind this it hangs in code that no signal reaches
START_SECONDS = 300.0  # a worker imports torch, and makes its models when it first needs them
EXTRA_BYTES = 2 << 30  # more memory than any case needs
CASES_A_TURN = 50  # of one kind; then it is the next one's turn


@dataclass
class Found:
    """What became of the cases of all kinds."""

    outcomes: Counter[str] = field(default_factory=Counter)  # opened, refused, untyped, crash, hang
    kinds: set[str] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)

    def add(self, outcome: str, kind: str, text: str) -> None:
        """Notes a case; what must not be is shown at once."""
        self.outcomes[outcome] += 1
        self.kinds.add(kind)
        if outcome == "refused":
            self.texts.add(text)
        elif outcome != "opened":
            print(f"{outcome}: {text}", flush=True)

    @property
    def has_problems(self) -> bool:
        """True when there is an untyped error, a crash or a hang, or nothing was tried."""
        return not self.outcomes or any(self.outcomes[name] for name in ("untyped", "crash", "hang"))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--count", type=int, help="cases of each kind; by default 200, or with --seconds until time is up"
    )
    parser.add_argument("--seconds", type=float, help="time for all kinds together")
    parser.add_argument(
        "--kind", action="append", choices=KIND_NAMES, help="may be given more than once; all by default"
    )
    parser.add_argument("--only", type=int, help="this case alone, in this process, with its traceback")
    parser.add_argument("--plant", choices=PLANTS, help="a fault that must be found: to try the fuzzer itself")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)  # the first case to try, a folder
    options = parser.parse_args(arguments)
    options.kind = options.kind or list(KIND_NAMES)
    if options.count is None:
        options.count = 200 if options.seconds is None else 10**9
    return options


def cases(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """(kind, index) of all cases, kinds in turn."""
    for first in range(0, options.count, CASES_A_TURN):
        for kind in options.kind:
            for index in range(first, min(first + CASES_A_TURN, options.count)):
                yield kind, index


# ---- the campaign -----------------------------------------------------------------------------------------------------


def campaign(options: argparse.Namespace, arguments: list[str]) -> Found:
    """All cases, or as many as there is time for."""
    found, tried = Found(), 0
    end = time.monotonic() + (options.seconds if options.seconds is not None else 10**9)
    with tempfile.TemporaryDirectory(prefix="pellucid-fuzz-files-", ignore_cleanup_errors=True) as folder:
        while tried is not None and time.monotonic() < end:
            command = [sys.executable, __file__, *arguments, "--worker", str(tried), folder]
            with child(command, seconds=max(1.0, end - time.monotonic()) + START_SECONDS, stderr=None) as process:
                tried = follow(process, options, tried, end, found)
    return found


def follow(process: Any, options: argparse.Namespace, tried: int, end: float, found: Found) -> int | None:
    """Books what a worker says; the case to go on with when it crashed or hung, None when all is done or time is up."""
    kind, index, is_open = "", 0, False
    for line in lines_of(process.stdout.fileno(), end):
        message = json.loads(line)
        if message == "done":
            return None
        if is_open := "outcome" not in message:
            kind, index, tried = message["kind"], message["index"], tried + 1
        else:
            found.add(message["outcome"], kind, message["text"])
    if time.monotonic() >= end:
        return None
    status = status_of(process)
    if not is_open:
        raise SystemExit(f"a worker ended with status {status} before it tried a case")
    outcome, how = ("hang", f"silent for {STALL_SECONDS:.0f} s") if status is None else ("crash", f"status {status}")
    found.add(outcome, kind, f"{kind}, --seed {options.seed} --only {index}: {how}")
    return tried


def status_of(process: Any) -> int | None:
    """The exit status of a process that ends within a moment; None when it does not."""
    deadline = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return process.returncode  # type: ignore[no-any-return]


def lines_of(descriptor: int, end: float) -> Iterator[bytes]:
    """Lines as they come, until the end, or until none has come for too long."""
    left, patience = b"", START_SECONDS
    while select.select([descriptor], [], [], max(0.0, min(patience, end - time.monotonic())))[0]:
        more = os.read(descriptor, 65_536)
        if not more:
            return
        *whole, left = (left + more).split(b"\n")
        yield from whole
        patience = STALL_SECONDS


# ---- a worker ---------------------------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Tries cases and says on standard output which one is tried, and what became of it."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print

    def tell(message: Any) -> None:
        told.write(json.dumps(message) + "\n")
        told.flush()

    from utils.file_kinds import UntypedError

    first, folder = int(options.worker[0]), Path(options.worker[1])
    trying = quiet_kinds(options, Path(tempfile.mkdtemp(dir=folder)))
    limit = memory_bytes() + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    for number, (kind, index) in enumerate(cases(options)):
        if number < first:
            continue
        tell({"kind": kind, "index": index})
        try:
            text = trying(kind, index)
            tell({"outcome": "refused" if text else "opened", "text": text})
        except UntypedError as error:
            tell({"outcome": "untyped", "text": str(error)[:600]})
    tell("done")


def quiet_kinds(options: argparse.Namespace, folder: Path) -> Callable[[str, int], str]:
    """Tries (kind, index) and gives the text of the typed error, if there was one. Kinds are made when they are first asked for."""
    import transformers
    from utils.file_kinds import KINDS, Counts, FileKind, Makers, check

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    os.environ["PELLUCID_CACHE"] = str(folder / "cache")
    makers, made = Makers(folder), dict[str, FileKind]()

    def trying(name: str, index: int) -> str:
        if name not in made:
            kind = KINDS[name](makers)
            made[name] = replace(kind, open=planted(kind.open, PLANTS[options.plant])) if options.plant else kind
        counts = Counts()
        check(made[name], name, options.seed, index, counts)
        return next(iter(counts.messages), "")

    return trying


def memory_bytes() -> int:
    """The address space in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")


def again(options: argparse.Namespace) -> int:
    """One case in this process."""
    from utils.file_kinds import UntypedError

    with tempfile.TemporaryDirectory(prefix="pellucid-fuzz-files-", ignore_cleanup_errors=True) as folder:
        try:
            text = quiet_kinds(options, Path(folder))(options.kind[0], options.only)
        except UntypedError as error:
            traceback.print_exception(error.__cause__)
            print(error)
            return 1
    print(f"refused: {text}" if text else "opened")
    return 0


# ---- faults that must be found ----------------------------------------------------------------------------------------


def _raise() -> None:
    raise KeyError("planted")


def _hang() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # as code does that never comes back to Python
    time.sleep(3600)


def _take_memory() -> None:
    bytearray(EXTRA_BYTES + (1 << 30))


PLANTS: dict[str, Callable[[], None]] = {"error": _raise, "crash": os.abort, "hang": _hang, "memory": _take_memory}


def planted(opened: Callable[[bytes], object], fault: Callable[[], None]) -> Callable[[bytes], object]:
    """`opened` with a fault that some tenth of all contents bring about."""

    def open_it(content: bytes) -> object:
        if sum(content) % 10 == 0:
            fault()
        return opened(content)

    return open_it


def main(arguments: list[str]) -> int:
    """Exit status: 0 when nothing was found."""
    options = parse(arguments)
    if options.worker is not None:
        work(options)
        return 0
    if options.only is not None:
        return again(options)
    began, found = time.monotonic(), campaign(options, arguments)
    outcomes = found.outcomes
    counts = ", ".join(f"{outcomes[name]} {name}" for name in ("untyped", "crash", "hang"))
    print(
        f"fuzz_model_files: seed {options.seed}, {len(found.kinds)} kinds, {outcomes.total():,} files: {outcomes['opened']:,} opened, "
        f"{outcomes['refused']:,} refused with {len(found.texts):,} texts; {counts}; {time.monotonic() - began:.0f} s"
    )
    return 1 if found.has_problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
