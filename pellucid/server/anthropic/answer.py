"""/v1/messages: a model's text as blocks of Anthropic's Messages API, event by event or as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pellucid.api.outputs import EngineCoreOutput
from pellucid.server.anthropic.protocol import MessagesRequest
from pellucid.server.chat.parsing import OutputReader
from pellucid.server.generate.answers import Identity
from pellucid.server.generate.generation import Usage
from pellucid.server.http.errors import HttpError, anthropic_error
from pellucid.text.deltas import ContentDelta, ReasoningDelta, ToolCallDelta
from pellucid.text.json_mending import ObjectMender, mended_object

PREFIX = "msg"
Events = Iterator[dict[str, Any]]


class MessageAnswer:
    """One answer. Its blocks are made while deltas come in; `whole` has what came of them."""

    def __init__(self, request: MessagesRequest, identity: Identity, prompt_tokens: int, reader: OutputReader) -> None:
        self._request, self._identity, self._reader = request, identity, reader
        self._shows_thoughts = request.thinking is None or not (
            request.thinking.type == "disabled" or request.thinking.display == "omitted"
        )
        self._blocks: list[_Block] = []
        self._is_open = False  # the last block is
        self._end_of: EngineCoreOutput | None = None
        self._tail: dict[str, Any] = {
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Usage(prompt_tokens, 0), 0),
        }
        self.thoughts = ""

    def opening(self) -> Events:
        """The message without content, and a ping, as Anthropic sends one."""
        yield {"type": "message_start", "message": self.whole()}
        yield {"type": "ping"}

    def events(self, delta: EngineCoreOutput) -> Events:
        """What is new in the blocks."""
        if delta.finish_reason is not None:
            self._end_of = delta
        for part in self._reader.read(delta):
            yield from self._part(part)

    def closing(self, usage: Usage, thought_tokens: int) -> Events:
        """The end of the last block, why the message ended, and what it took."""
        yield from self._end()
        reason, sequence = self._stop_reason(usage)
        self._tail = {"stop_reason": reason, "stop_sequence": sequence, "usage": _usage(usage, thought_tokens)}
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        yield {"type": "message_delta", "delta": delta, "usage": self._tail["usage"]}
        yield {"type": "message_stop"}

    def failure(self, error: HttpError) -> Events:
        """Anthropic's error object."""
        yield anthropic_error(error, self._identity.request_id)

    def whole(self) -> dict[str, Any]:
        """The message as it stands."""
        return {
            "id": f"{PREFIX}_{self._identity.request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._identity.model,
            "content": [block.to_dict() for block in self._blocks],
            **self._tail,
            "request_id": self._identity.request_id,
        }

    def _stop_reason(self, usage: Usage) -> tuple[str, str | None]:
        end = self._end_of
        if end is not None and end.finish_reason != "stop":
            is_asked = end.finish_reason == "abort" or usage.completion_tokens >= self._request.max_tokens
            return "max_tokens" if is_asked else "model_context_window_exceeded", None
        if end is not None and isinstance(end.stop_reason, str):
            return "stop_sequence", end.stop_reason
        return "tool_use" if self._reader.has_calls(0) else "end_turn", None

    def _part(self, part: ContentDelta | ReasoningDelta | ToolCallDelta) -> Events:
        if isinstance(part, ReasoningDelta):
            self.thoughts += part.text
            if not self._shows_thoughts:
                return
        if isinstance(part, ToolCallDelta):
            if part.name is not None:
                yield from self._begin(_Block("tool_use", {"id": part.id, "name": part.name}))
            yield from self._add(part.arguments)
            return
        kind = "thinking" if isinstance(part, ReasoningDelta) else "text"
        if not self._is_open or self._blocks[-1].kind != kind:
            yield from self._begin(_Block(kind, {}))
        yield from self._add(part.text)

    def _begin(self, block: _Block) -> Events:
        yield from self._end()
        self._blocks.append(block)
        self._is_open = True
        yield {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block.to_dict()}

    def _add(self, text: str) -> Events:
        yield from self._told(self._blocks[-1].add(text))

    def _told(self, delta: dict[str, Any] | None) -> Events:
        if delta is not None:
            yield {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _end(self) -> Events:
        if self._is_open:
            yield from self._told(self._blocks[-1].end())
            self._is_open = False
            yield {"type": "content_block_stop", "index": len(self._blocks) - 1}


# Of each kind of block: (the delta's type, the delta's key).
_DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}


class _Block:
    """A piece of a message: text, thoughts or a call, whose arguments are an object: they are mended where they are not JSON."""

    def __init__(self, kind: str, head: dict[str, Any]) -> None:
        self.kind, self._head, self._text = kind, head, ""
        self._mender = ObjectMender() if kind == "tool_use" else None

    def add(self, text: str) -> dict[str, Any] | None:
        """The delta that says so, if there is something to say."""
        return self._delta(text if self._mender is None else self._mender.feed(text))

    def end(self) -> dict[str, Any] | None:
        """The last delta, if there is something left to say."""
        return None if self._mender is None else self._delta(self._mender.finish())

    def _delta(self, text: str) -> dict[str, Any] | None:
        self._text += text
        kind, key = _DELTAS[self.kind]
        return {"type": kind, key: text} if text else None

    def to_dict(self) -> dict[str, Any]:
        """The block as it stands; a call's input, once it has ended."""
        if self.kind == "tool_use":
            return {"type": self.kind, **self._head, "input": mended_object(self._text)}
        # Thoughts need no signature here: they are not read from a request but by the template.
        return {"type": self.kind, self.kind: self._text, **({"signature": ""} if self.kind == "thinking" else {})}


def _usage(usage: Usage, thought_tokens: int) -> dict[str, Any]:
    """Anthropic's usage object: `input_tokens` are those that were not in the cache."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": thought_tokens},
    }
