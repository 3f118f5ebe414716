"""Values that an interface must survive: boundaries, wrong types, what looks like a number and is none, text that is no text."""

from __future__ import annotations

import math
from collections import ChainMap, OrderedDict, deque
from collections.abc import Callable
from decimal import Decimal
from enum import Enum, IntEnum
from fractions import Fraction
from random import Random
from types import MappingProxyType
from typing import Any

import numpy as np

from kit.tiny_model import BEYOND

INTEGERS = (
    *(0, 1, -1, 2, 3, 5, -2, 100, 101, 127, 128, 129, 255, 256, 319, 320, 321, 1024, 1025, 65_535, 65_536),
    *(2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32 - 1, 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63)),
    *(-(2**63) - 1, 2**64 - 1, 2**64, 10**30, -(10**30), 10**400),
)
FLOATS = (
    *(0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.0, -2.0, 10.0, 100.0, -100.0, 100.5, 1e9, -1e9, 1e18, 1e19),
    *(math.nan, math.inf, -math.inf, 5e-324, -5e-324, 1e-310, 1e-46, 7e-46, 1.4e-45, 1e-40, 1.1754942e-38),
    *(1.1754944e-38, 1e-30, 1e-8, 5.9e-8, 1.0000000000000002, 0.9999999999999999, 0.99999997, 0.99999999),
    *(3.4028234e38, 3.4028236e38, 1e39, 1.7e308, 100.00000000000001, 99.99999999999999),
)
TEXTS = (
    *(
        "",
        " ",
        "a",
        "e",
        "the",
        "hello world",
        "1",
        "0",
        "-1",
        "1.5",
        "1e999",
        "nan",
        "true",
        "null",
        "None",
        "\n",
        "\t",
    ),
    *("\0", "a\0b", "\ud800", "a\udfffb", "\udc80", "\U0010ffff", "\ufeff", "\u202e", "é", "e\u0301", "😀", "👨‍👩‍👧‍👦"),
    *(
        "日本語",
        "﷽",
        "</s>",
        "<s>",
        "<|im_end|>",
        "<|im_start|>assistant\n",
        BEYOND,
        f"a {BEYOND} b",
        "<think>",
        "{{ 7*7 }}",
    ),
    *("../../etc/passwd", "%s%n", "'; --", "\\u0000", '{"a": 1}', "[", "x" * 1025, "word " * 60, "ab" * 40),
)


class _Color(Enum):
    RED = "red"


class _Level(IntEnum):
    HIGH = 2


class _Text(str):
    """A text of another class."""


class _Number:
    """Says that it is a number, an index and a length, and is none of them."""

    def __index__(self) -> int:
        return 3

    def __float__(self) -> float:
        return 0.5

    def __len__(self) -> int:
        return 2


class _Cycle(list):  # type: ignore[type-arg]
    """Holds itself."""

    def __init__(self) -> None:
        super().__init__([1])
        self.append(self)


def _deep(depth: int, as_lists: bool) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if as_lists else {"a": value}
    return value


