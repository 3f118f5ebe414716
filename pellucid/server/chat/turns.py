"""What every chat-like API asks for: a conversation, its tools, and how it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pellucid.server.chat.protocol import ChatCompletionRequest, Message
from pellucid.server.chat.tools import NamedTool


@dataclass(frozen=True)
class ToolUse:
    """The tools in OpenAI's shape, and what the model may do with them."""

    definitions: Sequence[Mapping[str, Any]] = ()
    choice: Literal["auto", "none", "required"] = "auto"
    name: str | None = None  # with "required": this one
    parallel: bool = True  # False: one call at most

    @property
    def is_allowed(self) -> bool:
        """True when a tool may be called."""
        return bool(self.definitions) and self.choice != "none"


@dataclass(frozen=True)
class Turn:
    """A conversation and how it goes on. `speaks_of_text`: its structure is a format of the answer's text,
    which a forced call has not."""

    messages: Sequence[Message]
    tools: ToolUse = ToolUse()
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    shows_reasoning: bool = True
    speaks_of_text: bool = False


def turn_of(request: ChatCompletionRequest) -> Turn:
    """The turn that a request for chat asks for."""
    return Turn(
        request.messages,
        tools=tool_use_of(request),
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        add_special_tokens=request.add_special_tokens,
        template_kwargs=request.chat_template_kwargs or {},
        reasoning_effort=request.reasoning_effort,
        shows_reasoning=request.include_reasoning is not False,
        speaks_of_text=request.response_format is not None,
    )


def tool_use_of(request: ChatCompletionRequest) -> ToolUse:
    """What a request for chat says of tools."""
    choice = request.tool_choice
    definitions = [tool.to_template() for tool in request.tools or ()]
    parallel = request.parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        return ToolUse(definitions, "required", choice.function.name, parallel)
    return ToolUse(definitions, choice or "auto", None, parallel)
