"""The fuzzers of the core: clean within a second or two, and every planted fault is found, told and can be run again."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from utils.children import finished

from pellucid.core import abi

ROOT = Path(__file__).resolve().parents[2]
CAMPAIGNS = ROOT / "scripts" / "campaigns"
CLEAN, FOUND = 0, 1
# What the oracle says about each planted fault.
CORE_PLANTS = {
    "silent-refusal": "pld_last_error is empty",
    "leaky-refusal": r"free cells: \d+; expected \d+|last position|the bits are not what they were|twin",
    "lost-shift": r"status of add|last position|keys and values|twin",
    "unchecked-length": "memory outside of the target was written",
    "unchecked-table": r"status of pld_program_run: 0; expected -1",
    "unknown-status": "pld_request_free answered 3",
    "hang": "hang: no end after 2 s",
    "crash": "crash: SIGSEGV",
}
FILE_PLANTS = {
    "untyped-error": "untyped error",
    "unchecked-size": "accepted a weight",
    "hang": "hang: no end after 2 s",
    "crash": "crash: SIGSEGV",
}
REPEATED = ("leaky-refusal", "unchecked-size", "crash")  # each run costs a second


def run(script: str, *options: str) -> CompletedProcess[str]:
    command = [sys.executable, str(CAMPAIGNS / script), *options]
    return finished(command, cwd=ROOT, timeout=300)


def fuzz(script: str, *options: str) -> CompletedProcess[str]:
    reader = ("--reader", "program") if script == "fuzz_files.py" else ()
    return run(script, "--seed", "1", "--max-findings", "1", *reader, *options)


@pytest.mark.parametrize("script", ["fuzz_core.py", "fuzz_files.py"])
def test_fuzzer_when_run_for_a_moment_then_clean_and_says_what_it_did(script: str) -> None:
    done = fuzz(script, "--count", "60")
    assert done.returncode == CLEAN, done.stdout[-4000:]
    assert re.search(rf"^{script}: seed 1, 60 cases from 0, .*, [\d.]+ s, \d+ cases/s, 0 findings$", done.stdout, re.M)


def test_functions_when_sequences_are_run_then_all_that_the_header_exports_are_called() -> None:
    count = len(abi.SIGNATURES)
    assert f" calls of {count} of {count} functions, " in fuzz("fuzz_core.py", "--count", "250").stdout


@pytest.mark.parametrize(
    ("script", "plant", "told"),
    [
        *(("fuzz_core.py", plant, told) for plant, told in CORE_PLANTS.items()),
        *(("fuzz_files.py", plant, told) for plant, told in FILE_PLANTS.items()),
    ],
)
def test_fault_when_planted_then_found_and_found_again_by_the_line_that_is_told(
    tmp_path: Path, script: str, plant: str, told: str
) -> None:
    patience = ("--hang-seconds", "2") if plant == "hang" else ()
    done = fuzz(script, "--count", "5000", "--plant", plant, "--keep", str(tmp_path), *patience)
    assert done.returncode == FOUND, done.stdout[-4000:]
    assert re.search(told, done.stdout)
    again = re.search(r"^again: python \S+ (.*)$", done.stdout, re.M)
    assert again is not None
    if plant not in REPEATED:
        return
    repeated = fuzz(script, *again.group(1).split(), *patience)
    assert repeated.returncode == FOUND
    assert re.search(told, repeated.stdout)
    assert bool(list(tmp_path.glob("*.pld"))) == (script == "fuzz_files.py")


def test_case_when_run_alone_then_the_same_calls_as_among_others() -> None:
    among = run("fuzz_core.py", "--seed", "3", "--start", "5", "--count", "3")
    alone = [run("fuzz_core.py", "--seed", "3", "--start", str(case), "--count", "1") for case in (5, 6, 7)]

    def numbers(done: CompletedProcess[str], name: str) -> int:
        found = re.search(rf"([\d,]+) {name}", done.stdout)
        assert found is not None
        return int(found.group(1).replace(",", ""))

    for name in ("actions", "comparisons", "invalid argument"):
        assert numbers(among, name) == sum(numbers(done, name) for done in alone)


def test_coverage_when_lines_are_given_then_a_table_of_files() -> None:
    sys.path.insert(0, str(CAMPAIGNS))
    try:
        from core_coverage import table
    finally:
        sys.path.remove(str(CAMPAIGNS))
    lines = {"csrc/src/a.cpp": {1: True, 2: False, 3: False, 9: False}, "csrc/src/b.cpp": {4: True}}
    rows = table(lines, with_missed=True).splitlines()
    assert [row.split() for row in rows[1:]] == [
        ["csrc/src/a.cpp", "1", "4", "25.0%"],
        ["2-3", "9"],
        ["csrc/src/b.cpp", "1", "1", "100.0%"],
        ["all", "2", "5", "40.0%"],
    ]
