"""Prompt lookup against a search that reads the whole text each time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.scheduling.speculative import PromptLookup


def search(tokens: list[int], shortest: int, longest: int, most: int) -> tuple[int, ...]:
    """The longest tail that occurs earlier, there the latest place; what follows, going round where the text ends."""
    for length in range(longest, shortest - 1, -1):
        tail = tokens[len(tokens) - length :]
        for start in range(len(tokens) - length - 1, -1, -1):
            if length < len(tokens) and tokens[start : start + length] == tail:
                text = list(tokens)
                for index in range(most):
                    text.append(text[start + length + index])
                return tuple(text[len(tokens) :])
    return ()


@pytest.mark.parametrize(
    ("tokens", "shortest", "longest", "most", "expected"),
    [
        ([1, 2, 3, 9, 1, 2], 2, 4, 3, (3, 9, 1)),  # what followed the same two tokens
        ([1, 2, 3, 4, 1, 2], 3, 4, 3, ()),  # no three that occurred before
        ([5, 1, 6, 1, 7, 1], 1, 1, 1, (7,)),  # of two places the latest
        ([2, 1, 8, 3, 1, 9, 2, 1], 1, 2, 1, (8,)),  # a longer tail goes before a later place
        ([4, 4, 4], 1, 2, 5, (4, 4, 4, 4, 4)),  # a text that ends too soon repeats itself
        ([7], 1, 3, 4, ()),
    ],
)
def test_text_when_looked_up_then_what_followed_its_tail(
    tokens: list[int], shortest: int, longest: int, most: int, expected: tuple[int, ...]
) -> None:
    assert PromptLookup(shortest, longest).propose(tokens, most) == expected
    assert search(tokens, shortest, longest, most) == expected


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    first=st.integers(1, 40),
    shortest=st.integers(1, 3),
    more=st.integers(0, 3),
    most=st.integers(1, 8),
)
def test_growing_text_when_looked_up_as_it_grows_then_as_a_search_of_the_whole(
    tokens: list[int], first: int, shortest: int, more: int, most: int
) -> None:
    lookup = PromptLookup(shortest, shortest + more)
    for end in range(min(first, len(tokens)), len(tokens) + 1):
        assert lookup.propose(tokens[:end], most) == search(tokens[:end], shortest, shortest + more, most)
