"""Stop strings: the text ends where the first of them completes, and no part of it was released before."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.errors import InvalidRequestError
from pellucid.text.stop import StopChecker

WORDS = st.text("ab\n", max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4)


def naive(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """Character by character: the first end at which a stop string is complete, the longest of those."""
    for end in range(1, len(text) + 1):
        ending = [string for string in stop if text[:end].endswith(string)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def run(checker: StopChecker, deltas: list[str]) -> tuple[list[str], str | None]:
    released = []
    for delta in deltas:
        text, matched = checker.push(delta)
        released.append(text)
        if matched is not None:
            return released, matched
    return [*released, checker.flush()], None


@settings(max_examples=1000, deadline=None)
@given(st.lists(WORDS, max_size=8), STOPS, st.booleans())
def test_given_any_deltas_when_pushed_then_the_text_is_the_oracle_s(
    deltas: list[str], stop: list[str], include: bool
) -> None:
    released, matched = run(StopChecker(stop, include), deltas)
    assert ("".join(released), matched) == naive("".join(deltas), stop, include)


@settings(max_examples=500, deadline=None)
@given(st.lists(WORDS, max_size=8), STOPS)
def test_given_any_deltas_when_pushed_then_what_is_held_back_could_begin_a_stop_string_and_is_the_least(
    deltas: list[str], stop: list[str]
) -> None:
    checker, seen, out = StopChecker(stop, False), "", ""
    for delta in deltas:
        seen += delta
        text, matched = checker.push(delta)
        out += text
        if matched is not None:
            return
        suffixes = [seen[start:] for start in range(len(seen) + 1)]
        longest = next(suffix for suffix in suffixes if not suffix or any(s.startswith(suffix) for s in stop))
        assert out + longest == seen


@pytest.mark.parametrize(
    ("stop", "deltas", "released", "matched"),
    [
        (["END"], ["text E", "N", "D more"], ["text ", "", ""], "END"),
        (["END"], ["text E", "NX"], ["text ", "ENX", ""], None),
        (["END"], ["EEN", "D"], ["E", ""], "END"),
        (["END"], ["tail EN"], ["tail ", "EN"], None),
        (["abcd", "bc"], ["abc", "d"], ["a"], "bc"),
        (["abcd", "bc"], ["abcd"], ["a"], "bc"),
        (["c", "bc"], ["abc"], ["a"], "bc"),
        (["\n\n"], ["one\n", "two\n", "\nthree"], ["one", "\ntwo", ""], "\n\n"),
        ([], ["a", "b"], ["a", "b", ""], None),
        (["👍"], ["ok 👍 x"], ["ok "], "👍"),
    ],
)
def test_given_a_stop_string_when_it_comes_in_pieces_then_the_release_is_as_tabled(
    stop: list[str], deltas: list[str], released: list[str], matched: str | None
) -> None:
    assert run(StopChecker(stop, False), deltas) == (released, matched)


def test_given_include_when_a_stop_string_matches_then_the_text_ends_with_it() -> None:
    checker = StopChecker(["END"], include_stop_str_in_output=True)
    assert checker.push("a E") == ("a ", None)
    assert checker.push("ND b") == ("END", "END")
    assert checker.matched == "END"


def test_given_a_match_when_more_is_pushed_then_nothing_more_is_released() -> None:
    checker = StopChecker(["x"])
    assert checker.push("axb") == ("a", "x")
    assert checker.push("cd") == ("", "x")
    assert checker.flush() == ""


@pytest.mark.parametrize("stop", [[""], ["a", ""], [3], [None]])
def test_given_a_stop_that_is_no_string_when_built_then_the_error_names_the_index(stop: list) -> None:
    with pytest.raises(InvalidRequestError, match=rf"stop\[{len(stop) - 1}\]") as caught:
        StopChecker(stop)
    assert caught.value.param == "stop"


def test_given_one_string_when_built_then_it_is_one_stop_string() -> None:
    assert run(StopChecker("END"), ["xEND"]) == (["x"], "END")
