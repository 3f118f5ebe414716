#!/usr/bin/env python3
"""Runs every campaign in this folder, one behind the other, within given budgets, and tells how each ended.

    python scripts/campaigns/all.py                        # the full counts: hours
    python scripts/campaigns/all.py --seconds 120          # each for two minutes
    python scripts/campaigns/all.py --plants --seconds 60  # each once with every fault that it can plant

Every `soak*.py`, `storm*.py` and `fuzz_*.py` here is a campaign: a new one takes part by itself. Exit status: 0 when each ended as it
should, 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
_PATTERNS = ("soak*.py", "fuzz_*.py", "storm*.py")
# What a script is asked for where it would stop by itself too early: script -> requests, sequences or files.
_COUNTS = {"fuzz_core.py": 100_000, "fuzz_files.py": 200_000}
# Runs beside the first one: script -> options.
_FURTHER: dict[str, tuple[tuple[str, ...], ...]] = {"soak.py": (("--model", "smollm2", "--count", "1000"),)}
_FOUND, _CLEAN = 1, 0


@dataclass(frozen=True)
class Run:
    """A command, and the exit status that it should have."""

    script: str
    options: tuple[str, ...]
    expected: int

    def __str__(self) -> str:
        return " ".join((self.script, *self.options))


def scripts(names: Sequence[str]) -> list[str]:
    """The campaigns that there are, or those that were named."""
    found = [path.name for pattern in _PATTERNS for path in sorted(FOLDER.glob(pattern))]
    unknown = sorted(set(names) - set(found))
    if unknown:
        raise SystemExit(f"unknown campaign {unknown[0]!r}; there are {', '.join(found)}")
    return [name for name in found if not names or name in names]


def help_of(script: str) -> str:
    """What a script says of its options."""
    command = [sys.executable, str(FOLDER / script), "--help"]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "999"}
    ).stdout


def plants_of(script: str) -> list[str]:
    """The faults that a script can plant: it names them when it is asked for one that it has not."""
    command = [sys.executable, str(FOLDER / script), "--plant", "?"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    found = re.search(r"argument --plant: invalid choice.*?\(choose from (.*)\)", said)
    return [] if found is None else re.findall(r"[\w-]+", found[1])


def runs(options: argparse.Namespace) -> Iterator[Run]:
    """What is to be run."""
    for script in scripts(options.only):
        shared = ["--seed", str(options.seed)]
        if options.seconds:
            shared += ["--seconds", str(options.seconds)]
        elif script in _COUNTS:
            shared += ["--count", str(_COUNTS[script])]
        if options.plants:
            for plant in plants_of(script):
                yield Run(script, (*shared, "--plant", plant, *_patience(script, plant)), _FOUND)
            continue
        going = ("--keep-going",) if options.keep_going and "--keep-going" in help_of(script) else ()
        for further in ((), *_FURTHER.get(script, ())):
            yield Run(script, (*shared, *going, *further), _CLEAN)


def _patience(script: str, plant: str) -> tuple[str, ...]:
    """A hang need not be waited for as long as a case may take."""
    return ("--case-seconds", "30") if plant == "hang" and "--case-seconds" in help_of(script) else ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all; prints each script's own output, then one line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="names of scripts; default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="for each run; default: as many requests as it asks for"
    )
    parser.add_argument("--plants", action="store_true", help="plant each fault that a script knows: all must be found")
    parser.add_argument("--keep-going", action="store_true", help="scripts go on behind findings")
    options = parser.parse_args(arguments)
    lines, is_well = [], True
    for one in runs(options):
        print(f"[run] {one}", flush=True)
        began = time.monotonic()
        status = subprocess.run([sys.executable, str(FOLDER / one.script), *one.options], check=False).returncode
        is_right = status == one.expected
        is_well = is_well and is_right
        lines.append(f"[{'ok' if is_right else 'fail'}] {one}: status {status}, {time.monotonic() - began:,.0f} s")
    print("\n".join(lines) or "[fail] there is no campaign", flush=True)
    return 0 if is_well and lines else 1


if __name__ == "__main__":
    raise SystemExit(main())
