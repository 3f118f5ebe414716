"""The store of responses is bounded by number and by bytes."""

from __future__ import annotations

import pytest

from pellucid.errors import InvalidRequestError
from pellucid.server.chat.protocol import Message
from pellucid.server.http.errors import HttpError
from pellucid.server.responses.store import ResponseStore, StoredResponse


def _entry(name: str, text: str = "") -> StoredResponse:
    message = Message.model_validate({"role": "user", "content": text})
    return StoredResponse({"id": name}, [], [message])


def test_given_full_store_when_one_more_comes_then_the_one_not_used_the_longest_goes() -> None:
    store = ResponseStore(2, 1 << 20)
    for name in ("a", "b"):
        store.put(b"", _entry(name))
    store.find(b"", "a")
    store.put(b"", _entry("c"))
    assert len(store) == 2
    assert store.find(b"", "a").response == {"id": "a"}
    with pytest.raises(HttpError, match="'b'"):
        store.find(b"", "b")


def test_given_bytes_when_they_are_too_many_then_the_oldest_go_and_what_is_larger_than_all_is_not_kept() -> None:
    store = ResponseStore(100, 3000)
    for number in range(10):
        store.put(b"", _entry(str(number), "x" * 700))
        assert store.num_bytes <= 3000
    assert 2 <= len(store) <= 4
    assert store.find(b"", "9")
    store.put(b"", _entry("large", "x" * 5000))
    assert store.find(b"", "9")
    with pytest.raises(HttpError):
        store.find(b"", "large")


def test_given_all_when_deleted_or_replaced_then_no_bytes_are_left_over() -> None:
    store = ResponseStore(100, 1 << 20)
    store.put(b"", _entry("a", "long" * 100))
    store.put(b"", _entry("a"))
    small = store.num_bytes
    assert 0 < small < 300
    store.delete(b"", "a")
    assert (store.num_bytes, len(store)) == (0, 0)


def test_given_owners_when_names_are_the_same_then_each_has_its_own() -> None:
    store = ResponseStore(100, 1 << 20)
    store.put(b"one", _entry("a"))
    for look in (store.find, store.previous, store.delete):
        with pytest.raises(HttpError):
            look(b"two", "a")
    assert store.find(b"one", "a")


def test_given_store_that_is_off_when_asked_then_it_refuses_by_name() -> None:
    store = ResponseStore(0, 1 << 20)
    assert store.wants(None) is False
    store.put(b"", _entry("a"))
    assert len(store) == 0
    for ask, field in (
        (lambda: store.wants(True), "store"),
        (lambda: store.previous(b"", "a"), "previous_response_id"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            ask()
        assert caught.value.param == field
