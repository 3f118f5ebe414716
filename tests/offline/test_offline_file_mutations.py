"""Damaged files of every kind: each opens, or gets a typed error that says which file it was. scripts/campaigns/ has more of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from utils import file_kinds
from utils.children import finished
from utils.file_kinds import KINDS, Counts, FileKind, Makers, UntypedError, check
from utils.file_mutations import KIND_NAMES

from pellucid.errors import WeightFormatError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "campaigns" / "fuzz_model_files.py"
CASES = 200
_EACH_LINE_ALONE = ("run input", "capture input")  # a line that cannot be run is told in the results


@pytest.fixture
def makers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Makers:
    monkeypatch.setenv("PELLUCID_CACHE", str(tmp_path / "cache"))
    transformers.utils.logging.disable_progress_bar()
    return Makers(tmp_path)


def test_kinds_of_files_when_listed_then_all_are_made() -> None:
    assert tuple(KINDS) == KIND_NAMES


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_when_opened_then_they_open_or_get_a_typed_error_that_names_them(
    makers: Makers, name: str
) -> None:
    kind, counts = KINDS[name](makers), Counts()
    for index in range(CASES):
        check(kind, name, 0, index, counts)
    assert counts.opened + counts.refused == CASES
    assert counts.opened
    assert counts.refused or name in _EACH_LINE_ALONE


def _raise_key_error(content: bytes) -> None:
    raise KeyError("x")


def _name_no_file(content: bytes) -> None:
    raise WeightFormatError("something is wrong")


def _take_long(content: bytes) -> None:
    time.sleep(60)


def _panic(content: bytes) -> None:
    raise BaseException("a panic of a library is no Exception")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_raise_key_error, r"x, --seed 3 --only 0: builtins.KeyError: 'x'"),
        (_panic, "builtins.BaseException: a panic"),
        (_name_no_file, "the error does not say which file: something is wrong"),
        (_take_long, "it took longer than 0.2 s"),
    ],
)
def test_faults_that_are_planted_when_files_are_damaged_then_found_with_what_makes_them_again(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[bytes], None], words: str
) -> None:
    monkeypatch.setattr(file_kinds, "SECONDS", 0.2)
    kind = FileKind([b"{}"], lambda rng, content: content, fault, ("config.json",))
    with pytest.raises(UntypedError, match=words):
        check(kind, "x", 3, 0, Counts())
    check(replace(kind, open=lambda content: None), "x", 3, 0, Counts())


@pytest.mark.slow
def test_campaign_when_nothing_is_found_then_one_line_and_status_0() -> None:
    done = finished([sys.executable, SCRIPT, "--seed", "5", "--count", "20", "--kind", "bench dataset"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("fuzz_model_files: seed 5, 1 kinds, 20 files: ")
    assert "0 untyped, 0 crash, 0 hang" in done.stdout


@pytest.mark.parametrize(("plant", "what"), [("error", "untyped"), ("crash", "crash")])
@pytest.mark.slow
def test_campaign_when_a_fault_is_planted_then_it_is_found_and_can_be_made_again(plant: str, what: str) -> None:
    command = [sys.executable, SCRIPT, "--seed", "5", "--kind", "bench dataset", "--plant", plant]
    done = finished([*command, "--count", "12"])
    assert done.returncode == 1
    problem = next(line for line in done.stdout.splitlines() if line.startswith(f"{what}: bench dataset"))
    case = problem.partition("--only ")[2].partition(":")[0]
    assert finished([*command, "--only", case]).returncode not in (0, 2)
