"""`pellucid trace`: what is shown of a trace and why a request waited, on a small story; and the commands themselves."""

from __future__ import annotations

import importlib.util
import tracemalloc
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from utils.tiny_models import build_tiny_checkpoint

import pellucid.trace.timeline_drawing as drawing
from pellucid import LLM, SamplingParams
from pellucid.cli import app
from pellucid.contract.plan import PlanEntry
from pellucid.errors import ConfigError
from pellucid.trace.file import TraceFile
from pellucid.trace.lines import (
    FORMAT,
    CancelLine,
    Ending,
    EndLine,
    Header,
    Line,
    ModelIdentity,
    Resolved,
    StepLine,
    SubmitLine,
)
from pellucid.trace.table import table_rows
from pellucid.trace.timeline import Timeline
from pellucid.trace.timeline_text import lines as text_lines
from pellucid.trace.why import PREEMPTED, Why

HEADER = Header(FORMAT, "0", "run", 0, 0.0, ModelIdentity("tiny", "d"), {}, Resolved(64, 8, 4, 1, "portable"))


def submit(step: int, request_id: str, num_prompt: int, **params: Any) -> SubmitLine:
    return SubmitLine(step, step, float(step), request_id, [5] * num_prompt, params)


def step(
    number: int,
    entries: dict[str, tuple[int, int, int]],  # request: start, tokens, new tokens
    waiting: tuple[str, ...] = (),
    reason: str | None = None,
    preempted: tuple[str, ...] = (),
    finished: dict[str, Ending] | None = None,
    cached: int = 0,
) -> StepLine:
    made = [PlanEntry(name, start, count, bool(new), (), cached) for name, (start, count, new) in entries.items()]
    is_decode = all(count == 1 for _, count, _ in entries.values())
    return StepLine(
        turn=number + 1,
        at=number + 0.5,
        step=number,
        kind="decode" if is_decode else "mixed",
        entries=made,
        new_token_ids=[[7] * new for _, _, new in entries.values()],
        finished=finished or {},
        preempted=list(preempted),
        waiting=list(waiting),
        running=list(entries),
        head_reason=reason,
        n_used_blocks=4,
        n_free_blocks=4,
    )


BUDGET = "token budget of 16 spent"
STORY: list[Line] = [
    submit(0, "a", 20),
    submit(0, "b", 8),
    step(0, {"a": (0, 16, 0)}, ("b",), BUDGET),
    step(1, {"a": (16, 4, 1), "b": (0, 8, 1)}),
    step(2, {"a": (20, 1, 1), "b": (8, 1, 1)}),
    step(3, {"a": (21, 1, 1)}, ("b",), "blocks are short: 1 preempted in this step", ("b",)),
    submit(4, "c", 3),
    step(4, {"a": (22, 1, 1)}, ("b", "c"), "no free blocks: needs 3, 1 free"),
    step(5, {"a": (23, 1, 1)}, ("b", "c"), "no free blocks: needs 3, 2 free", finished={"a": Ending("length")}),
    step(6, {"b": (4, 6, 1)}, ("c",), "max_num_seqs 1 reached", cached=4),
    CancelLine(7, 7, 6.9, "c"),
    submit(7, "d", 2),
    step(7, {"b": (10, 1, 1)}, ("d",), "max_num_seqs 1 reached"),
    step(8, {"b": (11, 1, 1)}, ("d",), "max_num_seqs 1 reached", finished={"b": Ending("stop", "end")}),
    step(9, {"b": (12, 1, 0), "d": (0, 2, 1)}, finished={"d": Ending("error", None, "broke")}),  # b was still in flight
    EndLine(10, 10, 10.0),
]


@pytest.fixture
def story(tmp_path: Path) -> str:
    path = str(tmp_path / "t.jsonl")
    file = TraceFile(path, 1, HEADER)
    for line in STORY:
        file.write(line)
    file.close()
    return path


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["trace", *arguments])
    return result.exit_code, result.output if result.exception is None or result.exit_code != 1 else str(
        result.exception
    )


# ---- the timeline -----------------------------------------------------------------------------------------------------

