"""Streams of events that have a type: those of the Responses and the Messages API. What both make of a model's text."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Iterable
from typing import Any, Protocol

from pellucid.api.outputs import CompletionOutput, EngineCoreOutput, RequestOutput
from pellucid.server.chat.parsing import PIECE
from pellucid.server.generate.answers import told
from pellucid.server.generate.generation import Generation, Usage
from pellucid.server.generate.prompts import Prompts
from pellucid.server.http.errors import HttpError
from pellucid.server.http.sse import event

Events = Iterable[dict[str, Any]]


class TypedAnswer(Protocol):
    """How one API spells an answer: the events of a stream, which at its end has made the whole too."""

    @property
    def thoughts(self) -> str:
        """The reasoning so far."""

    def opening(self) -> Events:
        """Events before the first token."""

    def events(self, delta: EngineCoreOutput) -> Events:
        """Events of a delta."""

    def closing(self, usage: Usage, thought_tokens: int) -> Events:
        """Events behind the last delta. `thought_tokens` are those of `thoughts`."""

    def failure(self, error: HttpError) -> Events:
        """Events of an error in a stream that has begun."""

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed, behind `closing`."""


async def typed_events(generation: Generation, answer: TypedAnswer, prompts: Prompts) -> AsyncGenerator[bytes, None]:
    """The encoded events of a stream. An error becomes an event. Its caller closes the generation."""
    try:
        yield encoded(answer.opening())
        async for delta in generation.deltas():
            events = encoded(answer.events(delta))
            if events:
                yield events
        yield encoded(await _closing(answer, generation.usage, prompts))
    except Exception as error:
        yield encoded(answer.failure(told(error, generation.job.request_id)))


async def whole_answer(output: RequestOutput, answer: TypedAnswer, usage: Usage, prompts: Prompts) -> dict[str, Any]:
    """The answer that is not streamed: what its stream would come to. Long texts are read by another thread."""
    choice = output.outputs[0]
    await prompts.run(lambda: deque(_all_events(answer, choice), maxlen=0))
    await _closing(answer, usage, prompts)
    return {**answer.whole(), "seed": choice.seed}


async def _closing(answer: TypedAnswer, usage: Usage, prompts: Prompts) -> list[dict[str, Any]]:
    """The last events. The tokens of thoughts are counted on their text, so that it does not matter how it came."""
    thought_tokens = min(await prompts.count(answer.thoughts), usage.completion_tokens)
    return list(answer.closing(usage, thought_tokens))


def _all_events(answer: TypedAnswer, choice: CompletionOutput) -> Events:
    yield from answer.opening()
    last = max(0, len(choice.text) - 1) // PIECE * PIECE
    for start in range(0, last, PIECE):
        yield from answer.events(EngineCoreOutput("", 0, choice.text[start : start + PIECE]))
    rest = choice.text[last:], choice.token_ids, choice.logprobs
    yield from answer.events(EngineCoreOutput("", 0, *rest, choice.finish_reason, choice.stop_reason))


def encoded(events: Events) -> bytes:
    """Events as they are sent: each with its type as its name."""
    return b"".join(b"event: " + one["type"].encode() + b"\n" + event(one) for one in events)
