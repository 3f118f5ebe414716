"""`scripts/run_tests.py`: what it runs, skips and says, and its exit status. It runs in a small tree of its own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from utils.children import finished

ROOT = Path(__file__).resolve().parents[2]
_TESTS = """
import pytest

def test_passes(): pass

def test_fails(): assert False

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.parametrize("layout", ["slot", "block"])
def test_layout(layout): pass
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script and what holds for all tests, with a few tests in the folders of two suites; a third has none."""
    root = tmp_path_factory.mktemp("tree")
    for name in ("scripts/run_tests.py", "tests/conftest.py"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for name in ("core", "ops", "engine", "offline", "parity"):
        (root / "tests" / name).mkdir()
    (root / "tests" / "core" / "test_a.py").write_text(_TESTS)
    (root / "tests" / "engine" / "test_b.py").write_text(_TESTS)
    (root / "tests" / "parity" / "test_c.py").write_text("def test_passes(): pass\n")
    (root / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: tests that CI leaves out\n")
    return root


def run(tree: Path, *arguments: str) -> CompletedProcess[str]:
    return finished([sys.executable, str(tree / "scripts" / "run_tests.py"), *arguments])


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (("--suite", "stage0", "-k", "passes"), 0, "[run] stage0: pytest tests/core tests/ops -k passes"),
        (("--suite", "stage0", "--workers", "1"), 1, "1 failed, 3 passed, 1 deselected"),
        pytest.param(("--suite", "stage0", "--workers", "2"), 1, "1 failed, 3 passed", marks=pytest.mark.slow),
        (("--suite", "stage0", "--workers", "0"), 2, "--workers is 0; it must be at least 1"),
        (("--suite", "stage0", "-k", "slow"), 1, "[fail] stage0"),
        (("--suite", "stage0", "-k", "slow", "--slow"), 0, "1 passed"),
        (("--suite", "stage1", "-k", "no_test_has_this_name"), 1, "[fail] stage1"),
        (("--suite", "stage2"), 1, "[skip] stage2 because tests/sampling and tests/online do not exist yet"),
        (("--suite", "all", "-k", "passes"), 0, "[ok] parity"),
        pytest.param(("--suite", "all"), 1, "[fail] stage0", marks=pytest.mark.slow),
        (("--suite", "parity", "--run-hf", "never"), 1, "[skip] parity because --run-parity or --run-hf is never"),
        (("--suite", "parity", "--run-parity", "never"), 1, "[skip] parity because"),
        (("--suite", "stage0", "--device", "cuda"), 1, "[skip] stage0 because this version runs on the CPU alone"),
        (("--suite", "stage0", "--layout", "slot", "-k", "layout"), 0, "1 passed"),
        (("--suite", "stage9"), 2, "invalid choice: 'stage9'"),
    ],
)
def test_arguments_when_given_then_says_what_it_does(
    tree: Path, arguments: tuple[str, ...], status: int, expected: str
) -> None:
    done = run(tree, *arguments)
    assert expected in done.stdout + done.stderr
    assert done.returncode == status, done.stdout
    assert status == 0 or "[ok] " + arguments[1] not in done.stdout
    assert status == 2 or "[config]" in done.stdout


@pytest.mark.parametrize(("layout", "other"), [("slot", "block"), ("block", "slot")])
def test_layout_when_given_then_tests_of_the_other_are_passed_over(tree: Path, layout: str, other: str) -> None:
    done = run(tree, "--suite", "stage1", "--layout", layout, "-k", "layout", "-v")
    assert f"test_layout[{layout}] PASSED" in done.stdout
    assert f"[{other}]" not in done.stdout