Spans = list[tuple[str, int, int]]
ROWS: dict[str, tuple[Spans, tuple[int, str]]] = {
    "a": ([("prefill", 0, 1), ("decode", 2, 5)], (5, "length")),
    "b": (
        [("waiting", 0, 0), ("prefill", 1, 1), ("decode", 2, 2), ("preempted", 3, 5), ("prefill", 6, 6), ("decode", 7, 8)],
        (8, "stop"),
    ),
    "c": ([("waiting", 4, 6)], (7, "abort")),
    "d": ([("waiting", 7, 8), ("prefill", 9, 9)], (9, "error")),
}  # fmt: skip


def spans_of(timeline: Timeline) -> dict[str, tuple[Spans, tuple[int, str] | None]]:
    return {row.request_id: ([(s.kind, s.first, s.last) for s in row.spans], row.end) for row in timeline.rows}


@pytest.mark.parametrize(
    ("first", "last", "max_rows", "only", "names", "num_hidden"),
    [
        (0, 9, 10, (), "abcd", 0),
        (0, 9, 2, (), "ab", 2),
        (0, 9, 10, ("c", "b"), "bc", 0),
        (6, 9, 10, (), "bcd", 0),
    ],
)
def test_timeline_when_some_steps_and_requests_are_wanted_then_their_rows(
    first: int, last: int, max_rows: int, only: tuple[str, ...], names: str, num_hidden: int
) -> None:
    timeline = Timeline(first, last, max_rows, only).feed(STORY)
    assert spans_of(timeline) == {name: ROWS[name] for name in names}
    assert timeline.num_hidden == num_hidden


def test_timeline_when_it_stops_in_the_middle_then_what_lasts_lasts_to_there() -> None:
    found = spans_of(Timeline(0, 4, 10).feed(STORY))
    assert found["b"][0][-1] == ("preempted", 3, 4)
    assert found["c"] == ([("waiting", 4, 4)], None)


def test_timeline_when_the_submission_was_lost_then_rows_begin_with_what_is_known() -> None:
    found = spans_of(Timeline(6, 9, 10).feed(STORY[9:]))
    assert found["b"] == ([("prefill", 6, 6), ("decode", 7, 8)], (8, "stop"))


def test_timeline_of_n_choices_when_cancelled_then_each_has_a_row() -> None:
    lines: list[Line] = [submit(0, "m", 2, n=2), step(0, {"m/0": (0, 2, 1)}, ("m/1",), "x"), CancelLine(1, 1, 1.0, "m")]
    found = spans_of(Timeline(0, 3, 10, ("m",)).feed(lines))
    assert found == {"m/0": ([("prefill", 0, 0)], (1, "abort")), "m/1": ([("waiting", 0, 0)], (1, "abort"))}


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (40, ["a ██▄▄▄▄●", "b ·█▄░░░█▄▄●", "c     ···✕", "d        ··█!"]),
        (12, ["a ██▄▄▄▄●", "b ·█▄░░░█▄▄●", "c     ···✕", "d        ··█!"]),
    ],
)
def test_timeline_in_a_terminal_then_a_character_a_step(width: int, expected: list[str]) -> None:
    found = ["".join(text for text, _ in cells) for cells in text_lines(Timeline(0, 9, 10).feed(STORY), width)]
    assert found[1:] == expected


def test_timeline_in_a_narrow_terminal_when_steps_share_a_place_then_the_rarer_shows() -> None:
    lines: list[Line] = [submit(0, "a", 1), step(0, {"a": (0, 1, 1)})]
    lines += [step(number, {"a": (number, 1, 1)}) for number in range(1, 100)]
    found = ["".join(text for text, _ in cells) for cells in text_lines(Timeline(0, 99, 10).feed(lines), 14)]
    assert found[1] == "a █▄▄▄▄▄▄▄▄▄"


# ---- why --------------------------------------------------------------------------------------------------------------

