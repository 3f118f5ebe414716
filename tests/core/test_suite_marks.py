"""Marks and names of the suite: what `-m` selects by, and which files there are."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from utils.children import finished

ROOT = Path(__file__).resolve().parents[2]


def _selected(*options: str) -> list[str]:
    done = finished([sys.executable, "-m", "pytest", "--collect-only", "-q", *options], cwd=ROOT, check=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.parametrize(
    ("mark", "file", "wanted", "unwanted"),
    [
        pytest.param("padded", "tests/engine/test_engine_padded.py", "test_padded_when", None, marks=pytest.mark.slow),
        pytest.param(
            "slot", "tests/offline/test_offline_foreign_operations.py", "settings3", "settings2", marks=pytest.mark.slow
        ),
        ("prefill_first", "tests/engine/test_engine_scheduler_commands.py", "prefill_first", "[mixed"),
    ],
)
def test_mark_when_selected_by_then_the_tests_that_name_it(
    mark: str, file: str, wanted: str, unwanted: str | None
) -> None:
    found = _selected("-m", mark, file)
    assert any(wanted in name for name in found), found
    assert unwanted is None or not any(unwanted in name for name in found), found


@pytest.mark.slow
def test_models_when_several_are_named_then_a_test_on_a_real_one_runs_on_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PELLUCID_TEST_MODELS", "one, /some/where/two")
    found = _selected("tests/offline/test_offline_replay.py", "-k", "real_model")
    assert [name.rpartition("[")[2] for name in found] == ["one]", "two]"]


def test_files_are_named_by_scope_and_subject() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) > 100
    assert [name for name in names if not re.fullmatch(r"test_[a-z0-9]+(_[a-z0-9]+)+\.py", name)] == []
