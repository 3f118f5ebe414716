"""/v1/responses: a model's text as items of OpenAI's Responses API, event by event or as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pellucid.api.outputs import EngineCoreOutput
from pellucid.api.sampling_params import SamplingParams
from pellucid.server.chat.parsing import OutputReader
from pellucid.server.generate.answers import Identity
from pellucid.server.generate.generation import Usage
from pellucid.server.generate.logprobs import LogprobFormat
from pellucid.server.http.errors import HttpError
from pellucid.server.responses.protocol import ResponsesRequest
from pellucid.text.deltas import ContentDelta, ReasoningDelta, ToolCallDelta

PREFIX = "resp"
Events = Iterator[dict[str, Any]]
# How an answer ends, by the engine's finish reason: (status, why it is incomplete, the event's name).
_ENDS = {
    "stop": ("completed", None, "response.completed"),
    "length": ("incomplete", {"reason": "max_output_tokens"}, "response.incomplete"),
    "abort": ("cancelled", None, "response.incomplete"),
}


class ResponseAnswer:
    """One answer. Its items are made while deltas come in; `whole` has what came of them.

    Args:
        keep: takes the response at its end, where it is stored.
    """

    def __init__(
        self,
        request: ResponsesRequest,
        identity: Identity,
        params: SamplingParams,
        reader: OutputReader,
        logprobs: LogprobFormat,
        keep: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._request, self._identity, self._reader, self._logprobs = request, identity, reader, logprobs
        self._top = request.top_logprobs or 0
        self._response, self._keep = _opened(request, identity, params, keep is not None), keep
        self._items: list[_TextItem | _CallItem] = []
        self._is_open = False  # the last item is
        self._number = 0
        self._finish_reason = "stop"

    @property
    def thoughts(self) -> str:
        """The reasoning so far."""
        return "".join(item.text for item in self._items if isinstance(item, _TextItem) and item.is_reasoning)

    def opening(self) -> Events:
        """The response as it stands before the first token."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.whole())

    def events(self, delta: EngineCoreOutput) -> Events:
        """What is new in the items."""
        parts = self._reader.read(delta)
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
        entries = [] if delta.logprobs is None else self._entries(delta)
        if entries and not parts:
            parts = [ContentDelta("")]
        for part in parts:
            yield from self._part(part, entries if isinstance(part, ContentDelta) else [])
            entries = [] if isinstance(part, ContentDelta) else entries

    def closing(self, usage: Usage, thought_tokens: int) -> Events:
        """The end of the last item, and the whole response."""
        status, details, kind = _ENDS[self._finish_reason]
        if not self._items:
            yield from self._begin(_TextItem(self._new_id("msg"), False))
        yield from self._end("completed" if status == "completed" else "incomplete")
        self._response.update(status=status, incomplete_details=details, usage=_usage(usage, thought_tokens))
        if self._keep is not None:
            self._keep(self.whole())
        yield self._event(kind, response=self.whole())

    def failure(self, error: HttpError) -> Events:
        """The response with the error."""
        self._response.update(status="failed", error={"code": "server_error", "message": error.message})
        yield self._event("response.failed", response=self.whole())

    def whole(self) -> dict[str, Any]:
        """The response as it stands."""
        return {**self._response, "output": [item.to_dict() for item in self._items]}

    def _entries(self, delta: EngineCoreOutput) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._logprobs.chat(delta.token_ids, delta.logprobs or (), self._top)["content"]
        return found

    def _part(self, part: ContentDelta | ReasoningDelta | ToolCallDelta, entries: list[dict[str, Any]]) -> Events:
        if isinstance(part, ToolCallDelta):
            if part.name is not None:
                call = _CallItem(self._new_id("fc"), part.id or self._new_id("call"), part.name)
                yield from self._begin(call)
            yield from self._add(part.arguments, [])
            return
        is_reasoning, last = isinstance(part, ReasoningDelta), self._items[-1] if self._is_open else None
        if not isinstance(last, _TextItem) or last.is_reasoning != is_reasoning:
            yield from self._begin(_TextItem(self._new_id("rs" if is_reasoning else "msg"), is_reasoning))
        yield from self._add(part.text, entries)

    def _begin(self, item: _TextItem | _CallItem) -> Events:
        yield from self._end("completed")
        self._items.append(item)
        self._is_open = True
        yield from self._of_item(item.opening())

    def _add(self, text: str, entries: list[dict[str, Any]]) -> Events:
        if text or entries:
            yield from self._of_item(self._items[-1].add(text, entries))

    def _end(self, status: str) -> Events:
        if self._is_open:
            self._is_open = False
            yield from self._of_item(self._items[-1].closing(status))

    def _of_item(self, events: Events) -> Events:
        for one in events:
            yield self._event(one.pop("type"), output_index=len(self._items) - 1, **one)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _new_id(self, prefix: str) -> str:
        return f"{prefix}_{self._identity.request_id}-{len(self._items)}"


