"""A model's object as strict JSON: nothing that it wrote is lost, and what comes out is the same however it was cut."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.text.json_mending import MAX_DEPTH, RAW_KEY, ObjectMender, mended_object

# A text that strict JSON has as well, and what comes out; None: what is read is the raw text.
LONG = "9" * 5000
MENDED: list[tuple[str, dict[str, Any] | None]] = [
    ("", {}),
    (" \n", {}),
    ("{}", {}),
    ('{"a": "x\ny\t\x00"}', {"a": "x\ny\t\x00"}),
    ('{"a\n": 1}', {"a\n": 1}),
    (r'{"a": "x\q"}', {"a": r"x\q"}),
    (r'{"a": "\d+\.\w", "b": "it\'s"}', {"a": r"\d+\.\w", "b": "it's"}),
    (r'{"a": "x\u12"}', {"a": r"x\u12"}),
    (r'{"a": "\ud83d"}', {"a": "\ufffd"}),
    (r'{"a": "\ude00\ud83dx\ud83d\ud83d\ude00"}', {"a": "\ufffd\ufffdx\ufffd😀"}),
    (r'{"\ud800": "\ud83d\n"}', {"\ufffd": "\ufffd\n"}),
    (r'{"a": "\ud83d\q"}', {"a": "\ufffd\\q"}),
    (r'{"a": "\ud83d\u12"}', {"a": "\ufffd\\u12"}),
    ('{"a": "\ud800"}', {"a": "\ufffd"}),
    ('{"a": 1,}', {"a": 1}),
    ('{"a": [1, 2, ], "b": {"c": null,\n},\n}', {"a": [1, 2], "b": {"c": None}}),
    ('{"a": True, "b": None, "c": False}', {"a": True, "b": None, "c": False}),
    ('{"a": NaN, "b": -Infinity, "c": 1e999}', {"a": "NaN", "b": "-Infinity", "c": "1e999"}),
    (f'{{"a": {LONG}, "b": 1.{LONG}}}', {"a": LONG, "b": f"1.{LONG}"}),
    ('{"a": 12345678901234567890123456789012345678901234567890}', {"a": 12345678901234567890123456789012345678901234567890}),
    ('{"a": 2024-01-31, "b": 007, "c": yes}', {"a": "2024-01-31", "b": "007", "c": "yes"}),
    ('\u00a0{"a":\u00a01}\u2028', {"a": 1}),
    # cut off
    ('{"a": "he', {"a": "he"}),
    ('{"a": "he\\', {"a": "he"}),
    ('{"a": "he\\u00e', {"a": "he"}),
    ('{"a": "he\\ud83d', {"a": "he\ufffd"}),
    ('{"a": "b", "c', {"a": "b"}),
    ('{"a": "b", "c"', {"a": "b"}),
    ('{"a": "b", "c": ', {"a": "b"}),
    ('{"a": 12', {"a": 12}),
    ('{"a": 12.', {}),
    ('{"a": tru', {}),
    ('{"a": true', {"a": True}),
    ('{"a": [1, {"b": ["x', {"a": [1, {"b": ["x"]}]}),
    ('{"a": 1,', {"a": 1}),
    ("{", {}),
    # no object
    ("[1]", None),
    ('"x"', None),
    ("x", None),
    ("{a: 1}", None),
    ("{'a': 1}", None),
    ("{,}", None),
    ('{"a" 1}', None),
    ('{"a": é}', None),
    ("{" + '"a": {' * MAX_DEPTH, None),
]  # fmt: skip
# What can be read stands beside the raw text.
BROKEN: list[tuple[str, dict[str, Any]]] = [
    ('{"a": "b" "c": 1}', {"a": "b"}),
    ('{"a": "he said "no""}', {"a": "he said "}),
    ('{"a": [1 2], "b": 3}', {"a": [1]}),
    ('{"x": {"a": \'b\'}}', {"x": {}}),
    ('{"a": 1} and so on', {"a": 1}),
    ('{"a": 1]', {"a": 1}),
    ('{"a": 1, 2}', {"a": 1}),
]


def _mended(pieces: list[str]) -> str:
    mender = ObjectMender()
    return "".join([*map(mender.feed, pieces), mender.finish()])


def _strict(text: str) -> Any:
    text.encode()
    return json.loads(text or "{}", parse_constant=lambda constant: pytest.fail(constant))


@pytest.mark.parametrize(("text", "expected"), MENDED, ids=range(len(MENDED)))
def test_given_text_when_mended_then_it_is_an_object(text: str, expected: dict[str, Any] | None) -> None:
    found = _strict(_mended([text]))
    if expected is None:
        assert found[RAW_KEY] == text
        assert mended_object(text) is None
    else:
        assert found == expected
        assert mended_object(text) == expected


@pytest.mark.parametrize(("text", "read"), BROKEN, ids=range(len(BROKEN)))
def test_given_text_that_breaks_when_mended_then_the_whole_stands_beside_what_was_read(
    text: str, read: dict[str, Any]
) -> None:
    assert _strict(_mended([text])) == {**read, RAW_KEY: text}
    assert mended_object(text) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=4), JSON, max_size=4), st.booleans(), st.sampled_from([None, 0, 1]))
def test_given_strict_object_when_mended_then_it_comes_out_as_it_is(
    value: dict[str, Any], ascii_only: bool, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert _mended(list(text)) == text
    assert mended_object(text) == value


@settings(max_examples=500)
@given(
    st.lists(
        st.sampled_from(
            [*'{}[]":,\\ \nax1', '"a": ', '{"a": "', "\\ud83d", "\\ude00", "\ud83d", "NaN", "1e9", "true", ", ", "-", "\x00", "'"]
        ),
        max_size=24,
    ),
    st.lists(st.integers(0, 200), max_size=6),
)  # fmt: skip
def test_given_any_text_when_cut_anywhere_then_an_object_comes_out_and_the_same(
    words: list[str], places: list[int]
) -> None:
    text = '{"' * (len(words) % 2) + "".join(words)
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # as a stream has it
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    made = _mended([text])
    assert _mended([text[a:b] for a, b in itertools.pairwise(ends)]) == _mended(list(text)) == made
    found = _strict(made)
    assert isinstance(found, dict)
    assert _mended([made]) == made  # mending changes nothing the second time
    if RAW_KEY in found and RAW_KEY not in text:
        assert found[RAW_KEY] == text


@given(st.dictionaries(st.text(max_size=3), JSON, max_size=3), st.data())
def test_given_strict_object_when_cut_off_then_what_came_is_kept(value: dict[str, Any], data: st.DataObject) -> None:
    text = json.dumps(value)
    cut = text[: data.draw(st.integers(0, len(text)))]
    mender = ObjectMender()
    said = mender.feed(cut)
    assert cut.startswith(said.rstrip())  # nothing is told that has to be taken back
    assert isinstance(_strict(said + mender.finish()), dict)
    assert not mender.is_broken
