"""`scripts/run_tests.py`: what it runs, skips and says, and its exit status."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from utils.children import finished

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "run_tests.py"), *arguments]
    return finished(command)


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (("--suite", "stage0", "-k", "test_uniform_when"), None, "[run] stage0: pytest tests/core tests/ops -k"),
        (("--suite", "stage1", "-k", "no_test_has_this_name"), 5, "[fail] stage1"),
        (
            ("--suite", "stage2", "-k", "no_test_has_this_name"),
            5,
            "[run] stage2: pytest tests/sampling tests/online -k",
        ),
        (("--suite", "parity", "--run-hf", "never"), 1, "[skip] parity because --run-parity or --run-hf is never"),
        (("--suite", "parity", "--run-parity", "never"), 1, "[skip] parity because"),
        (("--suite", "stage0", "--device", "cuda"), 1, "[skip] stage0 because this version runs on the CPU alone"),
        (("--suite", "stage0", "--layout", "slot", "-k", "no_test_has_this_name"), 5, "--kv-layout slot"),
        (("--suite", "stage9"), 2, "invalid choice: 'stage9'"),
    ],
)
def test_arguments_when_given_then_says_what_it_does(
    arguments: tuple[str, ...], status: int | None, expected: str
) -> None:
    done = run(*arguments)
    assert expected in done.stdout + done.stderr
    if status is not None:
        assert (done.returncode != 0) == (status != 0)
        assert "[ok]" not in done.stdout


def test_one_suite_when_a_test_passes_then_ok_and_status_zero() -> None:
    done = run("--suite", "stage1", "-k", "aliases_when_given")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "[config]" in done.stdout
    assert "[ok] stage1" in done.stdout


def test_layout_when_given_then_tests_of_the_other_are_passed_over() -> None:
    name = "test_abort_when_set_on_the_way"
    command = [sys.executable, "-m", "pytest", "--co", "-q", "tests/core/test_core_sequences.py", "-k", name]
    for layout, other in (("slot", "block"), ("block", "slot")):
        done = finished([*command, "--kv-layout", layout], cwd=ROOT, check=True)
        assert f"[{layout}]" in done.stdout
        assert f"[{other}]" not in done.stdout
