"""Readers of what stands between the markers of a tool call, one for each syntax.

A reader takes characters one by one and says after each whether it is in the midst of something, at a place where the calls
may end, or cannot go on. What it finds goes to a `Sink` as soon as it is certain.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Protocol

from pellucid.json_text import loads
from pellucid.text.tool_dialects import Tool, ToolDialect

MAX_NAME = 256  # longer than any tool's: what stands there is no name
MAX_DEPTH = 200
_SPACE = " \t\r\n"
_BETWEEN = frozenset(_SPACE + ",;")
_NAME_KEYS = frozenset({"name", "tool_name", "function_name"})
_ARGUMENT_KEYS = frozenset({"arguments", "parameters", "args"})


class State(Enum):
    """Where a reader stands."""

    MIDST = "midst"
    MAY_END = "may end"
    WRONG = "wrong"  # the character does not fit; it was not taken


class Sink(Protocol):
    """Where calls go."""

    def begin_call(self, name: str) -> bool:
        """A call begins. False when there is no such tool where that matters: then it is no call."""

    def arguments(self, text: str) -> None:
        """More of the arguments of the call that was begun last."""


class Reader(Protocol):
    """Reads one stretch of calls."""

    def push(self, character: str) -> State:
        """Takes a character."""

    def close(self) -> bool:
        """The end marker has come. False when something is missing."""


class JsonScanner:
    """Follows one JSON value by its brackets and strings: where it ends, not whether every comma is in place."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._in_string = self._escaped = False
        self.is_done = False

    def push(self, character: str) -> bool:
        """Takes a character of an object, list or string. False when it cannot be one."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
                self.is_done = not self._open
            return True
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._open.append("}" if character == "{" else "]")
            return len(self._open) <= MAX_DEPTH
        elif character in "}]":
            if not self._open or self._open.pop() != character:
                return False
            self.is_done = not self._open
        return bool(self._open) or self._in_string or self.is_done


class ObjectReader:
    """`{"name": …, "arguments": {…}}`, one or many, in a list or not; arguments are passed on as they come.

    Keys may come in any order and others may stand beside them; arguments before the name wait for it. `{"function": {…}}`
    around them is looked into. Arguments given as a string of JSON are unwrapped.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._lists = 0
        self._begin_object()
        self._step: Callable[[str], State] = self._between

    def _begin_object(self) -> None:
        self._depth = 0
        self._key = self._text = ""
        self._name: str | None = None
        self._held: list[str] = []  # arguments that came before the name
        self._began = self._has_arguments = False
        self._scanner = JsonScanner()

    def push(self, character: str) -> State:
        return self._step(character)

    def close(self) -> bool:
        return self._step == self._between

    def _between(self, character: str) -> State:
        if character == "{":
            self._begin_object()
            self._depth = 1
            return self._go(self._before_key)
        if character == "[":
            self._lists += 1
            return State.MIDST if self._lists == 1 else State.WRONG
        if character == "]":
            self._lists -= 1
            return State.MAY_END if self._lists == 0 else State.WRONG
        if character in _BETWEEN:
            return State.MAY_END if self._lists <= 0 else State.MIDST
        return State.WRONG

    def _go(self, step: Callable[[str], State]) -> State:
        self._step = step
        return State.MIDST

    def _before_key(self, character: str) -> State:
        if character in _SPACE or character == ",":
            return State.MIDST
        if character == '"':
            self._text = '"'
            return self._go(self._in_key)
        return self._leave() if character == "}" else State.WRONG

    def _in_key(self, character: str) -> State:
        self._text += character
        if character == '"':
            self._key = self._text[1:-1]
            return self._go(self._before_value)
        return State.WRONG if character == "\\" or len(self._text) > MAX_NAME else State.MIDST

    def _before_value(self, character: str) -> State:
        if character in _SPACE or character == ":":
            return State.MIDST
        self._scanner, self._text = JsonScanner(), ""
        if self._key == "function" and character == "{":
            self._depth += 1
            return self._go(self._before_key)
        if self._key in _ARGUMENT_KEYS and not self._has_arguments:
            self._has_arguments = True
            return self._arguments_begin(character)
        if self._key in _NAME_KEYS or (self._key == "function" and self._name is None):
            return self._string(character, self._in_name)
        return self._other(character)

    def _string(self, character: str, step: Callable[[str], State]) -> State:
        if character != '"':
            return State.WRONG
        self._go(step)
        return step(character)

    def _in_name(self, character: str) -> State:
        self._text += character
        self._scanner.push(character)
        if not self._scanner.is_done:
            return State.MIDST if len(self._text) <= MAX_NAME else State.WRONG
        name = _loaded(self._text)
        if not isinstance(name, str) or not name or self._name is not None:
            return State.WRONG
        self._name = name
        if self._held and not self._begin():
            return State.WRONG
        return self._go(self._before_key)

    def _begin(self) -> bool:
        if not self._sink.begin_call(self._name or ""):
            return False
        self._began = True
        for text in self._held:
            self._sink.arguments(text)
        self._held = []
        return True

    def _arguments_begin(self, character: str) -> State:
        if character == '"':
            return self._string(character, self._in_quoted_arguments)
        if character == "n":
            self._pass("{}")
            return self._other(character)
        if character != "{" or (self._name is not None and not self._begin()):
            return State.WRONG
        self._go(self._in_arguments)
        return self._in_arguments(character)

    def _pass(self, text: str) -> None:
        if self._began:
            self._sink.arguments(text)
        else:
            self._held.append(text)

    def _in_arguments(self, character: str) -> State:
        if not self._scanner.push(character):
            return State.WRONG
        self._pass(character)
        return self._go(self._before_key) if self._scanner.is_done else State.MIDST

    def _in_quoted_arguments(self, character: str) -> State:
        self._text += character
        self._scanner.push(character)
        if not self._scanner.is_done:
            return State.MIDST
        inner = _loaded(self._text)
        if not isinstance(inner, str) or (self._name is not None and not self._begin()):
            return State.WRONG
        self._pass(inner)
        return self._go(self._before_key)

    def _other(self, character: str) -> State:
        """The value of a key that says nothing here."""
        if character in '{["':
            self._go(self._in_other)
            return self._in_other(character)
        self._text = character
        return self._go(self._in_scalar) if character.isalnum() or character == "-" else State.WRONG

    def _in_other(self, character: str) -> State:
        if not self._scanner.push(character):
            return State.WRONG
        return self._go(self._before_key) if self._scanner.is_done else State.MIDST

    def _in_scalar(self, character: str) -> State:
        if character.isalnum() or character in "+-.":
            return State.MIDST
        self._step = self._before_key
        return self._before_key(character)

    def _leave(self) -> State:
        self._depth -= 1
        if self._depth:
            return self._go(self._before_key)
        if self._name is None or (not self._began and not self._begin()):
            return State.WRONG
        if not self._has_arguments:
            self._sink.arguments("{}")
        self._step = self._between
        return State.MAY_END if self._lists == 0 else State.MIDST


