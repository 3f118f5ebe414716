"""A model's JSON object made strict while it streams: what comes out is JSON that every parser reads, piece by piece.

For APIs that hand out arguments of a call as an object, where others only pass the model's text on. Small models write line ends
into strings, escapes that there are not, a comma too many; `max_tokens` cuts them off; lone surrogates and NaN are no JSON at all.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable
from typing import Any

from pellucid.json_text import loads, well_formed

RAW_KEY = "raw_arguments"
"""The key that holds the whole text, as it came, where it cannot be read as an object."""
MAX_DEPTH = 40
MAX_NUMBER_CHARACTERS = 300
# Deeper values and longer numbers cannot be sent back to us: the limits of bodies and of templates stand a little above.

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_HEX = frozenset("0123456789abcdefABCDEF")
_ESCAPES = frozenset('"\\/bfnrt')
_SCALAR = re.compile(r"[A-Za-z0-9_+\-.]+")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_CLOSING = {"{": "}", "[": "]"}
_UNKNOWN_CHARACTER = "\\ufffd"
_Step = Callable[[str, int], int]


class ObjectMender:
    """`feed` takes a text in pieces, `finish` its end; what both give joins to one strict JSON object.

    A text that is one comes out as it is. Else: control characters and backslashes in strings are escaped, lone surrogates become
    U+FFFD, commas before a bracket go, Python's True, False and None are JSON's, other words become texts, as do numbers that
    are not finite or too long, and what breaks off is closed where it broke off. From where it cannot be read, the rest is
    left out, and the key `RAW_KEY` has the whole text. A text of nothing but whitespace gives nothing.
    """

    def __init__(self) -> None:
        self._raw: list[str] = []
        self._open: list[str] = []  # brackets
        self._held = ""  # a comma, a key, whitespace: comes out with the value behind it
        self._is_empty = True  # the object itself has no value yet
        self._scalar = self._escape = self._high = ""
        self._is_key = self._is_broken = self._is_done = False
        self._step: _Step = self._begin
        self._made: list[str] = []

    def feed(self, text: str) -> str:
        """What is certain of the object now that this came."""
        text = well_formed(text)
        self._raw.append(text)
        at = 0
        while at < len(text) and not self._is_broken:
            at = self._step(text, at)
        return self._take()

    def finish(self) -> str:
        """The rest, when no more comes."""
        raw = "".join(self._raw)
        if not raw.strip():
            return ""
        if not self._is_broken:
            self._break_off()
        if not self._open and not self._is_done:
            self._emit("{")
            self._open.append("{")
        while len(self._open) > 1:
            self._emit(_CLOSING[self._open.pop()])
        if self._is_broken:
            self._emit(("" if self._is_empty else ", ") + json.dumps({RAW_KEY: raw}, ensure_ascii=False)[1:-1])
        self._emit("}")
        return self._take()

    @property
    def is_broken(self) -> bool:
        """True when the text could not be read as an object."""
        return self._is_broken

    def _emit(self, text: str) -> None:
        self._made.append(text)

    def _take(self) -> str:
        made, self._made = "".join(self._made), []
        return made

    # ---- steps: each takes characters from `at` on and says where the next one begins ------------------------------------------

    def _begin(self, text: str, at: int) -> int:
        if text[at].isspace():
            return at + 1
        if text[at] != "{":
            return self._break(at)
        return self._open_bracket(text, at)

    def _open_bracket(self, text: str, at: int) -> int:
        if len(self._open) >= MAX_DEPTH:
            return self._break(at)
        self._value_begins()
        self._open.append(text[at])
        self._emit(text[at])
        self._step = self._before_first
        return at + 1

    def _before_first(self, text: str, at: int) -> int:
        """Behind an opening bracket."""
        return self._close(text, at) if text[at] in "}]" else self._before_next(text, at)

    def _before_next(self, text: str, at: int) -> int:
        """Where a key or a value must begin. A bracket that closes here stands behind a comma too many."""
        character = text[at]
        if character.isspace():
            return self._space(character, at)
        if character in "}]" and "," in self._held:
            self._held = self._held.replace(",", "", 1)
            return self._close(text, at)
        if self._open[-1] == "[":
            return self._value(text, at)
        return self._string_begins(at, is_key=True) if character == '"' else self._break(at)

    def _before_colon(self, text: str, at: int) -> int:
        if text[at].isspace():
            return self._space(text[at], at)
        if text[at] != ":":
            return self._break(at)
        self._held += ":"
        self._step = self._before_value
        return at + 1

    def _before_value(self, text: str, at: int) -> int:
        return self._space(text[at], at) if text[at].isspace() else self._value(text, at)

    def _value(self, text: str, at: int) -> int:
        character = text[at]
        if character in "{[":
            return self._open_bracket(text, at)
        if character == '"':
            self._value_begins()
            return self._string_begins(at, is_key=False)
        if _SCALAR.match(character):
            self._scalar, self._step = "", self._in_scalar
            return at
        return self._break(at)

    def _in_scalar(self, text: str, at: int) -> int:
        found = _SCALAR.match(text, at)
        if found:
            self._scalar += found[0]
            return found.end()
        self._value_begins()
        self._emit(_mended_scalar(self._scalar) or json.dumps(self._scalar))
        self._step = self._behind_value
        return at

    def _behind_value(self, text: str, at: int) -> int:
        character = text[at]
        if character.isspace():
            return self._space(character, at)
        if character in "}]":
            return self._close(text, at)
        if character != ",":
            return self._break(at)
        self._held += ","
        self._step = self._before_next
        return at + 1

    def _close(self, text: str, at: int) -> int:
        if text[at] != _CLOSING[self._open[-1]]:
            return self._break(at)
        self._emit(self._held)
        self._held = ""
        if len(self._open) == 1:
            self._step, self._is_done = self._behind_object, True  # its bracket comes at the end: it may be broken yet
            return at + 1
        self._emit(_CLOSING[self._open.pop()])
        self._step = self._behind_value
        return at + 1

    def _behind_object(self, text: str, at: int) -> int:
        return at + 1 if text[at].isspace() else self._break(at)

    # ---- strings ----------------------------------------------------------------------------------------------------------------

    def _string_begins(self, at: int, *, is_key: bool) -> int:
        self._is_key, self._step = is_key, self._in_string
        self._write('"')
        return at + 1

    def _write(self, text: str) -> None:
        """A piece of a string: a key waits for its value."""
        if self._is_key:
            self._held += text
        else:
            self._emit(text)

    def _in_string(self, text: str, at: int) -> int:
        character = text[at]
        if character == "\\":
            self._escape, self._step = "\\", self._in_escape
            return at + 1
        self._end_high()
        plain = _PLAIN.match(text, at)
        if plain:
            self._write(plain[0])
            return plain.end()
        if character == '"':
            self._write('"')
            self._step = self._before_colon if self._is_key else self._behind_value
        else:
            self._write(json.dumps(character)[1:-1])
        return at + 1

    def _in_escape(self, text: str, at: int) -> int:
        """Behind a backslash: what it escapes, or as much as came of it."""
        character = text[at]
        if self._escape != "\\":
            return self._in_unicode_escape(character, at)
        if character == "u":
            self._escape += "u"
            return at + 1
        self._end_high()
        self._step = self._in_string
        if character in _ESCAPES:
            self._write("\\" + character)
            return at + 1
        if character == "'":  # as Python writes it
            self._write("'")
            return at + 1
        self._write("\\\\")
        return at

    def _in_unicode_escape(self, character: str, at: int) -> int:
        if character not in _HEX:  # it is none: a backslash and what stands behind it
            self._end_high()
            self._write("\\" + self._escape)
            self._step = self._in_string
            return at
        self._escape += character
        if len(self._escape) == 6:
            self._step = self._in_string
            self._end_escape(self._escape)
        return at + 1

    def _end_escape(self, escape: str) -> None:
        value = int(escape[2:], 16)
        if 0xDC00 <= value < 0xE000:
            self._write(self._high + escape if self._high else _UNKNOWN_CHARACTER)
            self._high = ""
            return
        self._end_high()
        if 0xD800 <= value < 0xDC00:
            self._high = escape
        else:
            self._write(escape)

    def _end_high(self) -> None:
        """A first half of a pair that no second one follows."""
        if self._high:
            self._write(_UNKNOWN_CHARACTER)
            self._high = ""

    # ---- ends -------------------------------------------------------------------------------------------------------------------

    def _value_begins(self) -> None:
        self._emit(self._held)
        self._held = ""
        if len(self._open) == 1:
            self._is_empty = False

    def _space(self, character: str, at: int) -> int:
        self._held += character if character in " \t\r\n" else " "
        return at + 1

    def _break(self, at: int) -> int:
        """The text cannot be read from here on."""
        self._is_broken, self._held = True, ""
        return at

    def _break_off(self) -> None:
        """The text has ended: what is not whole is closed, or left out where nothing of its value has come."""
        if self._step == self._in_scalar:
            mended = _mended_scalar(self._scalar)
            if mended is not None:
                self._value_begins()
                self._emit(mended)
        elif self._step in (self._in_string, self._in_escape) and not self._is_key:
            self._end_high()
            self._emit('"')
        self._held = ""


def _mended_scalar(text: str) -> str | None:
    """A word or a number as JSON has it, a number that nobody could read as a text; None for anything else."""
    if not _NUMBER.fullmatch(text):
        return _WORDS.get(text)
    fits = len(text) <= MAX_NUMBER_CHARACTERS and math.isfinite(float(text))
    return text if fits else json.dumps(text)


def mended_object(text: str) -> dict[str, Any] | None:
    """The object that a text is, mended where it must be; None where it cannot be read as one."""
    text = well_formed(text)
    with contextlib.suppress(ValueError, RecursionError):
        strict = loads(text)
        if isinstance(strict, dict) and "\\ud" not in text.lower():
            return strict
    mender = ObjectMender()
    made = mender.feed(text) + mender.finish()
    if mender.is_broken:
        return None
    value: dict[str, Any] = json.loads(made or "{}")
    return value
