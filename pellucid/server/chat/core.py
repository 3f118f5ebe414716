"""What the APIs that speak of conversations share: a request of chat completions, prepared and submitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from starlette.requests import Request

from pellucid.errors import renamed_path
from pellucid.server.chat.preparing import Prepared
from pellucid.server.chat.protocol import ChatCompletionRequest, Message
from pellucid.server.chat.turns import turn_of
from pellucid.server.generate.context import ServerContext
from pellucid.server.generate.job import Job


def speak_of(http: Request, chat: ChatCompletionRequest, names: Mapping[str, str]) -> None:
    """From here on errors are told under a client's names of fields: `names` has those of a request for chat."""
    own = {inside: renamed_path(name, names) for inside, name in chat.field_names.items()}
    http.state.field_names = {**names, **own}


async def prepared(context: ServerContext, chat: ChatCompletionRequest) -> Prepared:
    """The prompt of a request, its parameters, and how its outputs are read.

    Raises:
        InvalidRequestError: naming field, value and limit.
    """
    return await context.preparer.prepare(turn_of(chat), context.sampling_params(chat))


def job_of(context: ServerContext, http: Request, chat: ChatCompletionRequest, made: Prepared) -> Job:
    """What is generated for a request. Raises as `ServerContext.job`."""
    return context.job(http, chat, [made.prompt_token_ids], made.params, made.calls)


async def without_oldest_turns(context: ServerContext, chat: ChatCompletionRequest) -> ChatCompletionRequest:
    """The same request with as many of the oldest turns left out as its prompt is too long by.

    System messages at the beginning stay, and what is left begins with a user's message: a call is never parted from its output.
    Room is left for `max_completion_tokens`, but never more than half of the model's length.
    """
    length = context.engine.model.max_model_len
    room = min(_wanted_tokens(chat), length // 2)
    candidates = [chat.model_copy(update={"messages": kept}) for kept in _shorter(chat.messages)]
    low, high = 0, len(candidates) - 1
    while low < high:  # the first that fits; the last one is taken in any case, and refused if it must
        middle = (low + high) // 2
        ids = await context.preparer.encode(turn_of(candidates[middle]))
        low, high = (low, middle) if len(ids) + room <= length else (middle + 1, high)
    return candidates[low]


def _wanted_tokens(chat: ChatCompletionRequest) -> int:
    wanted = chat.max_completion_tokens
    return wanted if type(wanted) is int and wanted > 0 else 1


def _shorter(messages: Sequence[Message]) -> list[list[Message]]:
    """The conversation, and with each of the user's messages after the first as its beginning."""
    head = next((n for n, one in enumerate(messages) if one.role not in ("system", "developer")), len(messages))
    starts = [n for n in range(head + 1, len(messages)) if messages[n].role == "user"]
    return [list(messages), *([*messages[:head], *messages[n:]] for n in starts)]
