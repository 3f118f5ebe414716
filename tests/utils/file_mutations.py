"""Damage to files: to their bytes, and to what a JSON text says. The same for the same random generator."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

KIND_NAMES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "safetensors", "index", "gguf", "gguf vocabulary", "pld"),
    *("run input", "capture input", "capture shard", "bench dataset", "trace", "replayed trace", "wheel"),
)  # made by utils.file_kinds
_NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    255,
    299,
    300,
    999,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64,
    -(2**63) - 1,
    10**30,
    10**400,
)
_REALS = (0.0, -0.5, 0.5, 1.5, 500.0, 1e-320, 1e-46, 3.5e38, 1e308, math.nan, math.inf, -math.inf)
_TEXTS = (
    "",
    "x",
    "2",
    "0.5",
    "nan",
    "\ud800",
    "\0",
    "é",
    "../x",
    "a" * 300,
    "swish",
    "gptq",
    "llama",
    "yarn",
    "linear",
)
_DEEP = "a value that is nested deeply"
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, _DEEP),
    *_NUMBERS,
    *_REALS,
    *_TEXTS,
    *([], [1], [[2]], [None], ["a"], [True], [2, 999], [2, 2**31], [1.5], [[[]]] * 3, list(range(40))),
    *({}, {"a": 1}, {"content": 5}, {"content": "x"}, {"type": "x"}, {"name": "x"}, {"factor": 0}),
)
_MARKS = (
    b"\0",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff" * 8,
    b"\0" * 8,
    b"\x80",
    b"\n",
    b'"',
    b"{",
    b"[" * 300,
    b"1e999",
    b"9" * 5000,
)

Change = Callable[[random.Random, bytes], bytes]


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """One to four edits: bytes changed, written over, put in, taken out, doubled, or the end cut off."""
    made = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        # Most of what can be said wrongly stands at the beginning.
        most = len(made) if rng.random() < 0.5 else min(len(made), 2048)
        at = rng.randrange(most + 1)
        length = rng.choice((1, 1, 4, 8, 64))
        kind = rng.randrange(7)
        if kind == 0:
            made[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            mark = rng.choice(_MARKS)
            made[at : at + len(mark)] = mark
        elif kind == 2:
            made[at:at] = rng.choice(_MARKS)
        elif kind == 3:
            del made[at : at + length]
        elif kind == 4:
            made[at:at] = made[at : at + length]
        elif kind == 5 and made:
            at = min(at, len(made) - 1)
            made[at] ^= 1 << rng.randrange(8)
        else:
            del made[rng.choice((at, len(made) - min(len(made), length))) :]
    return bytes(made)


def _nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def damaged_json(keys: Sequence[str] = ()) -> Change:
    """Damage to one to three values of a JSON object; `keys` are names that it may have besides its own."""

    def change(rng: random.Random, content: bytes) -> bytes:
        if rng.random() < 0.15:
            return damaged_bytes(rng, content)
        value = json.loads(content)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            value = _with_damage(rng, value, keys)
        text = json.dumps(value).replace(json.dumps(_DEEP), _nested(rng.choice((90, 110, 2_000, 100_000))))
        if rng.random() < 0.05:
            text = _with_a_key_twice(rng, text, value)
        return (b"\xef\xbb\xbf" if rng.random() < 0.02 else b"") + text.encode()

    return change


def _with_damage(rng: random.Random, value: Any, keys: Sequence[str]) -> Any:
    """Goes down a random way and puts something else in the place of what is there."""
    if isinstance(value, dict):
        if keys and rng.random() < 0.3:
            return {**value, rng.choice(keys): _anything(rng)}
        if value and rng.random() < 0.9:
            key = rng.choice(list(value))
            if rng.random() < 0.1:
                return {name: item for name, item in value.items() if name != key}
            deeper = isinstance(value[key], (dict, list)) and rng.random() < 0.8
            return {**value, key: _with_damage(rng, value[key], ()) if deeper else _anything(rng, value)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        kind = rng.randrange(4)
        if kind == 0:
            return value[:at]
        if kind == 1:
            return [*value, value[at]]
        deeper = kind == 2 and isinstance(value[at], (dict, list))
        return [*value[:at], _with_damage(rng, value[at], ()) if deeper else _anything(rng), *value[at + 1 :]]
    return _anything(rng)


def _anything(rng: random.Random, value: dict[str, Any] | None = None) -> Any:
    if value and rng.random() < 0.15:
        return rng.choice(list(value.values()))
    found = rng.choice(HOSTILE)
    for _ in range(rng.choice((0, 0, 0, 0, 0, 1, 3))):
        found = [found] if rng.random() < 0.5 else {"a": found}
    return found


def _with_a_key_twice(rng: random.Random, text: str, value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return text
    key = rng.choice(list(value))
    return text[:-1] + ", " + json.dumps(key) + ": " + json.dumps(_anything(rng, value)) + "}"


def damaged_lines(change: Change) -> Change:
    """Damage to one line of a file of lines, or to their order, or to the bytes of the whole."""

    def apply(rng: random.Random, content: bytes) -> bytes:
        lines = content.splitlines(keepends=True)
        kind = rng.randrange(10)
        at = rng.randrange(len(lines))
        if kind == 0:
            return damaged_bytes(rng, content)
        if kind == 1:
            del lines[at]
        elif kind == 2:
            lines.insert(rng.randrange(len(lines)), lines[at])
        else:
            lines[at] = change(rng, lines[at].rstrip(b"\n")) + b"\n"
        return b"".join(lines)

    return apply
