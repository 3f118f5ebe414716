"""The paths of the Messages API."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from pellucid.errors import InvalidRequestError
from pellucid.server.anthropic.answer import PREFIX, MessageAnswer
from pellucid.server.anthropic.input import prompt_of, to_chat
from pellucid.server.anthropic.protocol import CountTokensRequest, MessagesRequest
from pellucid.server.chat.core import job_of, prepared, speak_of
from pellucid.server.chat.preparing import Prepared
from pellucid.server.generate.context import ServerContext
from pellucid.server.generate.typed_stream import typed_events, whole_answer
from pellucid.server.http.sse import EventStream, JsonResponse


class MessagesEndpoints:
    """One method a path."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def create_message(self, http: Request) -> Response:
        """Answers a conversation with blocks: text, thoughts and calls."""
        context = self._context
        request = await context.read(http, MessagesRequest)
        chat = to_chat(request)
        speak_of(http, chat, request.field_names)
        made = await prepared(context, chat)
        _check_thinking(request, made)
        job = job_of(context, http, chat, made)
        identity = context.identity(PREFIX, job.request_id, request.model)
        answer = MessageAnswer(request, identity, len(made.prompt_token_ids), made.style.reader())
        generation = await context.submit(http, job)
        if request.stream:
            return EventStream(typed_events(generation, answer, context.prompts), generation)
        (output,) = await context.whole(http, generation)
        return JsonResponse(await whole_answer(output, answer, generation.usage, context.prompts))

    async def count_tokens(self, http: Request) -> Response:
        """How many tokens a message's prompt has."""
        request = await self._context.read(http, CountTokensRequest)
        chat = prompt_of(request)
        speak_of(http, chat, request.field_names)
        made = await prepared(self._context, chat)
        return JsonResponse({"input_tokens": len(made.prompt_token_ids)})


def _check_thinking(request: MessagesRequest, made: Prepared) -> None:
    if request.thinking is not None and request.thinking.type == "enabled" and made.style.reasoning is None:
        raise InvalidRequestError("thinking.type", "is 'enabled'", limit="the model does not reason")
