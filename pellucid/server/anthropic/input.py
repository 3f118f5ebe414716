"""From a request of the Messages API to the same request of chat completions: one core answers both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from pellucid.errors import InvalidRequestError
from pellucid.server.anthropic.protocol import (
    Conversation,
    CountTokensRequest,
    CustomTool,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from pellucid.server.chat.protocol import ChatCompletionRequest
from pellucid.server.responses.input import as_chat, shared_fields

_CHOICES: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
_EFFORTS = {"max": "xhigh"}


def to_chat(request: MessagesRequest) -> ChatCompletionRequest:
    """The same request of chat completions.

    Raises:
        InvalidRequestError: naming the field.
    """
    own = {"stop": request.stop_sequences, "max_completion_tokens": request.max_tokens}
    return as_chat({**shared_fields(request), **_conversation(request), **own})


def prompt_of(request: CountTokensRequest) -> ChatCompletionRequest:
    """A request of chat completions with the same prompt."""
    return as_chat({"model": request.model, **_conversation(request)})


def _conversation(request: Conversation) -> dict[str, Any]:
    """The fields that make the prompt, as chat has them."""
    system = [] if request.system is None else [{"role": "system", "content": _text(request.system)}]
    thinking, config, choice = request.thinking, request.output_config, request.tool_choice
    variables = {} if thinking is None else {"enable_thinking": thinking.type != "disabled"}
    effort = None if config is None else config.effort
    return {
        "messages": [*system, *(message for turn in request.messages for message in _messages(turn))],
        "continue_final_message": _is_left_open(request.messages) or None,
        "tools": [_tool(tool) for tool in request.tools or ()] or None,
        "tool_choice": None if choice is None else _tool_choice(choice.type, choice.name),
        "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
        "response_format": None if config is None or config.format is None else _response_format(config.format.schema_),
        "reasoning_effort": None if effort is None else _EFFORTS.get(effort, effort),
        "chat_template_kwargs": {**variables, **(request.chat_template_kwargs or {})} or None,
    }


def _is_left_open(messages: Sequence[Turn]) -> bool:
    """True when the answer goes on with the assistant's text."""
    last, where = messages[-1], f"messages[{len(messages) - 1}].content"
    if last.role != "assistant":
        return False
    blocks = [] if isinstance(last.content, str) else last.content
    texts = [last.content] if isinstance(last.content, str) else [getattr(block, "text", "") for block in blocks]
    if not "".join(texts).strip() or not all(isinstance(block, TextBlock) for block in blocks):
        raise InvalidRequestError(
            "messages", ("the last of messages is the assistant's",), limit="it must have text, and nothing else"
        )
    if texts[-1] != texts[-1].rstrip():
        place = where if isinstance(last.content, str) else f"{where}[{len(texts) - 1}].text"
        raise InvalidRequestError(
            "messages", (f"{place}: final assistant content cannot end with trailing whitespace",)
        )
    return True


def _messages(turn: Turn) -> list[dict[str, Any]]:
    """A turn as chat's messages: results of tools are messages of their own."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    strange = _NOT_OF[turn.role]
    for block in turn.content:
        if isinstance(block, strange):
            raise InvalidRequestError("messages", (f"a block of type {block.type!r} cannot be the {turn.role}'s",))
    return [_assistant(turn.content)] if turn.role == "assistant" else _user(turn.content)


_NOT_OF: dict[str, tuple[type, ...]] = {"user": (ThinkingBlock, ToolUseBlock), "assistant": (ToolResultBlock,)}


def _assistant(blocks: Iterable[Any]) -> dict[str, Any]:
    blocks = list(blocks)
    texts = [{"type": "text", "text": block.text} for block in blocks if isinstance(block, TextBlock)]
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    message: dict[str, Any] = {"role": "assistant", "content": texts or (None if calls else "")}
    if calls:
        message["tool_calls"] = calls
    return {**message, "reasoning_content": "\n".join(thoughts)} if thoughts else message


def _user(blocks: Iterable[Any]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            made.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)})
        elif made and made[-1]["role"] == "user":
            made[-1]["content"].append({"type": "text", "text": block.text})
        else:
            made.append({"role": "user", "content": [{"type": "text", "text": block.text}]})
    return made or [{"role": "user", "content": ""}]


def _result(block: ToolResultBlock) -> str:
    content = block.content or ""
    text = content if isinstance(content, str) else "\n".join(one.text for one in content)
    return "Error: " + text if block.is_error else text


def _text(content: str | Iterable[TextBlock]) -> Any:
    return content if isinstance(content, str) else [{"type": "text", "text": block.text} for block in content]


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _tool(tool: CustomTool) -> dict[str, Any]:
    given = {"description": tool.description, "parameters": tool.input_schema, "strict": tool.strict}
    return {"type": "function", "function": {"name": tool.name, **{k: v for k, v in given.items() if v is not None}}}


def _tool_choice(kind: str, name: str | None) -> Any:
    return _CHOICES.get(kind, {"type": "function", "function": {"name": name}})


def _response_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "schema", "schema": schema}}
