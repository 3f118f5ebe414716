"""Options generated from `EngineConfig` and `SamplingParams`: a field added there is an option here."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import typer

from pellucid.api.sampling_params import SamplingParams
from pellucid.config import EngineConfig
from pellucid.errors import InvalidRequestError
from pellucid.server.http.settings import ServerSettings

_ENGINE_PANEL, _SAMPLING_PANEL, _SERVER_PANEL = "Engine", "Sampling", "Server"
# Sampling fields that make sense as one word on a command line.
_SAMPLING_FIELDS = {
    "max_tokens": "Most tokens to generate.",
    "min_tokens": "Fewest tokens before a stop.",
    "temperature": "0 is greedy.",
    "top_p": "Keep the shortest prefix of likely tokens whose mass reaches this.",
    "top_k": "Keep the k most likely tokens; 0 keeps all.",
    "min_p": "Keep tokens at least this fraction as likely as the likeliest.",
    "presence_penalty": "Subtracted once from tokens that occurred.",
    "frequency_penalty": "Subtracted for every occurrence.",
    "repetition_penalty": "Divides the logits of tokens that occurred.",
    "seed": "Makes the draw repeatable.",
    "stop": "Text that ends the answer; may be given more than once.",
    "ignore_eos": "Go on behind the end token.",
}

# What the text must be: an option each, which becomes `structured_outputs`.
_STRUCTURE_FIELDS = {
    "json_schema": "File with a JSON schema that the text must satisfy.",
    "regex": "Regular expression that the whole text must match.",
}


def _option_type(hint: Any, name: str) -> Any:
    if name == "stop":
        return list[str] | None
    return hint if name == "ignore_eos" else hint | None


def _parameter(
    name: str, hint: Any, default: Any, text: str, panel: str, flags: tuple[str, ...] = ()
) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    names = [f"{flag}/--no-{name.replace('_', '-')}"] if hint is bool else [flag, *flags]
    option = typer.Option(default, *names, help=text, rich_help_panel=panel, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=hint)


def engine_parameters() -> list[inspect.Parameter]:
    """An option for each field of `EngineConfig`; what is not given keeps its default."""
    # the model is an argument of its own, the seed that of the requests
    return _dataclass_parameters(EngineConfig, _ENGINE_PANEL, without=("model", "seed"))


def server_parameters() -> list[inspect.Parameter]:
    """An option for each field of `ServerSettings`; a field of several values may be given more than once."""
    return _dataclass_parameters(ServerSettings, _SERVER_PANEL)


def _dataclass_parameters(kind: Any, panel: str, without: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    hints = get_type_hints(kind)
    made = []
    for field in dataclasses.fields(kind):
        if field.name in without:
            continue
        default = "" if field.default in (None, ()) else f" [{field.default}]"
        hint: Any = list[str] if hints[field.name] == tuple[str, ...] else hints[field.name]
        hint = bool if hint is bool else hint | None
        value = field.default if hint is bool else None
        flags = field.metadata.get("flags", ())
        made.append(_parameter(field.name, hint, value, field.metadata["help"] + default, panel, flags))
    return made


def sampling_parameters() -> list[inspect.Parameter]:
    """An option for each common field of `SamplingParams`."""
    hints = get_type_hints(SamplingParams)
    made = []
    for name, text in _SAMPLING_FIELDS.items():
        hint = _option_type(hints[name], name)
        made.append(_parameter(name, hint, False if hint is bool else None, text, _SAMPLING_PANEL))
    for name, text in _STRUCTURE_FIELDS.items():
        made.append(_parameter(name, str | None, None, text, _SAMPLING_PANEL))
    return made


def with_options(*groups: list[inspect.Parameter]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds generated options to a verb that takes `**options`."""

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(verb, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters = [*own, *(parameter for group in groups for parameter in group)]
        verb.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        verb.__annotations__ = {p.name: p.annotation for p in parameters}
        return verb

    return decorate


def engine_kwargs(options: dict[str, Any]) -> dict[str, Any]:
    """The engine options that were given."""
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    return {name: value for name, value in options.items() if name in names - {"model", "seed"} and value is not None}


def sampling_kwargs(options: dict[str, Any]) -> dict[str, Any]:
    """The sampling options that were given.

    Raises:
        InvalidRequestError: the file of a schema cannot be read.
    """
    given = {name: options.get(name) for name in _SAMPLING_FIELDS}
    given["structured_outputs"] = _structure(options)
    return {name: value for name, value in given.items() if value is not None and value is not False and value != []}


def _structure(options: dict[str, Any]) -> dict[str, str] | None:
    schema, regex = options.get("json_schema"), options.get("regex")
    structure = {"json": None if schema is None else _read(schema), "regex": regex}
    return {name: value for name, value in structure.items() if value is not None} or None


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidRequestError(None, f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