WHY: dict[str, list[tuple[int, int, str]]] = {
    "a": [(0, 1, "prefill: positions 0 to 19"), (2, 5, "decode: 4 tokens"), (5, 5, "ended: length")],
    "b": [
        (0, 0, f"waits: {BUDGET}"),
        (1, 1, "prefill: positions 0 to 7"),
        (2, 2, "decode: 1 token"),
        (3, 3, PREEMPTED),
        (4, 5, "waits: no free blocks: needs 3, 1 free … no free blocks: needs 3, 2 free"),
        (6, 6, "found 4 tokens in the prefix cache"),
        (6, 6, "prefill: positions 4 to 9"),
        (7, 8, "decode: 2 tokens"),
        (8, 8, "ended: stop, by 'end'"),
    ],
    "c": [
        (4, 5, "waits behind b: no free blocks: needs 3, 1 free … no free blocks: needs 3, 2 free"),
        (6, 6, "waits: max_num_seqs 1 reached"),
        (7, 7, "cancelled"),
    ],
    "d": [
        (7, 8, "waits: max_num_seqs 1 reached"),
        (9, 9, "prefill: positions 0 to 1"),
        (9, 9, "ended: error: broke"),
    ],
}


@pytest.mark.parametrize("request_id", WHY)
def test_why_when_a_request_is_named_then_its_story_step_by_step(request_id: str) -> None:
    found = Why(request_id).feed(STORY).stretches
    assert [(s.first, s.last, s.describe()) for s in found] == WHY[request_id]
    assert all(s.num_steps == s.last - s.first + 1 for s in found)


def test_why_when_a_request_is_named_on_the_command_line_then_its_story_and_the_sums(story: str) -> None:
    code, text = run("why", "b", story)
    assert code == 0
    assert "b came before step 0" in text
    assert "  4–5    2.000  waits: no free blocks: needs 3, 1 free … no free blocks: needs 3, 2 free" in text
    assert "In all: wait 3 steps, 2.500 s; prefill 2 steps" in text
    code, text = run("why", "nobody", story)
    assert code == 1
    assert "no request 'nobody'" in text


# ---- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]),
        ({"first": 3, "last": 5}, ["3", "4", "5"]),
        ({"only": ["c"]}, ["4", "5", "6", "7"]),
    ],
)
def test_table_when_filtered_then_its_steps(options: dict[str, Any], steps: list[str]) -> None:
    rows = table_rows(STORY, **{"first": 0, "last": 99, **options})
    assert [row.cells()[0] for row in rows] == steps


def test_table_when_decode_steps_are_alike_then_joined_unless_every_step_is_wanted() -> None:
    lines: list[Line] = [submit(0, "a", 1), *(step(number, {"a": (number, 1, 1)}) for number in range(10))]
    cells = [row.cells() for row in table_rows(lines, 0, 99)]
    assert [(cell[0], cell[-1]) for cell in cells] == [("0", "a comes: 1 tokens"), ("1–9", "9 steps alike")]
    assert len(list(table_rows(lines, 0, 99, joined=False))) == 10


def test_show_when_called_then_table_picture_and_legend(story: str) -> None:
    code, text = run("show", story)
    assert code == 0
    for part in (
        "cached: b (4)",
        "preempted: b",
        "c cancelled; d comes: 2 tokens",
        "ended: a (length)",
        "b ·█▄░░░█▄▄●",
        "█ prefill chunk",
    ):
        assert part in text
    assert "not complete" not in text
    assert "… and more from step 3 on" in run("show", story, "--limit", "3")[1]
    assert "there are no steps 9 to 2" in run("show", story, "--from", "9", "--to", "2")[1]


# ---- pictures ---------------------------------------------------------------------------------------------------------


def test_picture_as_svg_when_ids_are_hostile_then_well_formed_and_complete(tmp_path: Path) -> None:
    name = "<b>&\"'\x00\x1b[31m</b>"
    path, output = str(tmp_path / "t.jsonl"), tmp_path / "t.svg"
    file = TraceFile(path, 1, HEADER)
    file.write(submit(0, name, 4))
    file.write(step(0, {name: (0, 4, 1)}, finished={name: Ending("stop")}))
    file.close()
    code, text = run("show", path, "-o", str(output))
    assert code == 0, text
    root = ET.fromstring(output.read_text(encoding="utf-8"))
    hints = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert hints == ["<b>&\"'��[31m</b>: prefill chunk, step 0"]


