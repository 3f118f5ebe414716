"""`StructuredOutputsParams`: the structure that an output must have. Plain data, checked when it is made.

Beside it, what follows an output token by token: `Matcher`, `Grammar`, and `CustomStructure` for those who bring their own.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from pellucid.errors import InvalidRequestError, shown
from pellucid.json_text import lone_surrogate

FIELD = "structured_outputs"
MAX_SCHEMA_BYTES = 256 << 10
MAX_SCHEMA_DEPTH = 100  # of lists and objects; the schema compiler reads 128
MAX_SCHEMA_VALUES = 50_000
MAX_REGEX_CHARACTERS = 8192
MAX_GRAMMAR_BYTES = 512 << 10
MAX_GRAMMAR_DEPTH = 100  # of brackets
MAX_CHOICES = 1024
MAX_CHOICE_CHARACTERS = 1024
MAX_CHOICES_CHARACTERS = 128 << 10
MAX_WHITESPACE_CHARACTERS = 128
MAX_AFTER_CHARACTERS = 128

_KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What a text must be: exactly one of `json`, `regex`, `choice`, `grammar` and `json_object`, with vLLM's names.

    `json`: a JSON schema, as an object or as its text; kept as text. `regex`: the whole text matches it (no look-around, no
    back-references). `choice`: the text is one of these. `grammar`: a grammar in Lark's syntax as llguidance reads it, or in
    GBNF. `json_object`: any JSON object. Whitespace between JSON's parts is at most one space, or one or two line ends and
    an indent, unless `whitespace_pattern` says otherwise or `disable_any_whitespace` leaves none. `after`: the structure begins behind the
    first place where this stands, such as the end of a model's reasoning; before it any text may stand.

    Raises:
        InvalidRequestError: naming the field, the value and the limit.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    after: str | None = None

    def __post_init__(self) -> None:
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{FIELD}.{name}", "is", getattr(self, name), "it must be true or false")
        given = self._given()
        if len(given) != 1:
            raise InvalidRequestError(
                FIELD, f"has {', '.join(given) or 'nothing'}", limit=f"it must have exactly one of {', '.join(_KINDS)}"
            )
        if self.json is not None:
            self._set("json", _schema_text(self.json))
        if self.choice is not None:
            self._set("choice", _choices(self.choice))
        if self.regex is not None:
            _text("regex", self.regex, MAX_REGEX_CHARACTERS)
        if self.grammar is not None:
            _check_grammar(self.grammar)
        if self.after is not None:
            _text("after", self.after, MAX_AFTER_CHARACTERS)
        self._check_whitespace(given[0])

    def _check_whitespace(self, kind: str) -> None:
        if self.whitespace_pattern is not None:
            _text("whitespace_pattern", self.whitespace_pattern, MAX_WHITESPACE_CHARACTERS)
            if self.disable_any_whitespace:
                raise InvalidRequestError(
                    f"{FIELD}.whitespace_pattern",
                    "is given beside disable_any_whitespace",
                    limit="only one of them can hold",
                )
        for name in ("whitespace_pattern", "disable_any_whitespace"):
            if getattr(self, name) and kind not in ("json", "json_object"):
                raise InvalidRequestError(
                    f"{FIELD}.{name}", f"is given beside {kind}", limit="it is about json and json_object"
                )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def kind(self) -> str:
        """The one of the five that was given."""
        return self._given()[0]

    def _given(self) -> list[str]:
        return [name for name in _KINDS if not any(getattr(self, name) is nothing for nothing in (None, False))]

    @classmethod
    def of(cls, value: object) -> StructuredOutputsParams:
        """From the parameters themselves or a mapping with their names, of which None counts as not given.

        Raises:
            InvalidRequestError: it is neither, a name is unknown, or as the constructor does.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise InvalidRequestError(FIELD, "is", value, "it must be an object")
        unknown = [name for name in value if name not in _NAMES]
        if unknown:
            raise InvalidRequestError(
                FIELD, "has the unknown key", unknown[0], f"known are {', '.join(sorted(_NAMES))}"
            )
        return cls(**{name: one for name, one in value.items() if one is not None})


_NAMES = frozenset(entry.name for entry in fields(StructuredOutputsParams))


class Matcher(Protocol):
    """Follows one output. `mask` [ceil(V / 32)] has bit i % 32 of word i / 32 set where token i may come next, as of `fill`;
    `is_complete`: nothing can follow; `error`: why the output cannot go on."""

    mask: npt.NDArray[np.uint32]
    is_complete: bool
    error: str | None

    def fill(self) -> None:
        """Bring `mask` to where the output stands."""

    def accept(self, token_id: int) -> bool:
        """Take the output's next token. False when it does not fit."""


class Grammar(Protocol):
    """What outputs are matched with."""

    def matcher(self, output_token_ids: Sequence[int] = ()) -> Matcher:
        """A matcher for one output, which has these tokens already."""


class CustomStructure(ABC):
    """A structure that says by itself which token may come next. It is code, so it reaches engines of this process alone."""

    @abstractmethod
    def compile(self, vocab_size: int) -> Grammar:
        """The structure over a model's vocabulary.

        Raises:
            InvalidRequestError: it does not fit the vocabulary.
        """


