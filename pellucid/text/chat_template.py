"""Renders a conversation with a model's chat template: Jinja, as Hugging Face's templates are written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pellucid.errors import InvalidRequestError, TokenizerError, shown
from pellucid.json_text import lone_surrogate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jinja2 import Template

MAX_TEMPLATE_CHARACTERS = 256 << 10
_MAX_DEPTH = 48
_TEXT_PARTS = ("text", "input_text")

# Templates that look into a list of parts themselves, or that distinguish a missing content, get it as it came.
_READS_PARTS = re.compile(
    r"content\s+is\s+(not\s+)?(string|iterable|sequence|mapping)|in\s+\w+(\.content|\[['\"]content['\"]\])|in\s+content\b"
)
_READS_NONE = re.compile(r"\bnone\b|is\s+(not\s+)?(defined|string)", re.IGNORECASE)


def render_chat(
    source: str,
    messages: Sequence[Mapping[str, object]],
    variables: Mapping[str, object] | None = None,
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, object]] | None = None,
    clock: Callable[[], datetime] | None = None,
) -> str:
    """The text of a conversation.

    A content given as a list of text parts is joined with newlines unless the template reads parts itself.

    Args:
        source: the template.
        messages: dicts with `role` and `content` (text, a list of text parts, or None beside `tool_calls`);
            other keys are passed through.
        variables: what else the template may read (special tokens, `enable_thinking`, …).
        add_generation_prompt: end with what opens the assistant's turn.
        tools: JSON schemas of the functions that the model may call.
        clock: the time `strftime_now` tells; the local time by default.

    Raises:
        InvalidRequestError: malformed messages (names the index), or the template refuses them.
        TokenizerError: the template is broken, or exceeds its bounds on size, output, steps or time.
    """
    if not isinstance(add_generation_prompt, bool):
        told = shown(add_generation_prompt)
        raise InvalidRequestError("add_generation_prompt", f"is {told}", limit="it must be true or false")
    values: dict[str, Any] = {"documents": None}
    values.update(_plain(variables or {}, "template_kwargs"))
    values.update(
        messages=[_message(index, message, source) for index, message in enumerate(_checked_list(messages))],
        tools=None if tools is None else _plain(list(tools), "tools"),
        add_generation_prompt=add_generation_prompt,
    )
    template = compile_template(source)
    from pellucid.text.template_sandbox import Budget, budget, strftime

    now = clock or datetime.now
    values["strftime_now"] = lambda pattern: strftime(now(), pattern)
    token = budget.set(Budget())
    try:
        with _template_errors("cannot be rendered"):
            return "".join(template.generate(values))
    finally:
        budget.reset(token)


@lru_cache(maxsize=64)
def compile_template(source: str) -> Template:
    """The compiled template; the last few are kept.

    Raises:
        TokenizerError: too large, or not valid Jinja (names the line).
    """
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise TokenizerError(f"the chat template has {len(source)} characters; the limit is {MAX_TEMPLATE_CHARACTERS}")
    with _template_errors("cannot be compiled"):
        template: Template = _environment().from_string(source)
        return template


@lru_cache(maxsize=1)
def _environment() -> Any:
    from pellucid.text.template_sandbox import TemplateEnvironment

    return TemplateEnvironment()


@contextmanager
def _template_errors(what: str) -> Iterator[None]:
    from jinja2.exceptions import TemplateSyntaxError

    from pellucid.text.template_sandbox import RaisedByTemplate

    try:
        yield
    except RaisedByTemplate as error:
        raise InvalidRequestError("messages", (f"the chat template refuses these messages: {error}",)) from error
    except TemplateSyntaxError as error:
        raise TokenizerError(f"the chat template {what}: line {error.lineno}: {error.message}") from error
    except Exception as error:  # whatever a template can provoke: types, missing keys, recursion, memory
        raise TokenizerError(f"the chat template {what}: {type(error).__name__}: {str(error)[:300]}") from error


# --- messages --------------------------------------------------------------------------------------------


def _checked_list(messages: object) -> Sequence[object]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidRequestError("messages", f"is a {type(messages).__name__}", limit="it must be a list of dicts")
    if not messages:
        raise InvalidRequestError("messages", "is empty", limit="it must hold at least one message")
    return messages


def _message(index: int, message: object, source: str) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise InvalidRequestError(where, f"is a {type(message).__name__}", limit="it must be a dict")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(f"{where}.role", f"is {role!r}", limit="it must be a non-empty string")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise InvalidRequestError(where, "has no content", limit="only a message with tool_calls may lack it")
    plain: dict[str, Any] = _plain(message, where)
    if content is None:
        if not _READS_NONE.search(source):
            plain["content"] = ""
    elif isinstance(content, (list, tuple)):
        texts = [_part_text(part, f"{where}.content[{position}]") for position, part in enumerate(content)]
        reads_parts = _READS_PARTS.search(source)
        plain["content"] = [{"type": "text", "text": text} for text in texts] if reads_parts else "\n".join(texts)
    elif not isinstance(content, str):
        raise InvalidRequestError(
            f"{where}.content", f"is a {type(content).__name__}", limit="it must be a string or a list of text parts"
        )
    return plain


def _part_text(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise InvalidRequestError(where, f"is a {type(part).__name__}", limit="it must be a text part")
    kind, text = part.get("type", "text"), part.get("text")
    if kind not in _TEXT_PARTS:
        raise InvalidRequestError(where, f"has type {kind!r}", limit="only text parts are understood")
    if not isinstance(text, str):
        raise InvalidRequestError(f"{where}.text", f"is a {type(text).__name__}", limit="it must be a string")
    return text


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy in plain JSON types: a template shall meet no object with methods of its own."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return _plain_text(value, where)
    if depth > _MAX_DEPTH:
        raise InvalidRequestError(where, f"is nested deeper than {_MAX_DEPTH}")
    if isinstance(value, Mapping):
        texts = {_plain_text(str(key), where): item for key, item in value.items()}
        return {key: _plain(item, f"{where}.{key}", depth + 1) for key, item in texts.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise InvalidRequestError(where, f"is a {type(value).__name__}", limit="only JSON values are understood")


def _plain_text(text: str, where: str) -> str:
    found = lone_surrogate(text)
    if found:
        raise InvalidRequestError(where, f"holds {found}", limit="it must be well-formed Unicode")
    return str(text)


def _field(where: str) -> str:
    return re.split(r"[.\[]", where)[0]
