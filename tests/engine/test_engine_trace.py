"""Records of steps: bounded in memory, complete in the file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from pellucid.engine.trace import StepRecord, Trace
from pellucid.errors import ConfigError


def test_trace_when_more_steps_come_than_it_holds_then_memory_keeps_the_last_and_the_file_all(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    records = [StepRecord(step=step, kind="decode", running=["a"], tokens={"a": 1}) for step in range(5)]
    with Trace(capacity=2, path=path) as trace:
        for record in records:
            trace.record(record)
        lines = path.read_text().splitlines()  # before it is closed: a crash loses nothing
    assert trace.records == records[3:]
    assert [json.loads(line) for line in lines] == [asdict(record) for record in records]


def test_closed_trace_when_recorded_to_then_memory_still_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace = Trace(path=path)
    trace.close()
    trace.close()
    trace.record(StepRecord(step=0, kind="none"))
    assert len(trace.records) == 1
    assert path.read_text() == ""


def test_trace_when_it_cannot_be_kept_then_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trace capacity is 0"):
        Trace(capacity=0)
    with pytest.raises(ConfigError, match="cannot be written"):
        Trace(path=tmp_path / "missing" / "trace.jsonl")