_OBJECTS: tuple[Callable[[], Any], ...] = (
    lambda: None,
    lambda: True,
    lambda: False,
    lambda: np.bool_(True),
    lambda: np.int8(-1),
    lambda: np.int32(3),
    lambda: np.int64(2**62),
    lambda: np.uint64(2**64 - 1),
    lambda: np.float16(0.5),
    lambda: np.float32(np.nan),
    lambda: np.float64(0.25),
    lambda: np.float32(1e-45),
    lambda: np.longdouble("1e-400"),
    lambda: np.str_("a"),
    lambda: np.array(1),
    lambda: np.array([1, 2, 3]),
    lambda: np.array([0.5, np.nan]),
    lambda: np.array([[1, 2], [3, 4]]),
    lambda: np.array(["a", None], dtype=object),
    lambda: np.array([]),
    lambda: Decimal("0.5"),
    lambda: Decimal("NaN"),
    lambda: Fraction(1, 3),
    lambda: 1 + 2j,
    lambda: b"bytes",
    lambda: bytearray(b"ab"),
    lambda: memoryview(b"ab"),
    lambda: _Text("a"),
    lambda: _Color.RED,
    lambda: _Level.HIGH,
    _Number,
    object,
    _Cycle,
    lambda: int,
    lambda: len,
    lambda: lambda: 1,
    lambda: ...,
    lambda: NotImplemented,
    lambda: ValueError("x"),
    list,
    tuple,
    dict,
    set,
    lambda: [None],
    lambda: [[]],
    lambda: [1, 2, 3],
    lambda: (5, 6),
    lambda: [1.0, 2.0],
    lambda: [True],
    lambda: ["a", 1],
    lambda: ["a", "b"],
    lambda: [""],
    lambda: ["\ud800"],
    lambda: {1, 2},
    lambda: frozenset({"a"}),
    lambda: deque([1, 2]),
    lambda: range(3),
    lambda: range(0),
    lambda: (i for i in (5, 6)),
    lambda: iter(["a"]),
    lambda: {"a": 1},
    lambda: {1: 2},
    lambda: {5: math.nan},
    lambda: {5: 1e-46, 6: -100.0},
    lambda: {"5": 1.0},
    lambda: {2**40: 1.0},
    lambda: {-1: 1.0},
    lambda: {(1, 2): 3},
    lambda: {None: None},
    lambda: OrderedDict(a=1),
    lambda: MappingProxyType({5: 1.0}),
    lambda: ChainMap({5: 1.0}),
    lambda: _deep(40, True),
    lambda: _deep(900, True),
    lambda: _deep(900, False),
    lambda: ["x"] * 33,
    lambda: ["x" * 1024] * 32,
    lambda: list(range(320)),
    lambda: list(range(321)),
    lambda: [5] * 5000,
    lambda: dict.fromkeys(range(5, 300), 0.5),
    lambda: dict.fromkeys(range(1025), 1.0),
)


def anything(draw: Random) -> Any:
    """A value that fits next to nothing; made anew each time."""
    kind = draw.random()
    if kind < 0.25:
        return draw.choice(INTEGERS)
    if kind < 0.5:
        return draw.choice(FLOATS)
    return draw.choice(TEXTS) if kind < 0.65 else draw.choice(_OBJECTS)()


def number(draw: Random) -> Any:
    """One that may be lost on the way to another type."""
    return draw.choice(FLOATS if draw.random() < 0.6 else INTEGERS)


def text(draw: Random) -> str:
    """One that may be hard to tokenise, to send, or to show."""
    if draw.random() < 0.6:
        return draw.choice(TEXTS)
    alphabet = ("abc \n", "aé日😀", "\x00\x01\x1f\x7f", "<>|s/", "\ud800a\udc00")[draw.randrange(5)]
    return "".join(draw.choices(alphabet, k=draw.choice((1, 2, 7, 40, 90))))


def token_ids(draw: Random, vocab_size: int, limit: int, oddness: float) -> list[Any]:
    """Mostly ids; some at the edge of the vocabulary, of another type, or too many."""
    length = draw.choice((1, 1, 2, 5, 16, 17, 40, limit - 2, limit - 1))
    if draw.random() < oddness / 4:
        length = draw.choice((0, limit, limit + 1))
    ids: list[Any] = draw.choices(range(vocab_size), k=length)
    if ids and draw.random() < oddness:
        odd = (0, vocab_size - 1, vocab_size, -1, 2**31, 2**63, 1.0, True, "5", None, np.int64(5), np.int32(-1), [5])
        ids[draw.randrange(len(ids))] = draw.choice(odd)
    return ids


def shown(value: Any, limit: int = 160) -> str:
    """How a report quotes it."""
    try:
        told = repr(value)
    except Exception as error:
        told = f"<{type(value).__name__}, whose repr raises {type(error).__name__}>"
    told = told.encode("unicode_escape").decode() if not told.isprintable() else told
    return told if len(told) <= limit else told[: limit - 1] + "…"
