"""The grammar that forces tool calls (`tool_choice` required, or one by name), as a dialect writes them.

A grammar in Lark's syntax as llguidance reads it, to be given as `StructuredOutputsParams(grammar=…)`. Arguments follow each
tool's JSON schema. A marker that is a special token of the model is named by its id, for a text can never spell it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pellucid.api.structured_outputs import StructuredOutputsParams
from pellucid.errors import InvalidRequestError
from pellucid.structure.grammar_source import WHITESPACE, json_schema, until
from pellucid.text.reasoning_parser import ReasoningDialect
from pellucid.text.tokenizer import Tokenizer
from pellucid.text.tool_dialects import Tool, ToolDialect

_JSON_BEGINS = frozenset('{["-0123456789tfn \t\r\n')


def forced_calls(
    dialect: ToolDialect,
    tools: Sequence[Tool],
    tokenizer: Tokenizer,
    *,
    name: str | None = None,
    parallel: bool = True,
    reasoning: ReasoningDialect | None = None,
) -> StructuredOutputsParams:
    """The structure of an output that is nothing but calls: of any of `tools`, or of the one called `name`.

    Several calls may follow each other where `parallel`, never of the one that was named. With `reasoning` the output begins
    inside of the reasoning that the prompt has opened, and the calls stand behind its end.

    Raises:
        InvalidRequestError: there is no tool, or none of that name, or a schema is malformed (`param` is "tools" or
            "tool_choice").
    """
    chosen = [tool for tool in tools if name in (None, tool.name)]
    if not chosen:
        known = ", ".join(tool.name for tool in tools) or "none"
        raise InvalidRequestError("tool_choice", f"names {name!r}", limit=f"the tools are: {known}")
    rules = _rules(dialect, chosen, _Text(tokenizer), parallel and name is None)
    return _structure(["start: calls", *rules], reasoning)


def calls_or_answer(
    dialect: ToolDialect,
    tools: Sequence[Tool],
    tokenizer: Tokenizer,
    answer: StructuredOutputsParams,
    *,
    parallel: bool = True,
    reasoning: ReasoningDialect | None = None,
) -> StructuredOutputsParams:
    """The structure of an output that is either calls, as `forced_calls` has them, or an answer in JSON.

    Raises:
        InvalidRequestError: another answer than JSON, or calls that may begin as JSON does, so that the two cannot be told apart
            by their beginning; or as `forced_calls`.
    """
    text = _Text(tokenizer)
    begin = dialect.wrap[0] or next(iter(dialect.begins), "")
    if dialect.at_start or not begin or (text.token(begin) is None and begin[0] in _JSON_BEGINS):
        raise InvalidRequestError(
            "tools",
            f": calls of the dialect {dialect.name} begin as JSON does, so no structure of the answer can hold beside them",
            limit="force a call, or leave one of the two out",
        )
    if answer.kind not in ("json", "json_object"):
        raise InvalidRequestError("tools", f": beside them an answer can only be structured as JSON, not {answer.kind}")
    schema = json.dumps(json_schema(answer))
    rules = _rules(dialect, tools, text, parallel)
    return _structure(["start: calls | answer", f"answer: %json {schema}", *rules], reasoning)


def _structure(rules: Sequence[str], reasoning: ReasoningDialect | None) -> StructuredOutputsParams:
    after = None if reasoning is None else reasoning.closes[0]
    return StructuredOutputsParams(grammar="\n".join(rules) + "\n", after=after)


def _rules(dialect: ToolDialect, tools: Sequence[Tool], text: _Text, many: bool) -> list[str]:
    """The rule `calls`, and those that it needs."""
    write = _WRITERS[dialect.syntax]
    rules = [f"call_{index}: {write(dialect, tool, text)}" for index, tool in enumerate(tools)]
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools))))
    rules.append(f"calls: {_calls(dialect, text, many)}")
    if dialect.syntax == "parameters":
        marker = dialect.parameter[2]
        rules.append(until("value", marker, text.token(marker)))
    return rules


class _Text:
    """Literal text in a grammar, special tokens of the vocabulary by their ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        named = {tokenizer.raw_token(token_id): token_id for token_id in tokenizer.special_token_ids}
        self._ids = {token: token_id for token, token_id in named.items() if token}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def __call__(self, text: str) -> str:
        """`text` as a sequence of a grammar's parts; "" for no text."""
        parts, end = [], 0
        for found in self._special.finditer(text):
            parts += [json.dumps(text[end : found.start()])] if found.start() > end else []
            parts.append(f"<[{self._ids[found[0]]}]>")
            end = found.end()
        parts += [json.dumps(text[end:])] if end < len(text) else []
        return " ".join(parts)

    def token(self, text: str) -> str | None:
        """How a grammar spells `text` where it is one special token; None where it is not."""
        return f"<[{self._ids[text]}]>" if text in self._ids else None


