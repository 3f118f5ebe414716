"""Responses that are kept in memory: for GET, and for conversations that go on. Bounded by number and by bytes; the ones that
were not asked for the longest go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pellucid.errors import InvalidRequestError
from pellucid.json_text import encode
from pellucid.server.chat.protocol import Message
from pellucid.server.http.errors import HttpError

# Whose a response is: the key that made it. Nobody else gets to see it.
Owner = bytes


@dataclass(frozen=True)
class StoredResponse:
    """A response, the items that it answered, and the conversation with its output, without instructions."""

    response: dict[str, Any]
    input_items: Sequence[dict[str, Any]]
    messages: Sequence[Message]

    @property
    def num_bytes(self) -> int:
        """About what it takes: the length of its JSON."""
        texts = [message.model_dump_json() for message in self.messages]
        return len(encode([self.response, self.input_items])) + sum(map(len, texts))


class ResponseStore:
    """At most `max_responses` of at most `max_bytes` together. 0 responses: nothing is stored."""

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._entries: OrderedDict[tuple[Owner, str], tuple[StoredResponse, int]] = OrderedDict()
        self.num_bytes = 0

    @property
    def is_on(self) -> bool:
        """True when responses are stored."""
        return self._max_responses > 0

    def __len__(self) -> int:
        return len(self._entries)

    def wants(self, store: bool | None) -> bool:
        """Whether a response is stored: by default where there is a store.

        Raises:
            InvalidRequestError: it is asked for and there is none.
        """
        if store and not self.is_on:
            raise InvalidRequestError("store", "is true", limit="this server stores no responses: it must be false")
        return self.is_on and store is not False

    def put(self, owner: Owner, entry: StoredResponse) -> None:
        """Keeps a response, and drops others for it. One that is larger than the whole store is not kept."""
        size = entry.num_bytes
        if size > self._max_bytes or not self.is_on:
            return
        name = (owner, str(entry.response["id"]))
        self._drop(name)
        self._entries[name] = (entry, size)
        self.num_bytes += size
        while len(self._entries) > self._max_responses or self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def find(self, owner: Owner, response_id: str) -> StoredResponse:
        """The response of this name that this owner has. Raises HttpError 404."""
        found = self._get(owner, response_id)
        if found is None:
            raise HttpError(404, _unknown(response_id), param="response_id", code="response_not_found")
        return found

    def previous(self, owner: Owner, response_id: str) -> StoredResponse:
        """As `find`, for a conversation that goes on. Raises HttpError 400, InvalidRequestError where there is no store."""
        name = "previous_response_id"
        if not self.is_on:
            raise InvalidRequestError(name, "is", response_id, "this server stores no responses")
        found = self._get(owner, response_id)
        if found is None:
            raise HttpError(400, f"{name}: {_unknown(response_id)}", param=name, code="previous_response_not_found")
        return found

    def delete(self, owner: Owner, response_id: str) -> None:
        """Forgets a response. Raises HttpError 404."""
        self.find(owner, response_id)
        self._drop((owner, response_id))

    def _get(self, owner: Owner, response_id: str) -> StoredResponse | None:
        found = self._entries.get((owner, response_id))
        if found is None:
            return None
        self._entries.move_to_end((owner, response_id))
        return found[0]

    def _drop(self, name: tuple[Owner, str]) -> None:
        _, size = self._entries.pop(name, (None, 0))
        self.num_bytes -= size


def _unknown(response_id: str) -> str:
    return f"response {response_id[:128]!r} is not stored here: it never was, or it had to make room"
