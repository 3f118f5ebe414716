"""Each campaign, small: nothing is found on a sound engine, and every planted fault is, with the way to reproduce it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from utils.children import finished

CAMPAIGNS = Path(__file__).resolve().parents[2] / "scripts" / "campaigns"
CLEAN, FOUND, PLANT_NOT_FOUND = 0, 1, 3
SOAK = (
    "--inline",
    "--seed",
    "2",
    "--threads",
    "1",
    "--precision",
    "float32",
    "--isa",
    "avx2",
    "--round",
    "24",
    "--pool",
    "100",
)


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
    assert "72 requests in 3 cases, seed 2" in capsys.readouterr().out


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


OFFLINE = ("--inline", "--calls", "40")


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_fuzz_offline_when_the_engine_is_sound_then_nothing_is_found(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run("fuzz_offline", *OFFLINE, "--seed", "2", "--kinds", kind, "--count", "80")
    said = capsys.readouterr().out
    assert status == CLEAN, said
    assert "80 requests in 2 cases" in said


@pytest.mark.parametrize("fault", ["neighbour", "untyped", "unnamed", "leak"])
def test_fuzz_offline_when_a_fault_is_planted_then_found(fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = run("fuzz_offline", *OFFLINE, "--kinds", "llm", "--count", "2000", "--plant", fault)
    assert status == FOUND
    assert f"the planted fault '{fault}' was found" in capsys.readouterr().out


HTTP = ("--inline", "--kinds", "app", "--requests", "40")


def test_fuzz_http_when_the_server_is_sound_then_nothing_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    status = run("fuzz_http", *HTTP, "--count", "80", "--seed", "2")
    said = capsys.readouterr().out
    assert status == CLEAN, said
    assert "80 requests in 2 cases" in said


@pytest.mark.parametrize("fault", ["bug", "neighbour", "leak"])
def test_fuzz_http_when_a_fault_is_planted_then_found(fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fuzz_http", *HTTP, "--count", "4000", "--plant", fault) == FOUND
    assert f"the planted fault '{fault}' was found" in capsys.readouterr().out


STORM = ("--inline", "--kinds", "thread", "--requests", "160", "--count", "1", "--memory-percent", "3")


def run_apart(name: str, *arguments: str) -> tuple[int, str]:
    """The exit status of a campaign in a process of its own, whose memory is its own, and what it printed."""
    done = finished([sys.executable, CAMPAIGNS / f"{name}.py", *arguments])
    return done.returncode, done.stdout


@pytest.mark.slow
def test_storm_when_the_engine_is_sound_then_nothing_is_left() -> None:
    status, said = run_apart("storm", *STORM)
    assert status == CLEAN, said
    assert "160 requests in 1 cases" in said


@pytest.mark.slow
def test_storm_when_memory_grows_then_found() -> None:
    status, said = run_apart("storm", *STORM, "--plant", "memory")
    assert status == FOUND, said
    assert "the planted fault 'memory' was found" in said


@pytest.mark.parametrize("fault", ["block", "task", "thread", "descriptor", "file"])
def test_storm_when_a_fault_is_planted_then_found(
    fault: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("storm"), "_SETTLING", 0.5)
    monkeypatch.setattr(importlib.import_module("kit.leftovers"), "_PATIENCE", 0.5)
    assert run("storm", *STORM, "--plant", fault) == FOUND
    assert f"the planted fault '{fault}' was found" in capsys.readouterr().out


def test_lines_when_asked_for_then_the_table_names_what_was_not_reached(capsys: pytest.CaptureFixture[str]) -> None:
    run("fuzz_offline", *OFFLINE, "--kinds", "thread", "--count", "40", "--lines", "--keep-going")
    table = capsys.readouterr().out
    row = next(line for line in table.splitlines() if line.startswith("pellucid/engine/admission.py")).split()
    assert 40 < int(row[2]) <= int(row[1])


FAKE = """
import argparse, sys
parser = argparse.ArgumentParser()
for name in ("--seed", "--seconds", "--count"):
    parser.add_argument(name)
parser.add_argument("--plant", choices=["this", "that"])
options = parser.parse_args()
sys.exit({status})
"""


def test_all_when_scripts_end_otherwise_than_they_should_then_each_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fuzz_one.py").write_text(FAKE.format(status="1 if options.plant else 0"))
    (tmp_path / "soak_two.py").write_text(FAKE.format(status="3 if options.plant == 'that' else 1"))
    monkeypatch.setattr(importlib.import_module("all"), "FOLDER", tmp_path)
    assert run("all", "fuzz_one.py", "--seconds", "1") == 0
    assert run("all", "--keep-going") == 1
    assert "[fail] soak_two.py --seed 1: status 1" in capfd.readouterr().out
    assert run("all", "--plants", "--seed", "7") == 1
    said = capfd.readouterr().out
    assert "[ok] fuzz_one.py --seed 7 --plant that: status 1" in said
    assert "[ok] soak_two.py --seed 7 --plant this: status 1" in said
    assert "[fail] soak_two.py --seed 7 --plant that: status 3" in said
    with pytest.raises(SystemExit, match="unknown campaign 'nope.py'"):
        run("all", "nope.py")
