"""Tools for chat templates that do not show any: told in the system message, and calls written into the conversation.

The words are those that SmolLM2 and Hermes were trained with; other models follow them as they can.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pellucid.text.tool_dialects import ToolDialect

_INTRODUCTION = (
    "You may call functions to help with the user's request. These are the functions, each with the JSON schema of its "
    "parameters:\n<tools>\n{tools}\n</tools>"
)
_HOW = "To call a function, answer with nothing but:\n{example}"


def shows_tools(template: str) -> bool:
    """True when a chat template tells the model of tools by itself."""
    return "tools" in template


def shows_calls(template: str) -> bool:
    """True when a chat template writes the calls of an assistant's message by itself."""
    return "tool_calls" in template


def with_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], dialect: ToolDialect
) -> list[dict[str, Any]]:
    """The conversation with a system message that tells of the tools, behind what that message says already."""
    told = _INTRODUCTION.format(tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools))
    if dialect.syntax == "object":
        told += "\n" + _HOW.format(example=written_call(dialect, "function-name", {"parameter": "value"}))
    rest = [dict(message) for message in messages]
    if rest and rest[0]["role"] == "system":
        return [{**rest[0], "content": f"{_text_of(rest[0])}\n\n{told}".lstrip()}, *rest[1:]]
    return [{"role": "system", "content": told}, *rest]


def with_calls(messages: Sequence[Mapping[str, Any]], dialect: ToolDialect) -> list[dict[str, Any]]:
    """The conversation with the calls of assistants as the text that a model would have written."""
    return [_with_its_calls(message, dialect) if message.get("tool_calls") else dict(message) for message in messages]


def _with_its_calls(message: Mapping[str, Any], dialect: ToolDialect) -> dict[str, Any]:
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [written_call(dialect, one["name"], one["arguments"]) for one in functions]
    content = "\n".join(filter(None, [_text_of(message), *texts]))
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": content}


def written_call(dialect: ToolDialect, name: str, arguments: Any) -> str:
    """A call as a JSON object between the dialect's markers."""
    text = json.dumps({dialect.name_key: name, dialect.arguments_key: arguments}, ensure_ascii=False)
    text = f"[{text}]" if dialect.in_list else text
    if dialect.at_start or not dialect.begins:
        return text
    line = "\n" if dialect.end else ""
    return f"{dialect.begins[0]}{line}{text}{line}{dialect.end}"


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
