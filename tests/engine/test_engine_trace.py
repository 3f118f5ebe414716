"""Records of steps: bounded in memory and in the file, and whole when they are read again."""

from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path

import pytest

from pellucid.contract.plan import PlanEntry, WaitingReasons
from pellucid.errors import ConfigError, TraceError
from pellucid.scheduling.request import RequestStatus
from pellucid.scheduling.scheduler import TokenEvent
from pellucid.trace.file import NUM_PARTS, TraceFile, part_path
from pellucid.trace.lines import (
    FORMAT,
    CancelLine,
    EndLine,
    Header,
    ModelIdentity,
    Resolved,
    StepLine,
    step_line,
)
from pellucid.trace.reader import TraceReader
from pellucid.trace.records import StepRecord, Trace

HEADER = Header(FORMAT, "0", "run", 0, 0.0, ModelIdentity("m", "d"), {}, Resolved(64, 8, 4, 1, "portable"))
RECORD = StepRecord(
    step=7,
    kind="mixed",
    tkv=64,
    waiting=["c", "d"],
    running=["a"],
    request_outputs=["a"],
    finished_requests=["b"],
    n_reserved_blocks=3,
    n_used_blocks=2,
    n_free_blocks=5,
    n_prefix_hits=1,
    tokens={"a": 3, "b": 1},
    preempted=["d"],
    schedule_seconds=0.1,
    execute_seconds=0.2,
    sample_seconds=0.3,
    output_seconds=0.4,
    idle_seconds=0.5,
    n_draft_tokens=2,
    n_accepted_tokens=1,
    waiting_reasons=WaitingReasons(("c", "d"), "no free blocks: needs 5, 2 free"),
)
ENTRIES = (PlanEntry("a", 4, 3, True, (1, 2), 0, (8, 9)), PlanEntry("b", 9, 1, True))
EVENTS = [
    TokenEvent("a", 8),
    TokenEvent("a", 5),
    TokenEvent("b", None, RequestStatus.FINISHED_ERROR, error="logits are not finite"),
]


def line_of(record: StepRecord, turn: int = 1) -> StepLine:
    return step_line(record, ENTRIES, EVENTS, {"a": [1, 2]}, turn, 0.5)


def plain(step: int, *, running: list[str], waiting: list[str]) -> StepLine:
    record = StepRecord(
        step, "decode", running=running, waiting=waiting, waiting_reasons=WaitingReasons(tuple(waiting))
    )
    return step_line(record, (), [], None, step + 1, 0.0)


def test_trace_when_more_steps_come_than_it_holds_then_memory_keeps_the_last() -> None:
    records = [StepRecord(step=step, kind="decode", running=["a"], tokens={"a": 1}) for step in range(5)]
    trace = Trace(capacity=2)
    for record in records:
        trace.record(record)
    assert trace.records == records[3:]
    assert trace.last == records[-1]
    with pytest.raises(ConfigError, match="trace capacity is 0"):
        Trace(capacity=0)


def test_record_when_each_field_is_set_then_its_line_gives_all_of_it_back(tmp_path: Path) -> None:
    default = StepRecord(0, "none")
    unset = [f.name for f in dataclasses.fields(RECORD) if getattr(RECORD, f.name) == getattr(default, f.name)]
    assert not unset, "a field that is not set here is not checked"
    path = tmp_path / "t.jsonl"
    file = TraceFile(str(path), 1, HEADER)
    file.write(line_of(RECORD))
    trace = TraceReader(path)  # before it is closed: a crash loses nothing
    line = next(trace.lines()).line
    assert isinstance(line, StepLine)
    assert line.to_record() == RECORD
    assert line.new_token_ids == [[8, 5], []]
    assert line.logits == [[1, 2], []]
    assert line.entries == list(ENTRIES)
    assert line.finished["b"].error == "logits are not finite"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600  # it holds prompts


def test_queues_when_they_do_not_change_then_they_are_written_once_and_read_every_time(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = [
        plain(0, running=["a"], waiting=["b"]),
        plain(1, running=["a"], waiting=["b"]),
        plain(2, running=["a", "b"], waiting=[]),
        plain(3, running=["a", "b"], waiting=[]),
    ]
    file = TraceFile(str(path), 1, HEADER)
    for line in lines:
        file.write(line)
    written = [json.loads(text) for text in path.read_text().splitlines()][1:]
    assert [sorted({"waiting", "running"} & line.keys()) for line in written] == [["running", "waiting"], []] * 2
    assert [placed.line for placed in TraceReader(path).lines()] == lines


def test_trace_file_when_it_is_full_then_it_turns_over_and_all_parts_stay_within_the_limit(tmp_path: Path) -> None:
    path = str(tmp_path / "t.jsonl")
    file = TraceFile(path, 1, HEADER)
    count = 6000
    for step in range(count):
        file.write(plain(step, running=[f"request-{step % 7}-{'x' * 60}"], waiting=["w"]))
    file.write(EndLine(count, count, 1.0))
    file.close()
    parts = sorted(p.name for p in tmp_path.iterdir())
    assert parts == ["t.jsonl", *(f"t.jsonl.{number}" for number in range(1, NUM_PARTS))]
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 1_000_000
    trace = TraceReader(path)
    assert trace.header.part > 0
    assert not trace.is_whole
    steps = [placed.line for placed in trace.lines() if isinstance(placed.line, StepLine)]
    assert [line.step for line in steps] == list(range(steps[0].step, count))
    assert all(line.waiting == ["w"] and line.running for line in steps)
    assert trace.end == ""
    assert trace.last_step() == count - 1


def test_parts_of_an_older_trace_when_a_new_one_is_read_then_they_are_left_out(tmp_path: Path) -> None:
    path = str(tmp_path / "t.jsonl")
    older = Header(FORMAT, "0", "older", 1, 0.0, HEADER.model, {}, HEADER.resolved)
    TraceFile(part_path(path, 1), 1, older).close()
    TraceFile(path, 1, HEADER).close()
    assert TraceReader(path).header.run == "run"
    assert list(TraceReader(path).lines()) == []


def test_trace_file_when_the_disk_is_full_then_it_ends_with_one_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = TraceFile("/dev/full", 1, HEADER)
    for step in range(3):
        file.write(plain(step, running=[], waiting=[]))
    file.close()
    assert [record.message.partition(":")[0] for record in caplog.records] == ["the trace ends here"]


def test_trace_file_when_its_folder_goes_away_then_it_ends_and_raises_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    file = TraceFile(str(folder / "t.jsonl"), 1, HEADER)
    (folder / "t.jsonl").unlink()
    folder.rmdir()
    for step in range(3000):  # until it would turn over
        file.write(plain(step, running=["x" * 200 + str(step)], waiting=[]))
    file.close()


def test_trace_file_when_it_cannot_be_opened_then_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        TraceFile(str(tmp_path / "missing" / "trace.jsonl"), 1, HEADER)


def test_last_line_when_it_is_cut_off_then_the_others_are_read_and_the_end_says_so(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    file = TraceFile(str(path), 1, HEADER)
    file.write(plain(0, running=["a"], waiting=[]))
    file.write(CancelLine(1, 1, 0.1, "a"))
    path.write_bytes(path.read_bytes()[:-4])
    trace = TraceReader(path)
    assert [type(placed.line) for placed in trace.lines()] == [StepLine]
    assert trace.end == "t.jsonl line 3 is cut off"
    path.write_bytes(path.read_bytes() + b"}\n")
    with pytest.raises(TraceError, match="t.jsonl line 3"):
        list(trace.lines())
