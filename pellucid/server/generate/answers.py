"""What the answers of chat and completions share: identity, finish reasons, and the course of a stream."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from pellucid.api.outputs import EngineCoreOutput, FinishReason
from pellucid.server.generate.generation import Generation, Usage
from pellucid.server.generate.prompts import Prompts
from pellucid.server.generate.protocol import RequestFields
from pellucid.server.http.errors import HttpError, as_http_error, internal_error
from pellucid.server.http.sse import DONE, event

logger = logging.getLogger("pellucid.server")

# OpenAI's reasons are a closed set. An aborted answer was cut short, so it says "length", and `stop_reason` tells the truth;
# an error is never a finish reason: it is an error object.
_FINISH_REASONS: dict[FinishReason, str] = {"stop": "stop", "length": "length", "abort": "length"}


def finish_fields(
    reason: FinishReason | None, stop_reason: int | str | None, *, has_calls: bool = False
) -> dict[str, Any]:
    """`finish_reason` and `stop_reason` of a choice; one that was cut short says so also when it has calls."""
    if reason is None:
        return {"finish_reason": None, "stop_reason": None}
    return {
        "finish_reason": "tool_calls" if has_calls and reason == "stop" else _FINISH_REASONS.get(reason, "stop"),
        "stop_reason": "abort" if reason == "abort" else stop_reason,
    }


@dataclass(frozen=True)
class Identity:
    """What every object of one answer carries."""

    prefix: str  # of the id: chatcmpl, cmpl
    request_id: str
    model: str
    created: int
    fingerprint: str

    def head(self, kind: str) -> dict[str, Any]:
        """The first keys of an object of this kind."""
        return {
            "id": f"{self.prefix}-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "request_id": self.request_id,
        }


class Answer(Protocol):
    """How one API spells a stream."""

    def opening(self) -> Iterable[dict[str, Any]]:
        """Chunks before the first token."""

    def chunks(self, delta: EngineCoreOutput) -> Iterable[dict[str, Any]]:
        """Chunks of a delta; none when it has nothing to show."""

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last chunk, when it was asked for."""


async def stream_events(
    generation: Generation, answer: Answer, request: RequestFields, prompts: Prompts
) -> AsyncGenerator[bytes, None]:
    """The encoded events of a stream, to [DONE]. An error becomes an event. Its caller closes the generation."""
    options = request.stream_options
    usage = options is not None and bool(options.include_usage)
    running_usage = options is not None and bool(options.continuous_usage_stats)
    has_usage = usage or running_usage
    try:
        yield b"".join([event(chunk) for chunk in answer.opening()])
        async for delta in generation.deltas():
            usage_field = {"usage": generation.usage.to_dict() if running_usage else None} if has_usage else {}
            if delta.has_states:
                yield await prompts.run(_events, answer, delta, usage_field)
            else:
                for chunk in answer.chunks(delta):
                    yield event(chunk | usage_field)
        if usage:
            yield event(answer.usage_chunk(generation.usage))
    except Exception as error:
        yield event(told(error, generation.job.request_id).to_dict())
    yield DONE


def _events(answer: Answer, delta: EngineCoreOutput, usage_field: dict[str, Any]) -> bytes:
    return b"".join([event(chunk | usage_field) for chunk in answer.chunks(delta)])


def told(error: Exception, request_id: str) -> HttpError:
    """What the reader of a stream is told of an error; a bug is logged."""
    known = as_http_error(error)
    if known is None:
        logger.error("request %s failed", request_id, exc_info=error)
    return known or internal_error(request_id)
