"""The timeline of a trace in a terminal: a line a request, a character a step or several."""

from __future__ import annotations

from collections.abc import Iterator

from pellucid.trace.timeline import KIND_TEXTS, KINDS, Kind, Row, Timeline

GLYPHS: dict[Kind, str] = {"waiting": "·", "stalled": "╌", "decode": "▄", "prefill": "█", "preempted": "░"}
STYLES: dict[Kind, str] = {
    "waiting": "bright_black",
    "stalled": "green",
    "decode": "green",
    "prefill": "blue",
    "preempted": "red",
}
# finish reason: the mark behind the last step, its style, and what it means
ENDS = {
    "stop": ("●", "green", "finished"),
    "length": ("●", "green", "finished"),
    "abort": ("✕", "red", "cancelled"),
    "error": ("!", "red", "failed"),
}
Cell = tuple[str, str]  # a character and its style
_RANK = {kind: rank for rank, kind in enumerate(KINDS)}


def legend() -> list[Cell]:
    """What the characters mean."""
    cells: list[Cell] = []
    for kind in KINDS:
        cells += [(GLYPHS[kind], STYLES[kind]), (f" {KIND_TEXTS[kind]}   ", "")]
    for mark, style, text in dict.fromkeys(ENDS.values()):
        cells += [(mark, style), (f" {text}   ", "")]
    return cells


def lines(timeline: Timeline, width: int) -> Iterator[list[Cell]]:
    """A scale, then a line for each row; at most `width` characters wide."""
    rows = timeline.rows
    label = min(24, max([len(row.request_id) for row in rows], default=0))
    columns = Columns(timeline.first, timeline.last, max(10, width - label - 3))
    yield [(" " * (label + 1) + columns.scale(), "bright_black")]
    for row in rows:
        yield [(f"{_short(row.request_id, label):<{label}} ", ""), *_cells(row, columns)]


class Columns:
    """Which steps stand in which column: one each where there is room."""

    def __init__(self, first: int, last: int, width: int) -> None:
        self.first, self.last = first, max(first, last)
        self.count = min(width, self.last - first + 1)

    def of(self, step: int) -> int:
        """The column of a step; steps before or behind the picture have the nearest."""
        step = min(max(step, self.first), self.last)
        return (step - self.first) * self.count // (self.last - self.first + 1)

    def scale(self) -> str:
        """Numbers of steps, each at its column."""
        text, per_column = "", (self.last - self.first + 1) / self.count
        while len(text) < self.count:
            mark = f"{round(self.first + len(text) * per_column):,}"
            if len(text) + len(mark) > self.count:
                break
            text += mark + " " * max(1, 10 - len(mark))
        return text.rstrip()


def _cells(row: Row, columns: Columns) -> list[Cell]:
    found: list[Cell] = [(" ", "")] * (columns.count + 1)
    ranks = [-1] * columns.count
    for span in row.spans:
        if span.last < columns.first or span.first > columns.last:
            continue
        for column in range(columns.of(span.first), columns.of(span.last) + 1):
            if _RANK[span.kind] >= ranks[column]:
                ranks[column] = _RANK[span.kind]
                found[column] = (GLYPHS[span.kind], STYLES[span.kind])
    if row.end is not None and row.end[0] <= columns.last:
        mark, style, _ = ENDS[row.end[1]]
        column = columns.of(row.end[0])
        found[column + (ranks[column] >= 0)] = (mark, style)
    return _joined(found)


def _joined(cells: list[Cell]) -> list[Cell]:
    joined: list[Cell] = []
    for text, style in cells:
        if joined and joined[-1][1] == style:
            joined[-1] = (joined[-1][0] + text, style)
        else:
            joined.append((text, style))
    if joined and not joined[-1][1]:
        joined[-1] = (joined[-1][0].rstrip(), "")
    return joined


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
