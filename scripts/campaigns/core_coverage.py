"""The lines of the core that a script reaches: csrc is built to count them (gcov), the script is run on that build, a table is printed.

    python scripts/campaigns/core_coverage.py scripts/campaigns/fuzz_core.py --seed 1 --count 2000
    python scripts/campaigns/core_coverage.py --missed scripts/campaigns/fuzz_files.py --seed 1 --count 2000

The build is in build/coverage; counts of an earlier run are removed first, unless `--add` is given, which sums up several scripts.
Kernels are compiled once for each instruction set; a line of theirs counts as reached when it ran for any of them. `--missed` lists
the numbers of the lines that were not reached. Needs gcc and its gcov. Exit status: the script's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "coverage"

Lines = dict[str, dict[int, bool]]  # file -> line -> was reached


def build() -> None:
    """Configures and compiles."""
    options = ["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Debug", "-DPELLUCID_COVERAGE=ON"]
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(BUILD), *options], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(BUILD)], check=True, stdout=subprocess.DEVNULL)


def clear() -> None:
    """Removes counts."""
    for counts in BUILD.rglob("*.gcda"):
        counts.unlink()


def read() -> Lines:
    """What was counted, of the files in csrc."""
    lines: Lines = defaultdict(dict)
    for notes in BUILD.rglob("*.gcno"):
        command = ["gcov", "--json-format", "--stdout", str(notes)]
        done = subprocess.run(command, cwd=BUILD, capture_output=True, text=True, check=True)
        for document in done.stdout.splitlines():
            for file in json.loads(document)["files"]:
                path = Path(BUILD, file["file"]).resolve()
                if path.is_relative_to(ROOT / "csrc"):
                    _add(lines[str(path.relative_to(ROOT))], file["lines"])
    return lines


def _add(found: dict[int, bool], counted: list[dict[str, int]]) -> None:
    for line in counted:
        number = line["line_number"]
        found[number] = found.get(number, False) or line["count"] > 0


def table(lines: Lines, *, with_missed: bool) -> str:
    """A row for each file, and one for all."""
    rows = [f"{'file':44} {'reached':>8} {'lines':>6} {'share':>7}"]
    totals = [0, 0]
    for name, found in sorted(lines.items()):
        reached = sum(found.values())
        totals = [totals[0] + reached, totals[1] + len(found)]
        rows.append(_row(name, reached, len(found)))
        if with_missed and reached < len(found):
            rows.append(f"    {_ranges([number for number, was in sorted(found.items()) if not was])}")
    return "\n".join([*rows, _row("all", *totals)])


def _row(name: str, reached: int, count: int) -> str:
    return f"{name:44} {reached:8,} {count:6,} {100 * reached / max(count, 1):6.1f}%"


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 as 1-3 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def main() -> int:
    """Runs the script; gives its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missed", action="store_true", help="list the lines that were not reached")
    parser.add_argument("--add", action="store_true", help="keep the counts of earlier runs")
    parser.add_argument("script", help="a Python script, with its options")
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    build()
    if not given.add:
        clear()
    environment = {**os.environ, "PELLUCID_LIBRARY": str(BUILD / "libpellucid.so")}
    status = subprocess.run([sys.executable, given.script, *given.options], env=environment).returncode
    print(table(read(), with_missed=given.missed))
    return status


if __name__ == "__main__":
    sys.exit(main())