def test_picture_when_drawn_then_each_span_is_a_box_at_its_steps() -> None:
    timeline = Timeline(0, 9, 10).feed(STORY)
    boxes = {shape.hint: shape for shape in drawing.draw(timeline, "t", "s").shapes if getattr(shape, "hint", "")}
    assert len(boxes) == sum(len(spans) for spans, _ in ROWS.values())
    a, b = boxes["a: decode, steps 2 to 5"], boxes["b: preempted: waits without blocks, steps 3 to 5"]
    assert isinstance(a, drawing.Box)
    assert isinstance(b, drawing.Box)
    assert a.x < b.x < a.x + a.width
    assert b.fill != a.fill
    assert b.y > a.y


def test_picture_as_png_when_matplotlib_is_there_or_not_then_written_or_said(
    story: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "t.png"
    if importlib.util.find_spec("matplotlib") is not None:
        assert run("show", story, "-o", str(output))[0] == 0
        assert output.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install"):
        drawing.write_png(drawing.Drawing(1, 1, []), output)
    assert "must end in .svg or .png" in run("show", story, "-o", str(tmp_path / "t.gif"))[1]
    assert "cannot be written" in run("show", story, "-o", str(tmp_path / "missing" / "t.svg"))[1]


def test_picture_when_nothing_happened_then_drawn_all_the_same(tmp_path: Path) -> None:
    path = str(tmp_path / "t.jsonl")
    TraceFile(path, 1, HEADER).close()
    assert run("show", path)[0] == 0
    assert run("show", path, "-o", str(tmp_path / "t.svg"))[0] == 0


# ---- many steps -------------------------------------------------------------------------------------------------------


def _long(num_steps: int) -> Iterator[Line]:
    for number in range(num_steps):
        name = f"r{number // 10}"
        if number % 10 == 0:
            yield submit(number, name, 4)
        finished = {name: Ending("length")} if number % 10 == 9 else None
        yield step(number, {name: (4 + number, 1, 1)}, finished=finished)


def test_long_trace_when_shown_then_memory_does_not_grow_with_it() -> None:
    peaks = []
    for num_steps in (1_000, 10_000):
        tracemalloc.start()
        Timeline(0, num_steps, 40).feed(_long(num_steps))
        Why("r3").feed(_long(num_steps))
        for _ in table_rows(_long(num_steps), 0, num_steps):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0] + 300_000, peaks


# ---- replay -----------------------------------------------------------------------------------------------------------


def test_replay_on_the_command_line_when_equal_different_or_refused_then_text_and_status(tmp_path: Path) -> None:
    model, path = str(build_tiny_checkpoint(tmp_path, "llama")), tmp_path / "t.jsonl"
    settings: dict[str, Any] = {"num_blocks": 32, "max_model_len": 64, "num_threads": 1}
    with LLM(model, trace_path=str(path), trace_logits=True, **settings) as llm:
        llm.generate([list(range(5, 25))] * 3, SamplingParams(max_tokens=5))
    code, text = run("replay", str(path))
    assert code == 0
    assert text.startswith("EQUAL, step by step: 3 requests")
    code, text = run("replay", str(path), "--max-num-batched-tokens", "6", "--no-enable-prefix-caching")
    assert code == 0
    assert "EQUAL, request by request" in text
    lines = path.read_text().splitlines(keepends=True)
    edited = next(index for index, line in enumerate(lines) if '"kind":"decode"' in line)
    lines[edited] = lines[edited].replace('"logits":[[', '"logits":[[1')
    path.write_text("".join(lines))
    result = CliRunner().invoke(app, ["trace", "replay", str(path)])
    assert result.exit_code == 1
    assert "DIFFERENT at step 1, request req-0: checksums of the logits from position 21 on" in result.output
    path.write_text("".join(lines[1:]))
    assert "a trace begins with a header" in run("replay", str(path))[1]


def test_chain_of_story_when_read_back_then_the_same(story: str) -> None:
    from pellucid.trace.reader import TraceReader

    trace = TraceReader(story)
    assert [placed.line for placed in chain(trace.lines())] == STORY
