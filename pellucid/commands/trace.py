"""`pellucid trace`: what a trace shows, why a request waited, and the same run again."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pellucid.commands.options import engine_kwargs, engine_parameters, with_options
from pellucid.errors import InvalidRequestError, StorageError
from pellucid.files import write_whole

if TYPE_CHECKING:
    from rich.text import Text

    from pellucid.replay import ReplayReport
    from pellucid.trace.lines import Line
    from pellucid.trace.reader import TraceReader
    from pellucid.trace.timeline import Timeline

app = typer.Typer(
    help="Read the file that `--trace FILE.jsonl` wrote: show it, explain it, run it again.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
File = Annotated[str, typer.Argument(help="The trace; its older parts FILE.1 and so on are found beside it.")]
First = Annotated[int | None, typer.Option("--from", min=0, help="First step.")]
Last = Annotated[int | None, typer.Option("--to", min=0, help="Last step.")]
Request = Annotated[list[str] | None, typer.Option("--request", help="This request alone; may be given again.")]

_MAX_PICTURE_ROWS = 240
_DRAWINGS = (".svg", ".png")


@app.command()
def show(
    file: File,
    first: First = None,
    last: Last = None,
    request: Request = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Most rows of the table.")] = 60,
    max_requests: Annotated[int, typer.Option("--max-requests", min=1, help="Most rows in the terminal.")] = 40,
    every_step: Annotated[bool, typer.Option("--every-step", help="Join no steps that are alike.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Draw the timeline into this .svg or .png.")
    ] = None,
) -> None:
    """The steps as a table, and who did what when as a picture."""
    from pellucid.trace.reader import TraceReader

    if output is not None and output.suffix not in _DRAWINGS:
        raise InvalidRequestError(
            "output", (f"{output} ends in {output.suffix!r}",), limit=f"it must end in {' or '.join(_DRAWINGS)}"
        )
    trace = TraceReader(file)
    steps = (first or 0, trace.last_step() if last is None else last)
    if steps[0] > steps[1]:
        raise InvalidRequestError(
            None, f"there are no steps {steps[0]:,} to {steps[1]:,}", limit=f"the last is {trace.last_step():,}"
        )
    only = request or []
    if output is not None:
        _draw(trace, steps, only, output)
        return
    print(_title(trace))
    print()
    _show_table(trace, steps, only, limit, joined=not every_step)
    print()
    _show_timeline(trace, steps, only, max_requests)
    if trace.end:
        print(f"\nThe trace is not complete: {trace.end}.")


@app.command()
def why(
    request: Annotated[str, typer.Argument(help="Id of the request.")],
    file: File,
) -> None:
    """What a request waited for and what it was given, step by step."""
    from pellucid.trace.reader import TraceReader
    from pellucid.trace.why import Why

    trace = TraceReader(file)
    found = Why(request).feed(_lines(trace))
    if not found.stretches and found.submitted is None:
        raise InvalidRequestError(
            "request", (f"the trace has no request {request!r}: `pellucid trace show` names some",)
        )
    print(_why_head(found))
    rows: list[tuple[str, ...]] = [("steps", "seconds", "what")]
    for stretch in found.stretches:
        steps = f"{stretch.first:,}" if stretch.first == stretch.last else f"{stretch.first:,}–{stretch.last:,}"
        text = stretch.describe() if stretch.choice == request else f"{stretch.choice}: {stretch.describe()}"
        rows.append((steps, f"{stretch.ended - stretch.began:.3f}", text))
    _print_table(rows)
    waits: dict[str, list[float]] = {}
    for stretch in found.stretches:
        total = waits.setdefault(stretch.kind, [0, 0.0])
        total[0] += stretch.num_steps
        total[1] += stretch.ended - stretch.began
    parts = [
        f"{kind} {steps:,.0f} steps, {seconds:.3f} s" for kind, (steps, seconds) in waits.items() if kind in _TIMED
    ]
    print(f"\nIn all: {'; '.join(parts) or 'nothing happened to it'}.")


_TIMED = ("wait", "prefill", "decode", "stalled", "preempted")


def _replay_parameters() -> list[inspect.Parameter]:
    """The engine's options; what is not given is as it was recorded."""
    found = []
    for parameter in engine_parameters():
        if parameter.name in ("trace_path", "trace_max_mb"):
            continue
        option = parameter.default
        option.default = None
        option.help = option.help.partition(" [")[0]
        kind = bool | None if parameter.annotation is bool else parameter.annotation
        found.append(parameter.replace(annotation=kind, default=option))
    return found


@app.command()
@with_options(_replay_parameters())
def replay(
    file: File,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Where the model lies now.")] = None,
    **options: Any,
) -> None:
    """Run a trace again and compare it, bit by bit; exits with 1 at the first difference.

    Engine options stand over those of the recording. With one that changes plans, such as --max-num-batched-tokens, tokens and
    checksums of logits are compared request by request; without, every step must be the same.
    """
    from pellucid.commands.load import packing_progress
    from pellucid.replay import replay as run_again

    with packing_progress() as progress:
        report = run_again(file, model=model, progress=progress, **engine_kwargs(options))
    print(_result(report))
    if not report.is_equal:
        raise typer.Exit(1)


