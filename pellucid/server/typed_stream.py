"""Streams of events that have a type: those of the Responses and the Messages API. What both make of a model's text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import Any, Protocol

from pellucid.outputs import RequestOutput
from pellucid.server.answers import told
from pellucid.server.errors import HttpError
from pellucid.server.generation import Delta, Generation, Usage
from pellucid.server.sse import event

Events = Iterable[dict[str, Any]]


class TypedAnswer(Protocol):
    """How one API spells an answer: the events of a stream, which at its end has made the whole too."""

    @property
    def thoughts(self) -> str:
        """The reasoning so far."""

    def opening(self) -> Events:
        """Events before the first token."""

    def events(self, delta: Delta) -> Events:
        """Events of a delta."""

    def closing(self, usage: Usage, thought_tokens: int) -> Events:
        """Events behind the last delta. `thought_tokens` are those of `thoughts`."""

    def failure(self, error: HttpError) -> Events:
        """Events of an error in a stream that has begun."""

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed, behind `closing`."""


TokenCount = Callable[[str], Awaitable[int]]


async def typed_events(generation: Generation, answer: TypedAnswer, count: TokenCount) -> AsyncGenerator[bytes, None]:
    """The encoded events of a stream. An error becomes an event. Its caller closes the generation."""
    try:
        yield encoded(answer.opening())
        async for delta in generation.deltas():
            events = encoded(answer.events(delta))
            if events:
                yield events
        yield encoded(answer.closing(generation.usage, await count(answer.thoughts)))
    except Exception as error:
        yield encoded(answer.failure(told(error, generation.job.request_id)))


async def whole_answer(output: RequestOutput, answer: TypedAnswer, usage: Usage, count: TokenCount) -> dict[str, Any]:
    """The answer that is not streamed: what its stream would come to."""
    choice = output.outputs[0]
    all_of_it = Delta(0, choice.text, list(choice.token_ids), choice.logprobs, choice.finish_reason, choice.stop_reason)
    for _ in (*answer.opening(), *answer.events(all_of_it)):
        pass
    for _ in answer.closing(usage, await count(answer.thoughts)):
        pass
    return answer.whole()


def encoded(events: Events) -> bytes:
    """Events as they are sent: each with its type as its name."""
    return b"".join(b"event: " + one["type"].encode() + b"\n" + event(one) for one in events)
