"""`pellucid bench serve`: a load against any OpenAI-compatible server. Options and figures have vLLM's names."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from pellucid.bench.serve_options import ServeOptions, api_key_of
from pellucid.commands.options import with_options
from pellucid.errors import InvalidRequestError
from pellucid.files import write_whole
from pellucid.json_text import dumps

if TYPE_CHECKING:
    import asyncio

    from pellucid.bench.serve_bench import ServeResult
    from pellucid.bench.serve_client import Answer

_RESULT = "Result"


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    is_list = field.name == "goodput"  # click knows no tuple of any length
    default = None if is_list else field.default
    option = typer.Option(
        default,
        f"--{field.name.replace('_', '-')}",
        help=field.metadata["help"],
        rich_help_panel=field.metadata["panel"],
    )
    hint = list[str] | None if is_list else hint
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=hint)


def _load_parameters() -> list[inspect.Parameter]:
    """An option for each field of `ServeOptions`."""
    hints = get_type_hints(ServeOptions)
    return [_parameter(field, hints[field.name]) for field in dataclasses.fields(ServeOptions)]


@with_options(_load_parameters())
def serve(
    pairs: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="")] = None,
    save_result: Annotated[
        bool, typer.Option("--save-result", help="Write the figures as JSON.", rich_help_panel=_RESULT)
    ] = False,
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="The same, with each request's own.", rich_help_panel=_RESULT)
    ] = False,
    result_dir: Annotated[
        Path, typer.Option("--result-dir", help="Folder of the JSON.", rich_help_panel=_RESULT)
    ] = Path("."),
    result_filename: Annotated[
        str | None,
        typer.Option("--result-filename", help="Of backend, rate, model and date by default.", rich_help_panel=_RESULT),
    ] = None,
    plot_timeline: Annotated[
        Path | None,
        typer.Option("--plot-timeline", help="PNG or SVG: requests over time (matplotlib).", rich_help_panel=_RESULT),
    ] = None,
    **options: Any,
) -> None:
    """Load any OpenAI-compatible server and measure it: latencies to and between tokens, throughput, goodput."""
    import asyncio  # tens of milliseconds, which no other verb is to pay

    from pellucid.bench.serve_timeline import check_timeline, draw_timeline

    options["goodput"] = _goodput(options["goodput"], pairs)
    options["api_key"] = api_key_of(options["api_key"])
    asked = ServeOptions(**options)
    is_saved = save_result or save_detailed or result_filename is not None
    if plot_timeline is not None:
        check_timeline(plot_timeline)
    if is_saved and not result_dir.is_dir():
        raise InvalidRequestError("result_dir", f"{result_dir} does not exist")
    result = asyncio.run(_run(asked))
    _show(result)
    if is_saved:
        target = result_dir / (result_filename or _file_name(result.report))
        found = result.detailed() if save_detailed else result.report
        write_whole(target, dumps(found, indent=1) + "\n")
        _say(f"figures: {target}")
    if plot_timeline is not None:
        draw_timeline(result.run, plot_timeline, f"{result.report['model_id']}: {len(result.run.answers)} requests")
        _say(f"timeline: {plot_timeline}")
    if result.run.was_interrupted:
        raise typer.Exit(130)
    if not result.report["completed"]:
        raise typer.Exit(1)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def _run(options: ServeOptions) -> ServeResult:
    import asyncio

    from pellucid.bench.serve_bench import run_bench

    stop = asyncio.Event()
    with _interruption(stop), _progress() as (start, advance):
        return await run_bench(options, note=_say, on_start=start, on_answer=advance, stop=stop)


@contextlib.contextmanager
def _interruption(stop: asyncio.Event) -> Iterator[None]:
    """Ctrl-C ends the load, so that what was measured is shown; a second one ends the command."""
    import asyncio

    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        _say("interrupted: what has been measured follows")
        stop.set()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextlib.contextmanager
def _progress() -> Iterator[tuple[Callable[[int], None], Callable[[Answer], None]]]:
    """(start with a number of requests, one has ended) of a bar on standard error, when that is a terminal."""
    if not sys.stderr.isatty():
        yield (lambda count: None), (lambda answer: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as bar:
        task, failed = bar.add_task("", total=None), 0

        def advance(answer: Answer) -> None:
            nonlocal failed
            failed += bool(answer.error)
            bar.update(task, advance=1, description=f"{failed} failed" if failed else "")

        yield (lambda count: bar.update(task, total=count)), advance


def _show(result: ServeResult) -> None:
    from pellucid.bench.serve_metrics import text_of

    report = result.report
    print(f"{report['model_id']} at {report['base_url']}, {report['dataset_name']}, prompts as {report['prompt_form']}")
    print(text_of(report))
    for title in ("failures", "protocol_problems"):
        for text, count in report[title].items():
            _say(f"{title.replace('_', ' ')}: {count} x {text}")


def _file_name(report: dict[str, Any]) -> str:
    limit = report["max_concurrency"]
    most = f"-concurrency{limit}" if limit is not None else ""
    model = report["model_id"].rsplit("/", 1)[-1]
    return f"{report['backend']}-{report['request_rate']}qps{most}-{model}-{report['date']}.json"


def _goodput(named: list[str] | None, further: list[str] | None) -> tuple[str, ...]:
    """Of `--goodput a:1 b:2`, as vLLM takes it, the second pair arrives as an argument of the command."""
    if further and not named:
        raise InvalidRequestError(None, f"unexpected argument {further[0]!r}")
    return (*(named or ()), *(further or ()))
