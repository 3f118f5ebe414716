"""The comparison with other engines: its workers' manners, with an engine that is a script, and the arithmetic of its tables."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# Half a token a second for each prompt; `single` fails, `prefill` never ends, there is no `mixed`.
FAKE = """
import sys, time
sys.path.insert(0, sys.argv[0].rsplit("/", 1)[0])
from protocol import serve

class Engine:
    def decode(self, prompts, outputs):
        return len(prompts), 2.0
    def single(self, prompts, outputs):
        raise ValueError("no such luck")
    def prefill(self, prompts, outputs):
        if len(prompts[0]) > 8:
            time.sleep(60)
        return 8, 1.0

def load(command):
    if command["options"].get("broken"):
        raise SystemExit("out of memory")
    return Engine()

serve(load, lambda: {"fake": "1.0"})
"""


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(name)
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = module("compare")
    workers = tmp_path / "workers"
    workers.mkdir()
    (workers / "protocol.py").write_text((BENCHMARKS / "workers" / "protocol.py").read_text())
    (workers / "fake.py").write_text(FAKE)
    monkeypatch.setattr(found, "HERE", tmp_path)
    monkeypatch.setattr(found, "ENGINES", dict.fromkeys(("pellucid", "other", "broken"), ("fake.py", None)))
    monkeypatch.setattr(found, "run_json", lambda command: {"hf": "somewhere"})
    monkeypatch.setattr(found, "RUN_SECONDS", 2)
    return found


def run_group(compare: ModuleType, tmp_path: Path, cases: list[str], rounds: int = 1) -> tuple[Any, list[Any]]:
    compare.PRECISIONS["bf16"] = {
        "pellucid": ("hf", {}),
        "other": ("hf", {}),
        "broken": ("hf", {"broken": True}),
    }
    options = argparse.Namespace(
        engines=["pellucid", "other", "broken"], peers=tmp_path, logs=tmp_path, threads=1, rounds=rounds, cases=cases
    )
    saved: list[Any] = []
    group = compare.Group("smollm2", "bf16", options)
    return group.run(lambda result: saved.append(json.loads(json.dumps(result)))), saved


def test_group_when_an_engine_cannot_load_then_it_is_reported_and_the_others_go_on(
    compare: ModuleType, tmp_path: Path
) -> None:
    result, saved = run_group(compare, tmp_path, ["decode 4"], rounds=2)
    assert result["figures"] == {"decode 4": {"pellucid": [2.0, 2.0], "other": [2.0, 2.0]}}
    assert "out of memory" in result["failed"]["broken"]
    assert result["is_whole"]
    assert [len(one["figures"]["decode 4"]["other"]) for one in saved] == [1, 2]  # figures are safe after each round
    assert not saved[-1]["is_whole"]
    assert result["versions"]["other"] == {"fake": "1.0"}
    assert result["peak_bytes"]["other"] > 0


def test_group_when_a_case_fails_or_is_missing_then_the_engine_lives_on(compare: ModuleType, tmp_path: Path) -> None:
    result, _ = run_group(compare, tmp_path, ["single 128+128", "mixed 64", "decode 1"])
    assert list(result["figures"]) == ["decode 1"]
    assert "no such luck" in result["failed"]["other"]
    assert "has no mixed" in result["failed"]["other"]


def test_group_when_a_case_takes_too_long_then_the_engine_is_ended(compare: ModuleType, tmp_path: Path) -> None:
    began = time.monotonic()
    result, _ = run_group(compare, tmp_path, ["prefill 1024", "decode 1"])
    assert time.monotonic() - began < 30
    assert result["figures"] == {}
    assert "took more than 2 s" in result["failed"]["other"]


def test_startup_when_measured_then_a_process_each_round_and_seconds(compare: ModuleType, tmp_path: Path) -> None:
    result, _ = run_group(compare, tmp_path, ["startup"], rounds=2)
    assert [len(values) for values in result["figures"]["startup"].values()] == [2, 2]
    assert all(0 < value < 20 for values in result["figures"]["startup"].values() for value in values)


def test_group_when_interrupted_while_loading_then_no_process_is_left(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawned: list[Any] = []

    def interrupted(worker: Any, *_: Any) -> float:
        spawned.append(worker)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare.Worker, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_group(compare, tmp_path, ["decode 1"])
    assert [worker.process.returncode for worker in spawned] == [-9]


def test_worker_when_paused_then_it_does_not_run_and_close_ends_it(compare: ModuleType, tmp_path: Path) -> None:
    worker = compare.Worker("other", sys.executable, tmp_path / "log")
    worker.load("somewhere", 1, {})
    worker.pause(True)
    deadline = time.monotonic() + 10
    while state_of(worker.process.pid) != "T" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state_of(worker.process.pid) == "T"
    assert os.getpgid(worker.process.pid) == worker.process.pid  # its threads and children stop with it
    worker.close()
    assert worker.process.returncode is not None


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


REPORT: dict[str, Any] = {
    "conditions": {
        "date": "2030-01-02",
        "machine": {"processor": "a processor"},
        "threads": 2,
        "rounds": 2,
        "roofline": {"bytes_per_second": 1e9, "float32": 1e12, "bf16": 1e12, "int8": 1e12},
    },
    "groups": {
        "smollm2/bf16": {
            "date": "2030-01-01",
            "is_whole": True,
            "engines": {"pellucid": {}, "pellucid-gguf": {}, "slow": {}, "quick": {}, "absent": {}},
            "figures": {
                "decode 1": {"pellucid": [3.0, 5.0], "pellucid-gguf": [9.0], "slow": [1.0], "quick": [2.0]},
                "startup": {"pellucid": [1.0], "slow": [4.0], "quick": [2.0]},
            },
            "load_seconds": {"pellucid": 1.0},
            "peak_bytes": {"pellucid": 2**21},
            "versions": {"pellucid": {"pellucid": "9"}},
            "failed": {"absent": "not there"},
        }
    },
}


def test_table_when_more_or_less_is_better_then_the_ratio_is_above_one_where_pellucid_is_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    text = module("report").markdown(REPORT)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "4 (3–5)" in rows["decode 1"]
    assert "2.00 (quick)" in rows["decode 1"]  # tokens a second: the most; Pellucid is no peer of itself
    assert "2.00 (quick)" in rows["startup"]  # seconds: the least
    assert "2 MiB" in rows["peak memory"]
    assert "absent: not there" in text
    assert "absent" not in rows["case"]
    assert "a processor" in text


def test_limit_when_one_sequence_decodes_then_it_is_what_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    report = module("report")
    shape = report.SHAPES["smollm2"]
    weights = 2 * (shape["layers"] + shape["head"]) + 2 * shape["n"] * shape["kv"] * 2 * 160
    assert report.limit("smollm2/bf16", "decode 1", REPORT["conditions"]["roofline"]) == pytest.approx(1e9 / weights)
    assert report.limit("smollm2/bf16", "mixed 64", REPORT["conditions"]["roofline"]) is None
    assert report.limit("smollm2/bf16", "startup", REPORT["conditions"]["roofline"]) is None
