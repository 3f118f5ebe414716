"""The data of a refusal, and the text that is made of it."""

from __future__ import annotations

import pickle

import pytest

from pellucid.errors import ABSENT, FieldName, InvalidRequestError, renamed_path
from pellucid.service.messages import ErrorInfo

BESIDE = ("it must be at most ", FieldName("max_tokens"), ", 5")
ERRORS = [
    (InvalidRequestError("n", "is", 0, "it must be in [1, 128]"), "n is 0; it must be in [1, 128]"),
    (InvalidRequestError("n", "is", None), "n is None"),
    (InvalidRequestError("min_tokens", "is 10", limit=BESIDE), "min_tokens is 10; it must be at most max_tokens, 5"),
    (InvalidRequestError("tools", ": no call can be told apart"), "tools: no call can be told apart"),
    (InvalidRequestError("prompt", ("the ", FieldName("prompt"), " is empty")), "the prompt is empty"),
    (
        InvalidRequestError(None, "the body is empty", limit="it must be an object"),
        "the body is empty; it must be an object",
    ),
]


@pytest.mark.parametrize(("error", "text"), ERRORS, ids=[text for _, text in ERRORS])
def test_refusal_when_told_copied_or_sent_then_its_text_is_the_same(error: InvalidRequestError, text: str) -> None:
    for one in (error, pickle.loads(pickle.dumps(error)), ErrorInfo.of(error).to_error(), error.named({})):
        assert str(one) == text
        assert isinstance(one, InvalidRequestError)
        assert (one.field, one.param, one.limit) == (error.field, error.param, error.limit)
        assert (one.value is ABSENT) == (error.value is ABSENT)


def test_refusal_when_fields_are_called_otherwise_then_text_and_param_say_so_and_values_stay() -> None:
    names = {"max_tokens": "max_completion_tokens", "stop": "stop_sequences", "a": "b"}
    beside = ErrorInfo.of(InvalidRequestError("min_tokens", "is", "max_tokens", BESIDE)).to_error()
    assert isinstance(beside, InvalidRequestError)
    assert str(beside.named(names)) == "min_tokens is 'max_tokens'; it must be at most max_completion_tokens, 5"
    item = InvalidRequestError("stop[3]", "is", "stop[3]").named(names)
    assert (str(item), item.field, item.param) == (
        "stop_sequences[3] is 'stop[3]'",
        "stop_sequences[3]",
        "stop_sequences",
    )


@pytest.mark.parametrize(
    ("path", "told"),
    [("a.b[2]", "whole[2]"), ("a", "x"), ("a[1]", "x[1]"), ("a.bc", "x.bc"), ("ab", "ab"), ("b", "b")],
)
def test_path_when_names_are_given_then_its_longest_beginning_is_renamed(path: str, told: str) -> None:
    assert renamed_path(path, {"a": "x", "a.b": "whole"}) == told
