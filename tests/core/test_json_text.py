"""JSON that leaves Pellucid: always UTF-8, always values that JSON has, and made in one place."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pellucid
from pellucid.errors import InvalidRequestError
from pellucid.json_text import check_values, dumps, encode, loads, well_formed

ANY_TEXT = st.text(st.characters(codec=None), max_size=20)
HALVES = st.text(st.sampled_from("\ud83d\ude00a😀é"), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | HALVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT | HALVES, inner, max_size=4),
    max_leaves=12,
)


class Pair(msgspec.Struct):
    name: str
    value: float


@dataclass
class Named:
    name: str


def _strict(text: bytes | str) -> Any:
    return json.loads(text, parse_constant=lambda constant: pytest.fail(constant))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("aé😀", "aé😀"),
        ("\ud83d\ude00", "😀"),
        ("\ud83d", "\ufffd"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("a\ud83db", "a\ufffdb"),
        ("\ud83d\ud83d\ude00\ude00", "\ufffd😀\ufffd"),
    ],
)
def test_given_text_when_made_well_formed_then_halves_are_joined_or_replaced(text: str, expected: str) -> None:
    assert well_formed(text) == expected


@given(ANY_TEXT | HALVES)
def test_given_any_text_when_made_well_formed_then_it_can_be_encoded_and_what_could_is_left(text: str) -> None:
    made = well_formed(text)
    made.encode()
    assert well_formed(made) == made
    if not any("\ud800" <= character <= "\udfff" for character in text):
        assert made == text


@given(VALUES)
def test_given_any_value_when_written_then_it_is_strict_json(value: Any) -> None:
    for text in (encode(value), dumps(value).encode(), dumps(value, indent=1).encode(), dumps(value, ascii_only=True)):
        _strict(text)
    assert dumps(value, ascii_only=True).isascii()


def test_given_values_of_other_types_when_written_then_they_are_as_plain_ones() -> None:
    for text, expected in (("so", "so"), ("\ud800", "\ufffd")):
        given: dict[str, Any] = {
            "pair": Pair(text, math.nan),
            "named": Named(text),
            "mapping": MappingProxyType({text: math.inf}),
            "raw": msgspec.Raw(b"[1.5]"),
            "keys": {5: (text,)},
        }
        assert _strict(encode(given)) == {
            "pair": {"name": expected, "value": None},
            "named": {"name": expected},
            "mapping": {expected: None},
            "raw": [1.5],
            "keys": {"5": [expected]},
        }


@pytest.mark.parametrize("text", ["NaN", "[-Infinity]", '{"a": 1e999}', "{", ""])
def test_given_text_that_is_no_json_when_read_then_it_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        loads(text)


@pytest.mark.parametrize(
    ("value", "message", "param"),
    [
        ({"a": [{"b": "x\ud800"}]}, r"a\[0\]\.b holds the lone surrogate U\+D800 at position 1", "a"),
        ({"a": {"\udfff": 1}}, r"a holds the lone surrogate U\+DFFF", "a"),
        ({"\udfff": 1}, "line 3 holds the lone surrogate", None),
        ({"a": {"b": math.nan}}, r"a\.b is nan; it must be a finite number", "a"),
        ([1.0, -math.inf], r"\[1\] is -inf", "1"),
        ("\ud800", "line 3 holds", None),
    ],
)
def test_given_values_that_json_lacks_when_checked_then_the_place_is_named(
    value: Any, message: str, param: str | None
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        check_values(value, "line 3")
    assert caught.value.param == param
    check_values({"a": ["😀", 1.5, None, True, 10**400]}, "line 3")


# Where JSON is made that does not leave the process or its own files, or that a grammar or a prompt is made of.
OWN = {
    "json_text.py": "the one place",
    "executor/loader.py": "sections of a packed program",
    "program/file.py": "the head of a packed program",
    "weights/safetensors.py": "the head of a file of tensors",
    "api/structured_outputs.py": "a schema as it is compared",
    "structure/grammar_source.py": "grammars",
    "structure/grammar_trial.py": "grammars, for our own child",
    "text/gguf_vocabulary.py": "a tokenizer's file for its library",
    "text/json_mending.py": "texts within JSON",
    "text/template_sandbox.py": "prompts",
    "structure/tool_grammar.py": "grammars",
    "text/tool_prompt.py": "prompts",
    "text/tool_syntax.py": "texts within JSON",
    "server/anthropic/input.py": "arguments on their way to the template",
    "bench/startup.py": "options for our own child",
    "bench/startup_child.py": "figures for our own parent",
    "commands/capture.py": "metadata that a second run compares",
}


def test_given_the_package_when_json_leaves_it_then_it_is_made_in_one_place() -> None:
    root = Path(pellucid.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in ("json.dumps", "json.dump", "msgspec.json.encode", "msgspec.json.Encoder"):
                found.add(path.relative_to(root).as_posix())
    assert found == set(OWN)