class _TextItem:
    """A message or a reasoning item: both have one part, which is text."""

    def __init__(self, item_id: str, is_reasoning: bool) -> None:
        self._id, self.is_reasoning, self.text = item_id, is_reasoning, ""
        self._logprobs: list[dict[str, Any]] = []
        self._status = "in_progress"
        self._has_part = False
        self._kind = "response.reasoning_text" if is_reasoning else "response.output_text"

    def opening(self) -> Events:
        yield {"type": "response.output_item.added", "item": self.to_dict()}
        self._has_part = True
        yield {"type": "response.content_part.added", **self._where(), "part": self._part()}

    def add(self, text: str, entries: list[dict[str, Any]]) -> Events:
        self.text += text
        self._logprobs += entries
        yield {"type": f"{self._kind}.delta", **self._where(), "delta": text, **self._with_logprobs(entries)}

    def closing(self, status: str) -> Events:
        self._status = status
        yield {"type": f"{self._kind}.done", **self._where(), "text": self.text, **self._with_logprobs(self._logprobs)}
        yield {"type": "response.content_part.done", **self._where(), "part": self._part()}
        yield {"type": "response.output_item.done", "item": self.to_dict()}

    def to_dict(self) -> dict[str, Any]:
        content = [self._part()] if self._has_part else []
        if self.is_reasoning:
            own: dict[str, Any] = {"type": "reasoning", "summary": []}
        else:
            own = {"type": "message", "role": "assistant"}
        return {"id": self._id, **own, "status": self._status, "content": content}

    def _where(self) -> dict[str, Any]:
        return {"item_id": self._id, "content_index": 0}

    def _part(self) -> dict[str, Any]:
        if self.is_reasoning:
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self._logprobs)}

    def _with_logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        return {} if self.is_reasoning else {"logprobs": list(entries)}


class _CallItem:
    """A function call."""

    def __init__(self, item_id: str, call_id: str, name: str) -> None:
        self._id, self._call_id, self._name, self._arguments = item_id, call_id, name, ""
        self._status = "in_progress"

    def opening(self) -> Events:
        yield {"type": "response.output_item.added", "item": self.to_dict()}

    def add(self, text: str, entries: list[dict[str, Any]]) -> Events:
        self._arguments += text
        yield {"type": "response.function_call_arguments.delta", "item_id": self._id, "delta": text}

    def closing(self, status: str) -> Events:
        self._status = status
        told = {"item_id": self._id, "name": self._name, "arguments": self._arguments}
        yield {"type": "response.function_call_arguments.done", **told}
        yield {"type": "response.output_item.done", "item": self.to_dict()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "function_call",
            "status": self._status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": self._arguments,
        }


def _opened(request: ResponsesRequest, identity: Identity, params: SamplingParams, stored: bool) -> dict[str, Any]:
    """A response before anything was made. What was asked for comes back."""
    choice, text, reasoning = request.tool_choice, request.text, request.reasoning
    return {
        "id": f"{PREFIX}_{identity.request_id}",
        "object": "response",
        "created_at": identity.created,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": identity.model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": None if reasoning is None else reasoning.effort, "summary": None},
        "service_tier": "default",
        "store": stored,
        "temperature": params.temperature,
        "text": {"format": {"type": "text"}}
        if text is None or text.format is None
        else {"format": text.format.model_dump(exclude_none=True, by_alias=True)},
        "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [{"strict": None, "parameters": None, **tool.model_dump()} for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": request.truncation or "disabled",
        "usage": None,
        "user": request.user,
        "background": False,
        "system_fingerprint": identity.fingerprint,
        "request_id": identity.request_id,
    }


def _usage(usage: Usage, thought_tokens: int) -> dict[str, Any]:
    """OpenAI's usage object. Nothing is written to the cache at a caller's wish: whole blocks always are."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": thought_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
