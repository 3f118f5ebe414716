"""Each campaign, small: nothing is found on a sound engine, and every planted fault is, with the way to reproduce it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

CAMPAIGNS = Path(__file__).resolve().parents[2] / "scripts" / "campaigns"
CLEAN, FOUND, PLANT_NOT_FOUND = 0, 1, 3
SOAK = ("--inline", "--threads", "1", "--precision", "float32", "--isa", "avx2", "--round", "24", "--pool", "40")


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CAMPAIGNS))


def run(name: str, *arguments: str) -> int:
    """The exit status of a campaign."""
    status = importlib.import_module(name).main(list(arguments))
    assert isinstance(status, int)
    return status


def test_soak_when_engines_are_sound_then_nothing_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("soak", *SOAK, "--count", "72", "--longest", "1100") == CLEAN
    assert "72 requests in 3 cases, seed 1" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["row", "chain", "hidden"])
def test_soak_when_a_fault_is_planted_then_found_and_found_again_by_its_reproduction(
    fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("soak", *SOAK, "--count", "2400", "--longest", "1100", "--plant", fault) == FOUND
    said = capsys.readouterr().out
    assert f"the planted fault '{fault}' was found" in said
    command = next(line for line in said.splitlines() if "reproduce: " in line).split()
    assert run("soak", "--inline", *command[command.index("--seed") :]) == FOUND


def test_plant_when_no_case_meets_it_then_the_status_says_so() -> None:
    assert run("soak", *SOAK, "--count", "1", "--longest", "60", "--round", "1", "--plant", "row") == PLANT_NOT_FOUND


@pytest.mark.parametrize(("fault", "told"), [("crash", "the process died of SIGABRT"), ("hang", "no end within 5 s")])
def test_supervisor_when_the_process_of_the_cases_crashes_or_hangs_then_a_finding(
    fault: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--longest", "60", "--round", "1", "--isa", "avx2", "--case-seconds", "5")
    assert run("soak", *arguments, "--plant", fault) == FOUND
    assert told in capsys.readouterr().out