class NamedReader:
    """The name, a marker, and the arguments as one JSON object."""

    def __init__(self, sink: Sink, dialect: ToolDialect) -> None:
        self._sink, self._dialect = sink, dialect
        self._text = ""
        self._scanner: JsonScanner | None = None

    def push(self, character: str) -> State:
        if self._scanner is None:
            return self._in_name(character)
        if self._scanner.is_done:
            return State.MAY_END if character in _SPACE else State.WRONG
        if character in _SPACE and not self._text:
            return State.MIDST
        if (not self._text and character != "{") or not self._scanner.push(character):
            return State.WRONG
        self._text = "{"
        self._sink.arguments(character)
        return State.MAY_END if self._scanner.is_done else State.MIDST

    def _in_name(self, character: str) -> State:
        self._text += character
        if not self._text.endswith(self._dialect.name_end):
            return State.MIDST if len(self._text) <= MAX_NAME else State.WRONG
        name = _name_in(self._text[: -len(self._dialect.name_end)], self._dialect)
        if name is None or not self._sink.begin_call(name):
            return State.WRONG
        self._text, self._scanner = "", JsonScanner()
        return State.MIDST

    def close(self) -> bool:
        return self._scanner is not None and self._scanner.is_done


class ParametersReader:
    """The name, then each argument between markers: values of strings as they are, others as JSON."""

    def __init__(self, sink: Sink, dialect: ToolDialect, tools: Mapping[str, Tool]) -> None:
        self._sink, self._dialect, self._tools = sink, dialect, tools
        self._text = ""
        self._name: str | None = None
        self._key: str | None = None
        self._count = 0

    def push(self, character: str) -> State:
        self._text += character
        if self._name is None:
            return self._in_name()
        return self._between() if self._key is None else self._in_value()

    def _in_name(self) -> State:
        end = self._dialect.name_end
        if not self._text.endswith(end):
            return State.MIDST if len(self._text) <= MAX_NAME else State.WRONG
        name = _name_in(self._text[: -len(end)], self._dialect)
        if name is None or not self._sink.begin_call(name):
            return State.WRONG
        self._name, self._text = name, ""
        return State.MAY_END

    def _between(self) -> State:
        before, middle, _ = self._dialect.parameter
        self._text = self._text.lstrip()
        if not before.startswith(self._text[: len(before)]):
            self._text = self._text[:-1]
            return State.WRONG
        if not self._text:
            return State.MAY_END
        key, found, _ = _parted(self._text[len(before) :], middle)
        if found:
            self._key, self._text = key.strip(), ""
        return State.MIDST if len(self._text) <= MAX_NAME else State.WRONG

    def _in_value(self) -> State:
        after = self._dialect.parameter[2]
        if self._text.endswith(after):
            self._pass(self._value(self._text[: -len(after)]))
            self._count, self._key, self._text = self._count + 1, None, ""
            return State.MAY_END
        return State.MIDST

    def _pass(self, value: str) -> None:
        self._sink.arguments(("{" if self._count == 0 else ", ") + f"{json.dumps(self._key)}: {value}")

    def _is_text(self) -> bool:
        tool = self._tools.get(self._name or "")
        return tool is None or tool.type_of(self._key or "") == "string"

    def _value(self, text: str) -> str:
        """One line end at either side belongs to the markers."""
        text = text.removeprefix("\n").removesuffix("\n")
        if not self._is_text():
            value = _loaded(text.strip())
            if value is not _NOTHING:
                return json.dumps(value, ensure_ascii=False)
        return json.dumps(text, ensure_ascii=False)

    def close(self) -> bool:
        if self._key is not None:
            self._break_off()
            return False
        if self._name is None or self._text.strip():
            return False
        self._sink.arguments("{}" if self._count == 0 else "}")
        return True

    def _break_off(self) -> None:
        """The text ends within a value: of a string, what came of it is passed on, and left open."""
        after = self._dialect.parameter[2]
        marked = next(length for length in range(len(after), -1, -1) if self._text.endswith(after[:length]))
        text = self._text[: len(self._text) - marked].removeprefix("\n").removesuffix("\n")
        if text and self._is_text():
            self._pass(json.dumps(text, ensure_ascii=False)[:-1])


