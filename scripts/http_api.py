"""Makes the tables of docs/http_api.md from the code: what is not in the code cannot be in the docs.

python scripts/http_api.py          writes them
python scripts/http_api.py --check  fails when they are not up to date
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pellucid.server.anthropic.protocol import (
    BLOCKS,
    CountTokensRequest,
    CustomTool,
    MessagesRequest,
    OutputConfig,
    Thinking,
    ToolChoice,
)
from pellucid.server.chat.protocol import ChatCompletionRequest, Message
from pellucid.server.chat.tools import FunctionDefinition
from pellucid.server.completions.protocol import CompletionRequest
from pellucid.server.debug.protocol import DetokenizeRequest, TokenizeRequest
from pellucid.server.embeddings.protocol import EmbeddingRequest
from pellucid.server.generate.protocol import StreamOptions
from pellucid.server.generate.protocol_structure import JsonSchemaFormat, ResponseFormat
from pellucid.server.http.errors import TABLE as ERROR_TABLE
from pellucid.server.http.metrics import METRICS
from pellucid.server.http.settings import ServerSettings
from pellucid.server.responses.protocol import ITEMS, FunctionTool, Reasoning, ResponsesRequest, TextFormat

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "http_api.md"
BEGIN, END = "<!-- begin: made by scripts/http_api.py -->", "<!-- end -->"
_BODIES: tuple[tuple[str, type[BaseModel]], ...] = (
    ("POST /v1/chat/completions", ChatCompletionRequest),
    ("A message", Message),
    ("A tool's function", FunctionDefinition),
    ("response_format", ResponseFormat),
    ("response_format.json_schema", JsonSchemaFormat),
    ("POST /v1/completions", CompletionRequest),
    ("POST /v1/embeddings", EmbeddingRequest),
    ("stream_options", StreamOptions),
    ("POST /v1/responses", ResponsesRequest),
    *((f"An item of type {name}", item) for name, item in ITEMS.items()),
    ("A tool of /v1/responses", FunctionTool),
    ("text.format of /v1/responses", TextFormat),
    ("reasoning of /v1/responses", Reasoning),
    ("POST /v1/messages", MessagesRequest),
    ("POST /v1/messages/count_tokens", CountTokensRequest),
    *((f"A block of type {name}", block) for name, block in BLOCKS.items()),
    ("A tool of /v1/messages", CustomTool),
    ("tool_choice of /v1/messages", ToolChoice),
    ("thinking", Thinking),
    ("output_config", OutputConfig),
    ("POST /tokenize", TokenizeRequest),
    ("POST /detokenize", DetokenizeRequest),
)


def reference() -> str:
    """All tables, in Markdown."""
    parts = [_section(title, model) for title, model in _BODIES]
    return "\n\n".join([*parts, _errors(), _settings(), _metrics()])


def updated(document: str) -> str:
    """`document` with its generated part made anew.

    Raises:
        ValueError: the marks are missing.
    """
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document lacks {BEGIN} or {END}")
    return f"{head}{BEGIN}\n\n{reference()}\n\n{END}{tail}"


def _section(title: str, model: type[BaseModel]) -> str:
    refused: dict[str, tuple[tuple[Any, ...], str]] = getattr(model, "REFUSED", {})
    rows = [
        (
            f"`{field.alias or name}`",
            _type_name(field),
            "refused" if name in refused else "honoured",
            _told(model, name),
        )
        for name, field in _ordered(model)
    ]
    return f"### {title}\n\n{_table(('field', 'type', 'other values', 'behaviour'), rows)}"


def _told(model: type[BaseModel], name: str) -> str:
    """What a field does; of one that others have and this model refuses, why."""
    refused: dict[str, tuple[tuple[Any, ...], str]] = getattr(model, "REFUSED", {})
    if name in refused and name not in model.__annotations__:
        why = refused[name][1]
        return f"{why[0].upper()}{why[1:]}."
    return model.model_fields[name].description or ""


def _ordered(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Required fields first, then those of the model itself, then those that it shares."""
    own = list(model.__annotations__)
    yield from sorted(
        model.model_fields.items(),
        key=lambda item: (not item[1].is_required(), item[0] not in own),
    )


def _type_name(field: FieldInfo) -> str:
    name = _spelled(field.annotation)
    return f"{name}, required" if field.is_required() else name


def _spelled(hint: Any) -> str:
    arguments = [argument for argument in typing.get_args(hint) if argument is not NoneType]
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _spelled(arguments[0])
    if origin is list:
        return f"list of {_spelled(arguments[0])}"
    if origin is dict:
        return f"object of {_spelled(arguments[1])}"
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if arguments:
        return " or ".join(dict.fromkeys(map(_spelled, arguments)))
    names = {str: "text", int: "integer", float: "number", bool: "boolean", Any: "any", NoneType: "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _errors() -> str:
    rows = [(str(status), f"`{type_}`", f"`{code}`", kind.__name__) for kind, status, type_, code in ERROR_TABLE]
    own = (
        ("401", "`authentication_error`", "`invalid_api_key`", "a key is missing or wrong"),
        ("403", "`permission_error`", "`forbidden`", "/debug without an admin_key of the server"),
        (
            "404",
            "`invalid_request_error`",
            "`model_not_found`, `request_not_found`, `not_found`",
            "unknown name or path",
        ),
        ("405", "`invalid_request_error`", "`method_not_allowed`", "the path has another method"),
        ("408", "`timeout_error`", "`body_timeout`", "a body, or headers, that do not come"),
        ("413", "`invalid_request_error`", "`body_too_long`", "max_body_bytes"),
        ("415", "`invalid_request_error`", "`unsupported_media_type`", "the body is not called JSON, or is packed"),
        ("431", "`invalid_request_error`", "", "max_header_bytes"),
        ("500", "`server_error`", "`internal_error`", "a bug: the log has it under the request's id"),
    )
    return f"### Errors\n\n{_table(('status', 'type', 'code', 'when'), sorted([*rows, *own]))}"


def _settings() -> str:
    rows = []
    for entry in dataclasses.fields(ServerSettings):
        default = "" if entry.default in (None, ()) else f"`{entry.default}`"
        rows.append((f"`--{entry.name.replace('_', '-')}`", default, entry.metadata["help"]))
    return f"### Options of `pellucid serve`\n\nBeside those of the engine.\n\n{_table(('option', 'default', 'meaning'), rows)}"


def _metrics() -> str:
    return f"### Metrics\n\n{_table(('name', 'kind', 'meaning'), METRICS)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main(arguments: list[str]) -> int:
    """0 when the document is up to date, or was written."""
    found = DOCUMENT.read_text(encoding="utf-8")
    made = updated(found)
    if "--check" not in arguments:
        DOCUMENT.write_text(made, encoding="utf-8")
        return 0
    if made != found:
        print("docs/http_api.md is not up to date: run python scripts/http_api.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
