"""The paths of the Responses API."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

from fastapi import Query
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from pellucid.errors import InvalidRequestError
from pellucid.server.chat.core import job_of, prepared, speak_of, without_oldest_turns
from pellucid.server.chat.preparing import Prepared
from pellucid.server.chat.protocol import Message
from pellucid.server.generate.context import ServerContext
from pellucid.server.generate.typed_stream import typed_events, whole_answer
from pellucid.server.http.sse import EventStream, JsonResponse
from pellucid.server.responses.answer import PREFIX, ResponseAnswer
from pellucid.server.responses.input import answered, messages_of, to_chat
from pellucid.server.responses.protocol import LOGPROBS, ResponsesRequest
from pellucid.server.responses.store import Owner, StoredResponse

MAX_LISTED = 100


class ResponsesEndpoints:
    """One method a path."""

    def __init__(self, context: ServerContext) -> None:
        self._context, self._store = context, context.responses

    async def create_response(self, http: Request) -> Response:
        """Answers a conversation with items: messages, thoughts and calls."""
        context = self._context
        request = await context.read(http, ResponsesRequest)
        owner = context.owner(http)
        before = self._before(owner, request)
        keep = self._keeper(owner, request, before) if self._store.wants(request.store) else None
        chat = to_chat(request, before)
        speak_of(http, chat, request.field_names)
        if request.truncation == "auto":
            chat = await without_oldest_turns(context, chat)
        made = await prepared(context, chat)
        _check_logprobs(request, made)
        job = job_of(context, http, chat, made)
        identity = context.identity(PREFIX, job.request_id, request.model)
        answer = ResponseAnswer(request, identity, made.params, made.style.reader(), context.logprobs, keep)
        generation = await context.submit(http, job)
        if request.stream:
            return EventStream(typed_events(generation, answer, context.prompts), generation)
        (output,) = await context.whole(http, generation)
        return JsonResponse(await whole_answer(output, answer, generation.usage, context.prompts))

    async def retrieve_response(self, http: Request, response_id: str, stream: bool = Query(False)) -> Response:
        """A response that was stored."""
        if stream:
            raise InvalidRequestError("stream", "is true", limit="a stored response is not streamed: it must be false")
        return JsonResponse(self._found(http, response_id).response)

    async def delete_response(self, http: Request, response_id: str) -> Response:
        """Forgets a response."""
        self._store.delete(self._context.owner(http), response_id)
        return JsonResponse({"id": response_id, "object": "response", "deleted": True})

    async def input_items(
        self,
        http: Request,
        response_id: str,
        after: str | None = Query(None, max_length=256),
        limit: int = Query(20, ge=1, le=MAX_LISTED),
        order: Literal["asc", "desc"] = Query("desc"),
    ) -> Response:
        """The items that a stored response answered."""
        items = list(self._found(http, response_id).input_items)
        items = items if order == "asc" else items[::-1]
        names = [item["id"] for item in items]
        if after is not None and after not in names:
            raise InvalidRequestError("after", f"is {after!r}", limit="the response has no such item")
        start = 0 if after is None else names.index(after) + 1
        page, rest = items[start : start + limit], items[start + limit :]
        ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
        return JsonResponse({"object": "list", "data": page, **ends, "has_more": bool(rest)})

    def _found(self, http: Request, response_id: str) -> StoredResponse:
        return self._store.find(self._context.owner(http), response_id)

    def _before(self, owner: Owner, request: ResponsesRequest) -> Sequence[Message]:
        """The conversation that goes on."""
        name = request.previous_response_id
        return () if name is None else self._store.previous(owner, name).messages

    def _keeper(
        self, owner: Owner, request: ResponsesRequest, before: Sequence[Message]
    ) -> Callable[[dict[str, Any]], None]:
        """What stores a response at its end."""

        def keep(response: dict[str, Any]) -> None:
            try:
                messages = [*before, *messages_of(request.items), *answered(response["output"])]
            except ValidationError:  # no conversation could go on from there
                messages = [*before, *messages_of(request.items)]
            self._store.put(owner, StoredResponse(response, _listed(request, response["id"]), messages))

        return keep


def _listed(request: ResponsesRequest, response_id: str) -> list[dict[str, Any]]:
    """The items of a request as they are listed: each has an id, its own or, where it has none or one that was there, one of ours."""
    items = [{"id": None, **item.model_dump(exclude_none=True)} for item in request.items]
    own, taken = {item["id"] for item in items}, set[str]()
    numbers = (f"in_{response_id}-{number}" for number in itertools.count())
    ours = (name for name in numbers if name not in own)
    for item in items:
        item["id"] = item["id"] if item["id"] and item["id"] not in taken else next(ours)
        taken.add(item["id"])
    return items


def _check_logprobs(request: ResponsesRequest, made: Prepared) -> None:
    """Tokens are those of all that the model writes; they are those of the text only where nothing else can be in it."""
    if request.wants_logprobs and not made.style.is_plain:
        raise InvalidRequestError(
            "include", f"has {LOGPROBS}, which is not available beside tools or from a model that reasons"
        )
