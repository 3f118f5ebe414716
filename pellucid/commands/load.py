"""Loading a model for a verb: pulled when it is missing, with progress on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pellucid.api.sampling_params import SamplingParams, model_defaults
from pellucid.commands.options import engine_kwargs, sampling_kwargs
from pellucid.config import DEFAULT_MODEL
from pellucid.llm import LLM


@contextmanager
def loaded(model: str | None, options: dict[str, Any]) -> Iterator[LLM]:
    """The model of a verb, closed at the end."""
    with (
        packing_progress() as progress,
        LLM(model or DEFAULT_MODEL, progress=progress, **engine_kwargs(options)) as llm,
    ):
        yield llm


@contextmanager
def packing_progress() -> Iterator[Callable[[int, int], None] | None]:
    """A bar for the first start, which packs the weights; nothing when it is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    bar: Any = None

    def advance(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

            columns = (TextColumn("packing weights"), BarColumn(), DownloadColumn())
            bar = Progress(*columns, console=Console(stderr=True), transient=True)
            bar.add_task("packing", total=total)
            bar.start()
        bar.update(bar.task_ids[0], completed=done)
        if done >= total:
            bar.stop()

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def sampling_defaults(llm: LLM, options: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """What was asked on the command line, over the model's generation config, over `defaults`."""
    config = llm.engine.executor.facts.generation_config
    return {**defaults, **model_defaults(config), **sampling_kwargs(options)}


def sampling_of(llm: LLM, options: dict[str, Any], **defaults: Any) -> SamplingParams:
    """`sampling_defaults` as parameters.

    Raises:
        InvalidRequestError: a value is not allowed.
    """
    return SamplingParams.from_dict(sampling_defaults(llm, options, **defaults))