class PythonicReader:
    """`[f(a=1), g(b="x")]`: literals alone, each call passed on when it is complete."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._text = ""
        self._stack: list[str] = []
        self._quote = ""
        self._escaped = self._is_done = False

    def push(self, character: str) -> State:
        if self._is_done:
            return State.MAY_END if character in _SPACE else State.WRONG
        if not self._stack:
            if character != "[":
                return State.MAY_END if character in _SPACE else State.WRONG
            self._stack.append("]")
            return State.MIDST
        if self._quote:
            return self._in_string(character)
        return self._in_code(character)

    def _in_string(self, character: str) -> State:
        self._text += character
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == self._quote:
            self._quote = ""
        return State.MIDST if character != "\n" else State.WRONG

    def _in_code(self, character: str) -> State:
        if len(self._stack) == 1:
            return self._between_calls(character)
        self._text += character
        if character in "\"'":
            self._quote = character
        elif character in "([{":
            self._stack.append({"(": ")", "[": "]", "{": "}"}[character])
            return State.MIDST if len(self._stack) <= MAX_DEPTH // 4 else State.WRONG
        elif character in ")]}":
            if self._stack.pop() != character:
                return State.WRONG
            if len(self._stack) == 1:
                return self._end_call()
        return State.MIDST

    def _between_calls(self, character: str) -> State:
        if character == "]" and not self._text.strip():
            self._is_done = True
            return State.MAY_END
        if character == "(" and re.fullmatch(r"[A-Za-z_][\w.\-]{0,255}", self._text.strip()):
            self._stack.append(")")
            self._text = self._text.strip() + "("
            return State.MIDST
        if character in _SPACE + ",":
            return State.MIDST if not self._text.strip() else State.WRONG
        self._text += character
        fits = re.fullmatch(r"[A-Za-z_][\w.\-]{0,255}", self._text.strip()) is not None
        return State.MIDST if fits else State.WRONG

    def _end_call(self) -> State:
        name, _, rest = self._text.partition("(")
        self._text = ""
        arguments = _keywords(rest[:-1])
        if arguments is None or not self._sink.begin_call(name):
            return State.WRONG
        self._sink.arguments(arguments)
        return State.MIDST

    def close(self) -> bool:
        return self._is_done


_NOTHING = object()
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}


def _loaded(text: str) -> Any:
    """The value of a JSON text, or `_NOTHING`. NaN and what is more than a number can be are none."""
    try:
        return loads(text)
    except (ValueError, RecursionError):
        return _NOTHING


def _name_in(text: str, dialect: ToolDialect) -> str | None:
    found = re.fullmatch(dialect.name_pattern, text)
    return found["name"] if found else None


def _parted(text: str, separator: str) -> tuple[str, bool, str]:
    """`text` cut at `separator`, of which whitespace may be missing or more."""
    pattern = r"\s*".join(re.escape(part) for part in separator.split("\n"))
    found = re.search(pattern, text)
    return (text, False, "") if found is None else (text[: found.start()], True, text[found.end() :])


def _keywords(source: str) -> str | None:
    """The arguments of a Python call as a JSON object; None when one is not a literal with a name."""
    try:
        call = ast.parse(f"f({source})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
            return None
        return json.dumps(
            {word.arg: _literal(word.value) for word in call.keywords}, ensure_ascii=False, allow_nan=False
        )
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _literal(node: ast.expr) -> Any:
    """The value of a literal; JSON's names of constants count too."""
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        return {str(_literal(k)): _literal(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    return ast.literal_eval(node)
