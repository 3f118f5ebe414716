"""From a request of the Responses API to the same request of chat completions: one core answers both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pellucid.server.chat.protocol import ChatCompletionRequest, Message
from pellucid.server.generate.protocol import RequestFields, as_invalid_request
from pellucid.server.responses.protocol import (
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionTool,
    Items,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
)

_Turns = list[dict[str, Any]]
_CHAT_FIELDS = ("parallel_tool_calls", "metadata", "chat_template_kwargs", "safety_identifier", "prompt_cache_key")


def shared_fields(request: RequestFields) -> dict[str, Any]:
    """What a request of another API has in common with one of chat completions."""
    given = {name: getattr(request, name) for name in RequestFields.model_fields if name != "stream_options"}
    return {name: value for name, value in given.items() if value is not None}


def as_chat(fields: dict[str, Any]) -> ChatCompletionRequest:
    """The request of chat completions with these fields; those that are None are left out.

    Raises:
        InvalidRequestError: naming the field as chat does.
    """
    try:
        return ChatCompletionRequest.model_validate({k: v for k, v in fields.items() if v is not None})
    except ValidationError as error:
        raise as_invalid_request(error) from None


def to_chat(request: ResponsesRequest, before: Sequence[Message] = ()) -> ChatCompletionRequest:
    """The same request of chat completions; `before` is the conversation that goes on."""
    instructions = [] if request.instructions is None else [{"role": "system", "content": request.instructions}]
    reasoning, choice = request.reasoning, request.tool_choice
    return as_chat(
        {
            **shared_fields(request),
            **{name: getattr(request, name) for name in _CHAT_FIELDS},
            "messages": [*instructions, *before, *messages_of(request.items)],
            "max_completion_tokens": request.max_output_tokens,
            "logprobs": request.wants_logprobs or None,
            "top_logprobs": request.top_logprobs,
            "tools": [_tool(tool) for tool in request.tools or ()] or None,
            "tool_choice": {"type": "function", "function": {"name": choice.name}}
            if choice is not None and not isinstance(choice, str)
            else choice,
            "response_format": _response_format(request),
            "reasoning_effort": None if reasoning is None else reasoning.effort,
        }
    )


def messages_of(items: Iterable[Any]) -> list[Message]:
    """Items as messages of a conversation."""
    turns: _Turns = []
    for item in items:
        _ADD[type(item)](turns, item)
    return [Message.model_validate(_complete(turn)) for turn in turns]


def answered(output: Sequence[dict[str, Any]]) -> list[Message]:
    """The items of an answer as messages.

    Raises:
        ValidationError: they could not be said in a request, such as a call of a function without a name.
    """
    return messages_of(_ITEMS.validate_python(output))


_ITEMS: TypeAdapter[list[Any]] = TypeAdapter(Items)


def _complete(turn: dict[str, Any]) -> dict[str, Any]:
    """Thoughts may stand alone; a message has a content or calls."""
    is_empty = turn["content"] is None and "tool_calls" not in turn
    return {**turn, "content": ""} if is_empty else turn


def _add_message(turns: _Turns, item: MessageItem) -> None:
    is_open = item.role == "assistant" and bool(turns) and turns[-1].get("content", "") is None
    turn = turns[-1] if is_open and "tool_calls" not in turns[-1] else _begun(turns, item.role)
    turn["content"] = _content(item.content)


def _add_call(turns: _Turns, item: FunctionCallItem) -> None:
    turn = turns[-1] if turns and turns[-1]["role"] == "assistant" else _begun(turns, "assistant")
    call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
    turn.setdefault("tool_calls", []).append(call)


def _add_output(turns: _Turns, item: FunctionCallOutputItem) -> None:
    turns.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})


def _add_reasoning(turns: _Turns, item: ReasoningItem) -> None:
    _begun(turns, "assistant")["reasoning_content"] = "\n".join(part.text for part in item.content or ())


def _begun(turns: _Turns, role: str) -> dict[str, Any]:
    turns.append({"role": role, "content": None})
    return turns[-1]


def _content(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part.refusal if part.type == "refusal" else part.text} for part in content]


_ADD: dict[type, Callable[[_Turns, Any], None]] = {
    MessageItem: _add_message,
    FunctionCallItem: _add_call,
    FunctionCallOutputItem: _add_output,
    ReasoningItem: _add_reasoning,
}


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _response_format(request: ResponsesRequest) -> dict[str, Any] | None:
    wanted = None if request.text is None else request.text.format
    if wanted is None or wanted.type != "json_schema":
        return None if wanted is None else {"type": wanted.type}
    schema = {"name": wanted.name or "schema", "schema": wanted.schema_, "strict": wanted.strict}
    return {"type": "json_schema", "json_schema": {k: v for k, v in schema.items() if v is not None}}