# ---- parts of show ----------------------------------------------------------------------------------------------------


def _lines(trace: TraceReader) -> Iterator[Line]:
    return (placed.line for placed in trace.lines())


def _title(trace: TraceReader) -> str:
    header = trace.header
    settings = header.config
    return (
        f"{header.model.name}, pellucid {header.pellucid}: policy {settings.get('policy')}, max_num_seqs "
        f"{settings.get('max_num_seqs')}, {settings.get('max_num_batched_tokens')} tokens a step, "
        f"{header.resolved.num_blocks:,} blocks of {header.resolved.block_size}"
    )


def _show_table(trace: TraceReader, steps: tuple[int, int], only: list[str], limit: int, *, joined: bool) -> None:
    from pellucid.trace.table import HEAD, table_rows

    rows = table_rows(_lines(trace), *steps, only, joined=joined)
    shown = list(itertools.islice(rows, limit))
    _print_table([HEAD, *(row.cells() for row in shown)], num_right=7)
    more = next(rows, None)
    if more is not None:
        print(f"… and more from step {more.first.step:,} on: --from, --to or --limit show them")


def _print_table(rows: list[tuple[str, ...]], num_right: int = 2) -> None:
    """Columns: the first `num_right` to the right, but texts in the second of them to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[:num_right], widths, strict=False)]
        print("  ".join([*cells, *row[num_right:]]).rstrip())


def _show_timeline(trace: TraceReader, steps: tuple[int, int], only: list[str], max_requests: int) -> None:
    from rich.console import Console
    from rich.text import Text

    from pellucid.trace.timeline_text import legend, lines

    console = Console(highlight=False, soft_wrap=True)
    timeline = _timeline(trace, steps, only, max_requests)
    for cells in lines(timeline, console.width):
        console.print(_text(Text(), cells))
    if timeline.num_hidden:
        print(f"… and {timeline.num_hidden:,} more: --max-requests, --from and --to, or --request show them")
    console.print(_text(Text(), legend()))


def _text(text: Text, cells: list[tuple[str, str]]) -> Text:
    for cell, style in cells:
        text.append(cell, style=style or None)
    return text


def _timeline(trace: TraceReader, steps: tuple[int, int], only: list[str], max_rows: int) -> Timeline:
    from pellucid.trace.timeline import Timeline

    return Timeline(*steps, max_rows, only).feed(_lines(trace))


def _draw(trace: TraceReader, steps: tuple[int, int], only: list[str], output: Path) -> None:
    from pellucid.trace.timeline_drawing import draw, to_svg, write_png

    timeline = _timeline(trace, steps, only, _MAX_PICTURE_ROWS)
    hidden = f", {timeline.num_hidden:,} more not drawn" if timeline.num_hidden else ""
    count = len(timeline.rows)
    drawing = draw(timeline, _title(trace), f"{count:,} requests{hidden}; steps {steps[0]:,} to {steps[1]:,}")
    try:
        if output.suffix == ".png":
            write_png(drawing, output)
        else:
            write_whole(output, to_svg(drawing))
    except StorageError as error:
        raise InvalidRequestError("output", (str(error),)) from error
    print(f"{output}: {count:,} requests{hidden}", file=sys.stderr)


# ---- texts ------------------------------------------------------------------------------------------------------------


def _why_head(found: Any) -> str:
    line = found.submitted
    if line is None:
        return f"{found.request_id} came before the trace begins.\n"
    params = line.params
    most = params.get("max_tokens")
    return (
        f"{line.request_id} came before step {line.step:,}, {line.at:.3f} s after the engine began: "
        f"{len(line.prompt_token_ids):,} prompt tokens, max_tokens {most}, n {params.get('n')}, priority {line.priority}.\n"
    )


def _result(report: ReplayReport) -> str:
    counts = (
        f"{report.num_requests:,} requests, {report.num_cancelled:,} cancels, {report.num_preempted:,} preemptions, "
        f"{report.num_steps:,} steps, {report.num_tokens:,} tokens"
    )
    logits = f", {report.num_logits:,} checksums of logits" if report.compares_logits else "; logits were not traced"
    how = "step by step" if report.compares_plans else "request by request, for the settings change plans"
    if report.difference is not None:
        from pellucid.version import VERSION

        other = report.recorded_by != VERSION
        version = f"; it was recorded by pellucid {report.recorded_by}, this is {VERSION}" if other else ""
        return f"DIFFERENT at {report.difference}\nUp to there equal ({how}): {counts}{logits}{version}"
    end = f"\nThe trace is not complete: {report.cut_off}. Up to there all is equal." if report.cut_off else ""
    return f"EQUAL, {how}: {counts}{logits}{end}"
