"""The timeline of a trace as a picture: shapes first, then SVG, or PNG through matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from pellucid.errors import ConfigError
from pellucid.files import whole_file
from pellucid.trace.timeline import KIND_TEXTS, Kind, Row, Timeline
from pellucid.trace.timeline_text import ENDS

WIDTH, LEFT, RIGHT, TOP = 1120.0, 132.0, 24.0, 92.0
_STRIP, _GAP = 56.0, 30.0  # height of the strips below the rows, and what is left free above each
_PAPER, _INK, _FAINT, _RULE = "#ffffff", "#1f2430", "#697386", "#e6e9ef"
COLOURS: dict[Kind, str] = {
    "waiting": "#c3cad6",
    "stalled": "#b7dfcf",
    "decode": "#2a9d74",
    "prefill": "#3d6fd8",
    "preempted": "#e8663d",
}
# Part of a row's height: what computes is thick, what waits is thin.
_THICKNESS: dict[Kind, float] = {"waiting": 0.16, "stalled": 0.4, "decode": 0.62, "prefill": 0.86, "preempted": 0.28}
_END_COLOURS = {"●": "#1b6b4f", "✕": "#c0392b", "!": "#c0392b"}


@dataclass(frozen=True)
class Box:
    """A filled rectangle; `hint` is shown where the pointer rests on it."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    radius: float = 0.0
    hint: str = ""


@dataclass(frozen=True)
class Label:
    """A text; `anchor` is start, middle or end; y is its middle."""

    x: float
    y: float
    text: str
    size: float = 11.0
    fill: str = _INK
    anchor: str = "start"
    weight: str = "normal"


@dataclass(frozen=True)
class Cross:
    """The mark of what was cancelled or failed."""

    x: float
    y: float
    size: float
    fill: str


Shape = Box | Label | Cross


@dataclass(frozen=True)
class Drawing:
    """Shapes on a page, the first below the others."""

    width: float
    height: float
    shapes: list[Shape]


def draw(timeline: Timeline, title: str, subtitle: str) -> Drawing:
    """The rows of a timeline, and below them the tokens of each step and the blocks that were held."""
    rows = timeline.rows
    pitch = min(18.0, max(5.0, 900.0 / max(1, len(rows))))
    bottom = TOP + pitch * len(rows)
    height = bottom + 2 * (_STRIP + _GAP) + 40
    scale = _Scale(timeline.first, timeline.last)
    shapes: list[Shape] = [Box(0, 0, WIDTH, height, _PAPER)]
    shapes += [Label(24, 26, title, 16, weight="bold"), Label(24, 46, subtitle, 11, _FAINT)]
    shapes += _legend(24, 68)
    shapes += _grid(scale, TOP, height - 34)
    for index, row in enumerate(rows):
        shapes += _row(row, scale, TOP + pitch * index, pitch)
    shapes += _strips(timeline, bottom)
    return Drawing(WIDTH, height, shapes)