def _text(name: str, value: object, limit: int) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{FIELD}.{name}", "is", value, "it must be a string")
    if not value:
        raise InvalidRequestError(f"{FIELD}.{name}", "is empty", limit="it must have at least one character")
    if len(value) > limit:
        raise InvalidRequestError(f"{FIELD}.{name}", f"has {len(value):,} characters", limit=f"the limit is {limit:,}")
    found = lone_surrogate(value)
    if found:
        raise InvalidRequestError(f"{FIELD}.{name}", f"holds {found}", limit="it must be well-formed Unicode")
    return value


def _choices(value: object) -> tuple[str, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise InvalidRequestError(f"{FIELD}.choice", "is", value, "it must be a list of strings")
    if not 1 <= len(value) <= MAX_CHOICES:
        raise InvalidRequestError(
            f"{FIELD}.choice", f"has {len(value):,} entries", limit=f"it must have 1 to {MAX_CHOICES:,}"
        )
    choices = tuple(_text(f"choice[{index}]", one, MAX_CHOICE_CHARACTERS) for index, one in enumerate(value))
    if sum(map(len, choices)) > MAX_CHOICES_CHARACTERS:
        raise InvalidRequestError(
            f"{FIELD}.choice",
            f"has {sum(map(len, choices)):,} characters",
            limit=f"the limit is {MAX_CHOICES_CHARACTERS:,}",
        )
    return choices


def _check_grammar(value: object) -> None:
    text = _text("grammar", value, MAX_GRAMMAR_BYTES)
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise InvalidRequestError(
            f"{FIELD}.grammar", f"has {len(text.encode()):,} bytes", limit=f"the limit is {MAX_GRAMMAR_BYTES:,}"
        )
    if bracket_depth(text) > MAX_GRAMMAR_DEPTH:
        raise InvalidRequestError(
            f"{FIELD}.grammar", f"nests {bracket_depth(text):,} brackets", limit=f"the limit is {MAX_GRAMMAR_DEPTH}"
        )


def bracket_depth(text: str) -> int:
    """The greatest number of brackets that are open at once, wherever they stand."""
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth = max(0, depth - 1)
    return deepest


def _schema_text(value: object) -> str:
    """The schema as compact JSON; the order of its properties is kept, for it is the order of the output's."""
    schema = _parse_schema(value) if isinstance(value, str) else value
    if not isinstance(schema, Mapping):
        raise InvalidRequestError(f"{FIELD}.json", "is", schema, "it must be a JSON schema: an object")
    if "x-guidance" in schema:
        raise InvalidRequestError(
            f"{FIELD}.json", "has the key 'x-guidance'", limit="use whitespace_pattern or disable_any_whitespace"
        )
    _check_values(schema)
    try:
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_no_json)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{FIELD}.json", f"is no JSON: {error}") from None
    if len(text) > MAX_SCHEMA_BYTES or len(text.encode(errors="replace")) > MAX_SCHEMA_BYTES:
        raise InvalidRequestError(
            f"{FIELD}.json",
            f"has {len(text.encode(errors='replace')):,} bytes",
            limit=f"the limit is {MAX_SCHEMA_BYTES:,}",
        )
    return _text("json", text, MAX_SCHEMA_BYTES)


def _no_json(value: object) -> NoReturn:
    raise TypeError(f"{shown(value)} is no JSON value")


def _parse_schema(text: str) -> Any:
    if len(text) > MAX_SCHEMA_BYTES:
        raise InvalidRequestError(
            f"{FIELD}.json", f"has {len(text):,} characters", limit=f"the limit is {MAX_SCHEMA_BYTES:,}"
        )
    try:
        return json.loads(text, parse_constant=_no_json)
    except RecursionError:
        raise InvalidRequestError(
            f"{FIELD}.json", "nests too deeply", limit=f"the limit is {MAX_SCHEMA_DEPTH}"
        ) from None
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{FIELD}.json", f"is no JSON: {error}") from None


def _check_values(schema: Mapping[str, Any]) -> None:
    """Depth and number of values, without recursion: what is nested too deeply would break whoever recurses."""
    pending: list[tuple[Any, int]] = [(schema, 1)]
    count = 0
    while pending:
        value, depth = pending.pop()
        count += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise InvalidRequestError(
                f"{FIELD}.json",
                f"nests more than {depth - 1} lists and objects",
                limit=f"the limit is {MAX_SCHEMA_DEPTH}",
            )
        if count > MAX_SCHEMA_VALUES:
            raise InvalidRequestError(
                f"{FIELD}.json", f"has more than {MAX_SCHEMA_VALUES:,} values", limit="that is the limit"
            )
        pending.extend((one, depth + 1) for one in _containers(value))


def _containers(value: object) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from (one for one in value.values() if isinstance(one, (Mapping, list, tuple)))
    elif isinstance(value, (list, tuple)):
        yield from (one for one in value if isinstance(one, (Mapping, list, tuple)))
