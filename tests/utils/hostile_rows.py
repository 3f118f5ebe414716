"""Bodies that a server has to survive, and what each of them gets."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, NamedTuple

import httpx

OK = 200
_MAX_MESSAGE_CHARACTERS = 1000


class Row(NamedTuple):
    """A body and what it gets: the status, and words that its message has."""

    path: str
    body: Any  # bytes are sent as they are
    status: int
    words: tuple[str, ...] = ()


def check_row(client: httpx.Client, row: Row, error_keys: Collection[str]) -> None:
    """Sends a row; fails unless its answer is normal, or an error object that says what is wrong and nothing of the machine."""
    content = row.body if isinstance(row.body, bytes) else json.dumps(row.body).encode()
    answer = client.post(row.path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == row.status, answer.text[:500]
    if row.status == OK:
        return
    error = answer.json()["error"]
    assert set(error) == set(error_keys)
    assert len(error["message"]) <= _MAX_MESSAGE_CHARACTERS
    for word in row.words:
        assert word in error["message"] or word == error.get("param"), error
    for private in ("Traceback", "/opt/", "/usr/", "0x7f", "site-packages"):
        assert private not in answer.text
