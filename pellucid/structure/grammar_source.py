"""From what a caller asks for to the text of a grammar for llguidance. Pure text: nothing is compiled here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pellucid.api.structured_outputs import StructuredOutputsParams

# Between JSON's parts. Bounded: a model that likes line ends would else write nothing but them.
WHITESPACE = r"( |\n{1,2}[ \t]{0,20})"
# Every token that fits is allowed, however the tokenizer itself would have cut the text.
_SETTINGS = '%llguidance {"no_forcing": true}\n'


def grammar_source(spec: StructuredOutputsParams, special: Mapping[str, int] | None = None) -> str:
    """The grammar in llguidance's own form: JSON with two grammars, of which the first has the settings.

    `special` are the special tokens, by which `spec.after` is found where it is one of them.

    Raises:
        ValueError: a GBNF grammar that cannot be read.
    """
    body = _BODIES[spec.kind](spec)
    start = _SETTINGS + _start(spec.after, special or {})
    return json.dumps({"grammars": [{"lark_grammar": start}, {"name": "body", **body}]})


def _start(after: str | None, special: Mapping[str, int]) -> str:
    if after is None:
        return "start: @body\n"
    token = f"<[{special[after]}]>" if after in special else None
    return f"start: before /\\s{{0,4}}/ @body\n{until('before', after, token)}\n"


def until(name: str, marker: str, token: str | None) -> str:
    """A rule for any text up to the first `marker`, and that; `token` is how a grammar spells one that is a special token."""
    if token is not None:
        return f"{name}: /(.|\\n)*/ {token}"
    escaped = re.escape(marker).replace("/", r"\/")
    return f"{name}[lazy]: /(.|\\n)*{escaped}/"


def json_schema(spec: StructuredOutputsParams) -> dict[str, Any]:
    """The schema of a structure that is JSON, with what it says of whitespace."""
    schema: dict[str, Any] = {"type": "object"} if spec.json_object else json.loads(str(spec.json))
    if spec.disable_any_whitespace:
        schema["x-guidance"] = {"whitespace_flexible": False}
    else:
        schema["x-guidance"] = {"whitespace_pattern": spec.whitespace_pattern or WHITESPACE}
    return schema


def _json(spec: StructuredOutputsParams) -> dict[str, Any]:
    return {"json_schema": json_schema(spec)}


def _regex(spec: StructuredOutputsParams) -> dict[str, Any]:
    from llguidance import LLMatcher

    made = json.loads(LLMatcher.grammar_from_regex(str(spec.regex)))
    return {"lark_grammar": made["grammars"][0]["lark_grammar"]}


def _choice(spec: StructuredOutputsParams) -> dict[str, Any]:
    return {"lark_grammar": "start: " + " | ".join(json.dumps(choice) for choice in spec.choice or ())}


def _grammar(spec: StructuredOutputsParams) -> dict[str, Any]:
    text = str(spec.grammar)
    if "::=" not in text:
        return {"lark_grammar": text}
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return {"lark_grammar": any_to_lark(text)}
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    except Exception as error:  # the library has no type of its own for a grammar without root
        raise ValueError(str(error)) from None


_BODIES = {"json": _json, "json_object": _json, "regex": _regex, "choice": _choice, "grammar": _grammar}
