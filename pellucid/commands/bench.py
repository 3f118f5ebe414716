"""`pellucid bench`: one function per verb. Options carry vLLM's names where it has them; engine options are those of every verb."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pellucid.commands.bench_serve import serve
from pellucid.commands.options import engine_kwargs, engine_parameters, with_options
from pellucid.errors import InvalidRequestError
from pellucid.files import write_whole
from pellucid.json_text import dumps

app = typer.Typer(
    help="Measure latency, throughput, start-up and the batch curve of a model on this machine, or any server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command()(serve)
Model = Annotated[str | None, typer.Option("--model", "-m", help="As for generate; a small model by default.")]
InputLen = Annotated[int, typer.Option("--input-len", help="Tokens of each prompt.")]
OutputLen = Annotated[int, typer.Option("--output-len", help="Tokens made for each.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the random prompts.")]
OutputJson = Annotated[Path | None, typer.Option("--output-json", help="File that gets all figures.")]


def _parameters() -> list[inspect.Parameter]:
    """The engine's options; prompts are not shared through the prefix cache unless asked for."""
    found = engine_parameters()
    for parameter in found:
        if parameter.name == "enable_prefix_caching":
            parameter.default.default = False
            parameter.default.help = "Share the blocks of equal prompt beginnings. [False in benchmarks]"
    return found


def _engine(options: dict[str, Any], least_seqs: int = 1) -> dict[str, Any]:
    """What was asked of the engine; room for `least_seqs` sequences unless a limit was given."""
    found = engine_kwargs(options)
    if "max_num_seqs" not in found and least_seqs > 32:
        found["max_num_seqs"] = least_seqs
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _finish(report: dict[str, Any], model: str | None, engine: dict[str, Any], output_json: Path | None) -> None:
    from pellucid.bench.show import conditions, text_of
    from pellucid.config import DEFAULT_MODEL

    print(text_of(report))
    if output_json is not None:
        found = {"conditions": conditions(model or DEFAULT_MODEL, engine), **report}
        write_whole(output_json, dumps(found, indent=1) + "\n")


def _check_target(output_json: Path | None) -> None:
    """Refused before anything runs, not after."""
    if output_json is not None and not output_json.absolute().parent.is_dir():
        raise InvalidRequestError("output_json", (f"{output_json} cannot be written: its folder does not exist",))


@app.command()
@with_options(_parameters())
def latency(
    model: Model = None,
    input_len: InputLen = 32,
    output_len: OutputLen = 128,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Requests in the batch.")] = 8,
    num_iters: Annotated[int, typer.Option("--num-iters", help="Batches that count.")] = 10,
    num_iters_warmup: Annotated[int, typer.Option("--num-iters-warmup", help="Batches before them.")] = 2,
    seed: Seed = 0,
    output_json: OutputJson = None,
    **options: Any,
) -> None:
    """How long one batch of equal requests takes, again and again."""
    from pellucid.bench import offline
    from pellucid.commands.load import loaded

    _check_target(output_json)
    engine = _engine(options, batch_size)
    with loaded(model, engine) as llm:
        report = offline.latency(
            llm,
            input_len=input_len,
            output_len=output_len,
            batch_size=batch_size,
            num_iters=num_iters,
            num_iters_warmup=num_iters_warmup,
            seed=seed,
            progress=_say,
        )
    _finish(report, model, engine, output_json)


@app.command()
@with_options(_parameters())
def throughput(
    model: Model = None,
    num_prompts: Annotated[int, typer.Option("--num-prompts", help="Requests, all at once.")] = 64,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    random_range_ratio: Annotated[
        float, typer.Option("--random-range-ratio", help="Lengths lie between 1 - this and 1 + this of those given.")
    ] = 0.0,
    seed: Seed = 0,
    output_json: OutputJson = None,
    **options: Any,
) -> None:
    """Tokens a second with many requests at once, and where the time of a step goes."""
    from pellucid.bench import offline
    from pellucid.commands.load import loaded

    _check_target(output_json)
    engine = _engine(options)
    with loaded(model, engine) as llm:
        report = offline.throughput(
            llm,
            num_prompts=num_prompts,
            input_len=input_len,
            output_len=output_len,
            random_range_ratio=random_range_ratio,
            seed=seed,
        )
    _finish(report, model, engine, output_json)


@app.command()
@with_options(_parameters())
def startup(
    model: Model = None,
    num_iters: Annotated[int, typer.Option("--num-iters", help="Starts that count.")] = 5,
    output_json: OutputJson = None,
    **options: Any,
) -> None:
    """From the start of a process to its first token, in fresh processes, and the memory they held."""
    from pellucid.bench.startup import startup as measure
    from pellucid.config import DEFAULT_MODEL, EngineConfig

    _check_target(output_json)
    engine = _engine(options)
    EngineConfig.from_kwargs(model or DEFAULT_MODEL, engine)
    _finish(measure(model or DEFAULT_MODEL, engine, num_iters=num_iters, progress=_say), model, engine, output_json)


@app.command("batch-curve")
@with_options(_parameters())
def batch_curve(
    model: Model = None,
    batch_sizes: Annotated[str, typer.Option("--batch-sizes", help="Numbers of sequences.")] = "1,2,4,8,16,32,64",
    input_len: InputLen = 128,
    num_steps: Annotated[int, typer.Option("--num-steps", help="Decode steps for each number.")] = 32,
    seed: Seed = 0,
    output_json: OutputJson = None,
    **options: Any,
) -> None:
    """Time of a decode step by the number of sequences, beside what this machine allows at best."""
    from pellucid.bench import offline
    from pellucid.commands.load import loaded

    _check_target(output_json)
    sizes = _sizes(batch_sizes)
    engine = _engine(options, max(sizes))
    with loaded(model, engine) as llm:
        report = offline.batch_curve(
            llm, batch_sizes=sizes, input_len=input_len, num_steps=num_steps, seed=seed, progress=_say
        )
    _finish(report, model, engine, output_json)


def _sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            raise InvalidRequestError("batch_sizes", f"has {part!r}", limit="it takes positive numbers, as 1,8,32")
    return [int(part) for part in parts]