class _Scale:
    """Steps to places on the page."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, max(first, last)
        self.step_width = (WIDTH - LEFT - RIGHT) / (self.last - self.first + 1)

    def x(self, step: float) -> float:
        """The left edge of a step that is in the picture."""
        return LEFT + (min(max(step, self.first), self.last + 1) - self.first) * self.step_width

    def marks(self) -> list[int]:
        """Round numbers of steps, about ten of them."""
        span = self.last - self.first + 1
        unit = 1
        while span / unit > 12:
            unit = unit * 2 if str(unit)[0] == "1" else unit * 5 // 2 if str(unit)[0] == "2" else unit * 2
        return list(range(-(-self.first // unit) * unit, self.last + 1, unit))


def _legend(x: float, y: float) -> Iterator[Shape]:
    for kind in ("prefill", "decode", "stalled", "waiting", "preempted"):
        thick = 12 * _THICKNESS[kind]
        yield Box(x, y - thick / 2, 18, thick, COLOURS[kind], 1.5)
        yield Label(x + 24, y, KIND_TEXTS[kind], 11, _FAINT)
        x += 44 + 5.7 * len(KIND_TEXTS[kind])
    for mark, _, text in dict.fromkeys(ENDS.values()):
        yield _end_mark(mark, x + 4, y, 7)
        yield Label(x + 14, y, text, 11, _FAINT)
        x += 36 + 5.7 * len(text)


def _grid(scale: _Scale, top: float, bottom: float) -> Iterator[Shape]:
    for step in scale.marks():
        x = scale.x(step)
        yield Box(x, top - 6, 1, bottom - top + 6, _RULE)
        yield Label(x, bottom + 12, f"{step:,}", 10, _FAINT, "middle")
    yield Label(LEFT - 10, bottom + 12, "step", 10, _FAINT, "end")


def _row(row: Row, scale: _Scale, top: float, pitch: float) -> Iterator[Shape]:
    middle = top + pitch / 2
    if pitch >= 9:
        text = row.request_id if len(row.request_id) <= 18 else f"{row.request_id[:8]}…{row.request_id[-8:]}"
        yield Label(LEFT - 10, middle, text, min(11.0, pitch * 0.68), _INK, "end")
    for span in row.spans:
        if span.last < scale.first or span.first > scale.last:
            continue
        thick = pitch * _THICKNESS[span.kind]
        x, end = scale.x(span.first), scale.x(span.last + 1)
        gap = min(1.0, scale.step_width * 0.15)
        steps = f"step {span.first:,}" if span.first == span.last else f"steps {span.first:,} to {span.last:,}"
        hint = f"{row.request_id}: {KIND_TEXTS[span.kind]}, {steps}"
        yield Box(x, middle - thick / 2, max(0.4, end - x - gap), thick, COLOURS[span.kind], min(1.5, thick / 4), hint)
    if row.end is not None and scale.first <= row.end[0] <= scale.last:
        x = scale.x(row.end[0] + 1 if row.spans and row.spans[-1].last >= row.end[0] else row.end[0])
        yield _end_mark(ENDS[row.end[1]][0], x + 3, middle, min(7.0, pitch * 0.45))


def _end_mark(mark: str, x: float, y: float, size: float) -> Shape:
    if mark == "●":
        return Box(x - size / 2, y - size / 2, size, size, _END_COLOURS[mark], size / 2)
    if mark == "!":
        return Label(x, y, mark, 2 * size, _END_COLOURS[mark], "middle", "bold")
    return Cross(x, y, size, _END_COLOURS[mark])


def _strips(timeline: Timeline, bottom: float) -> Iterator[Shape]:
    """Tokens a step, prompts over answers; then the part of all blocks that is held."""
    loads = timeline.loads
    width = (WIDTH - LEFT - RIGHT) / len(loads)
    most = max(
        1.0, *[(load.prefill_tokens + load.decode_tokens) / load.num_steps for load in loads if load.num_steps], 0
    )
    usage = max(load.usage for load in loads)
    tokens_at, blocks_at = bottom + _GAP + _STRIP, bottom + 2 * (_GAP + _STRIP)
    yield Label(LEFT - 10, tokens_at - _STRIP / 2 - 6, "tokens a step", 11, _INK, "end")
    yield Label(LEFT - 10, tokens_at - _STRIP / 2 + 8, f"at most {most:,.0f}", 10, _FAINT, "end")
    yield Label(LEFT - 10, blocks_at - _STRIP / 2 - 6, "blocks held", 11, _INK, "end")
    yield Label(LEFT - 10, blocks_at - _STRIP / 2 + 8, f"at most {usage:.0%}", 10, _FAINT, "end")
    yield Box(LEFT, tokens_at, WIDTH - LEFT - RIGHT, 1, _FAINT)
    yield Box(LEFT, blocks_at, WIDTH - LEFT - RIGHT, 1, _FAINT)
    yield Box(LEFT, blocks_at - _STRIP, WIDTH - LEFT - RIGHT, 0.6, _RULE)
    gap = min(1.0, width * 0.15)
    for index, load in enumerate(loads):
        if load.num_steps:
            x, per_token = LEFT + index * width, _STRIP / most / load.num_steps
            low, high = load.decode_tokens * per_token, load.prefill_tokens * per_token
            yield Box(x, tokens_at - low, width - gap, low, COLOURS["decode"])
            yield Box(x, tokens_at - low - high, width - gap, high, COLOURS["prefill"])
            yield Box(x, blocks_at - load.usage * _STRIP, width - gap, load.usage * _STRIP, "#8e7cc3")


# ---- SVG --------------------------------------------------------------------------------------------------------------


def to_svg(drawing: Drawing) -> str:
    """The drawing as a document of its own, without scripts and fonts."""
    size = f'width="{drawing.width:g}" height="{drawing.height:g}" viewBox="0 0 {drawing.width:g} {drawing.height:g}"'
    font = "font-family=\"system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif\""
    body = "\n".join(_SVG[type(shape)](shape) for shape in drawing.shapes if not _is_empty(shape))
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>\n{body}\n</svg>\n'


def _is_empty(shape: Shape) -> bool:
    return isinstance(shape, Box) and (shape.height <= 0 or shape.width <= 0)


def _box_svg(box: Box) -> str:
    radius = f' rx="{box.radius:.2f}"' if box.radius else ""
    place = f'x="{box.x:.2f}" y="{box.y:.2f}" width="{box.width:.2f}" height="{box.height:.2f}"'
    hint = f"><title>{_xml(box.hint)}</title></rect>" if box.hint else "/>"
    return f'<rect {place} fill="{box.fill}"{radius}{hint}'


def _label_svg(label: Label) -> str:
    place = f'x="{label.x:.2f}" y="{label.y:.2f}" font-size="{label.size:.1f}" text-anchor="{label.anchor}"'
    weight = "" if label.weight == "normal" else f' font-weight="{label.weight}"'
    return f'<text {place} fill="{label.fill}" dominant-baseline="central"{weight}>{_xml(label.text)}</text>'


def _cross_svg(cross: Cross) -> str:
    half, x, y = cross.size / 2, cross.x, cross.y
    path = (
        f"M{x - half:.2f} {y - half:.2f}l{2 * half:.2f} {2 * half:.2f}m0 {-2 * half:.2f}l{-2 * half:.2f} {2 * half:.2f}"
    )
    return f'<path d="{path}" stroke="{cross.fill}" stroke-width="1.8" stroke-linecap="round"/>'


_SVG: dict[type[Any], Callable[[Any], str]] = {Box: _box_svg, Label: _label_svg, Cross: _cross_svg}


def _xml(text: str) -> str:
    """A text that XML can carry: it has no word for most control characters."""
    return escape("".join(c if c.isprintable() else "�" for c in text))


# ---- PNG --------------------------------------------------------------------------------------------------------------


def write_png(drawing: Drawing, path: Path) -> None:
    """Writes the drawing at twice its size.

    Raises:
        ConfigError: matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyBboxPatch, Rectangle
    except ImportError:
        raise ConfigError(
            "a .png needs matplotlib, which is not installed: pip install 'pellucid[bench]', or write an .svg, which needs nothing"
        ) from None
    figure = Figure(figsize=(drawing.width / 100, drawing.height / 100), dpi=200)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, drawing.width)
    axes.set_ylim(drawing.height, 0)
    axes.set_axis_off()
    anchors = {"start": "left", "middle": "center", "end": "right"}
    for shape in drawing.shapes:
        if isinstance(shape, Label):
            axes.text(
                shape.x,
                shape.y,
                shape.text.replace("$", r"\$"),
                fontsize=shape.size * 0.72,
                color=shape.fill,
                ha=anchors[shape.anchor],
                va="center",
                weight=shape.weight,
            )
        elif isinstance(shape, Cross):
            half = shape.size / 2
            for way in (1, -1):
                ends = [shape.x - half, shape.x + half], [shape.y - way * half, shape.y + way * half]
                axes.plot(*ends, color=shape.fill, linewidth=1.3, solid_capstyle="round")
        elif shape.radius > 2 and not _is_empty(shape):
            corner = f"round,pad=0,rounding_size={shape.radius}"
            axes.add_patch(FancyBboxPatch((shape.x, shape.y), shape.width, shape.height, corner, fc=shape.fill, lw=0))
        elif not _is_empty(shape):
            axes.add_patch(Rectangle((shape.x, shape.y), shape.width, shape.height, fc=shape.fill, lw=0))
    with whole_file(path) as file:
        figure.savefig(file, format="png")