def _calls(dialect: ToolDialect, text: _Text, many: bool) -> str:
    begin = dialect.begins[0] if dialect.begins and not dialect.at_start else ""
    if dialect.in_list or dialect.syntax == "pythonic":
        more = f"({text(', ')} call)*" if many else ""
        return f"{text(begin)} {text('[')} call {more} {text(']')} {text(dialect.end if begin else '')}"
    one = f"{text(begin)} call {text(dialect.end if begin else '')}"
    before, after = dialect.wrap
    between = {"qwen3_coder": after + "\n" + before, "llama3_json": "; ", "json": "\n"}.get(dialect.name)
    if between is None:
        between = "\n" if dialect.syntax == "object" or dialect.name == "glm" else ""
    more = f"({text(between)} {one})*" if many else ""
    return f"{text(before)} {one} {more} {text(after)}"


def _schema(schema: Mapping[str, Any]) -> str:
    """A JSON schema within a grammar; an object has no properties but its own, unless it says so."""
    own = {"additionalProperties": False} if "properties" in schema and "additionalProperties" not in schema else {}
    checked = StructuredOutputsParams(json={**schema, **own}).json
    return "%json " + json.dumps({**json.loads(str(checked)), "x-guidance": {"whitespace_pattern": WHITESPACE}})


def _arguments(tool: Tool) -> str:
    try:
        return _schema({"type": "object", **tool.parameters})
    except InvalidRequestError as error:
        problem = f": the schema of tool {tool.name!r} {error.problem}"
        raise InvalidRequestError("tools", problem, error.value, error.limit) from None


def _object(dialect: ToolDialect, tool: Tool, text: _Text) -> str:
    around = "\n" if dialect.end and not dialect.in_list else ""
    before = f'{around}{{"{dialect.name_key}": {json.dumps(tool.name)}, "{dialect.arguments_key}": '
    return f"{text(before)} {_arguments(tool)} {text('}' + around)}"


def _named(dialect: ToolDialect, tool: Tool, text: _Text) -> str:
    name = f"functions.{tool.name}:0" if dialect.name == "kimi" else tool.name
    return f"{_plain(name)} {text(dialect.name_end)} {_arguments(tool)}"


def _each(tool: Tool) -> list[tuple[str, Mapping[str, Any], bool]]:
    """(name, schema, required) of each parameter."""
    _arguments(tool)
    properties, required = tool.parameters.get("properties"), tool.parameters.get("required")
    named = properties if isinstance(properties, Mapping) else {}
    needed = required if isinstance(required, Sequence) else ()
    root = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
    return [
        (key, {**root, **schema} if isinstance(schema, Mapping) else root, key in needed)
        for key, schema in named.items()
    ]


def _parameters(dialect: ToolDialect, tool: Tool, text: _Text) -> str:
    before, middle, after = dialect.parameter
    line = "\n" if dialect.name == "qwen3_coder" else ""
    parts = [_plain(tool.name), text(dialect.name_end + line)]
    for key, schema, required in _each(tool):
        value = _schema(schema) if tool.type_of(key) != "string" else _plain_choices(schema)
        rest = "value" if value is None else f"{value} {text(line + after)}"
        part = f"{text(before)} {_plain(key)} {text(middle + line)} {rest} {text(chr(10))}"
        parts.append(part if required else f"({part})?")
    return " ".join(parts)


def _plain(text: str) -> str:
    """A client's own text in a grammar. It may say what a special token does, and is none all the same."""
    return json.dumps(text)


def _plain_choices(schema: Mapping[str, Any]) -> str | None:
    """The values of a string, which is no quoted JSON here; None where it may be any."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, Sequence) and values and all(isinstance(value, str) and value for value in values):
        return "(" + " | ".join(map(_plain, values)) + ")"
    return None


def _pythonic(dialect: ToolDialect, tool: Tool, text: _Text) -> str:
    """Required arguments first, so that commas stand between: the others may follow, each behind a comma of its own."""
    first = [one for one in _each(tool) if one[2]]
    others = [one for one in _each(tool) if not one[2]]
    written = [f"{_plain(key + '=')} {_python_value(schema)}" for key, schema, _ in first]
    body = f" {text(', ')} ".join(written)
    for key, schema, _ in others if first else []:
        body += f" ({_plain(', ' + key + '=')} {_python_value(schema)})?"
    if not first and others:
        alone = [f"{_plain(key + '=')} {_python_value(schema)}" for key, schema, _ in others]
        body = "(" + " | ".join(alone) + ")?"
    return f"{_plain(tool.name + '(')} {body} {text(')')}"


def _python_value(schema: Mapping[str, Any]) -> str:
    return '("True" | "False")' if schema.get("type") == "boolean" else _schema(schema)


_WRITERS: dict[str, Callable[[ToolDialect, Tool, _Text], str]] = {
    "object": _object,
    "named": _named,
    "parameters": _parameters,
    "pythonic": _pythonic,
}
