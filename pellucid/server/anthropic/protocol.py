"""The requests of /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag, model_validator

from pellucid.api.sampling_params import MAX_TOKEN_COUNT
from pellucid.errors import InvalidRequestError
from pellucid.server.chat.protocol import MAX_MESSAGES, MAX_PARTS
from pellucid.server.chat.tools import MAX_TOOLS
from pellucid.server.generate.protocol import (
    MAX_NAME_CHARACTERS,
    NO_HIDDEN_STATES,
    RequestFields,
    Strict,
    by_kind,
    by_type,
)

MAX_ID_CHARACTERS = 256
Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARACTERS)]


# What chat calls a field that a message's request knows under another name.
NAMES: Mapping[str, str] = {
    "stop": "stop_sequences",
    "max_completion_tokens": "max_tokens",
    "response_format.json_schema.schema": "output_config.format.schema",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
}


class CacheControl(Strict):
    """Where a prefix ends that should be cached. Whole blocks of every prompt are: it changes nothing."""

    type: Literal["ephemeral"] = Field(description="Only ephemeral.")
    ttl: Literal["5m", "1h"] | None = Field(None, description="It changes nothing: blocks stay until they are reused.")


_CACHE = "It changes nothing: whole blocks of a prompt are always cached."


class TextBlock(Strict):
    """A piece of text."""

    type: Literal["text"] = Field(description="What it is.")
    text: str = Field(description="The text.")
    cache_control: CacheControl | None = Field(None, description=_CACHE)
    citations: list[Any] | None = Field(None, max_length=0, description="Only null or empty.")


class ThinkingBlock(Strict):
    """Thoughts of an assistant's turn, for templates that show them."""

    type: Literal["thinking"] = Field(description="What it is.")
    thinking: str = Field(description="The thoughts.")
    signature: str | None = Field(None, description="As answered; not read.")


class ToolUseBlock(Strict):
    """A call that the model made."""

    type: Literal["tool_use"] = Field(description="What it is.")
    id: Id = Field(description="Ties the result to the call.")
    name: Id = Field(description="The tool.")
    input: dict[str, Any] = Field(description="Its arguments.")
    cache_control: CacheControl | None = Field(None, description=_CACHE)


_TextBlocks = Annotated[
    list[Annotated[Annotated[TextBlock, Tag("@text")], by_type(("text",))]], Field(max_length=MAX_PARTS)
]
TextContent = Annotated[
    Annotated[str, Tag("@text")] | Annotated[_TextBlocks, Tag("@list")],
    by_kind("it must be a text or a list of text blocks"),
]


class ToolResultBlock(Strict):
    """What a tool has returned."""

    type: Literal["tool_result"] = Field(description="What it is.")
    tool_use_id: Id = Field(description="The call.")
    content: TextContent | None = Field(None, description="Text, or blocks of type text.")
    is_error: bool | None = Field(None, description="The tool failed: the model reads `Error: ` before the content.")
    cache_control: CacheControl | None = Field(None, description=_CACHE)


BLOCKS: dict[str, type[Strict]] = {
    "text": TextBlock,
    "thinking": ThinkingBlock,
    "tool_use": ToolUseBlock,
    "tool_result": ToolResultBlock,
}
Block = Annotated[
    Annotated[TextBlock, Tag("@text")]
    | Annotated[ThinkingBlock, Tag("@thinking")]
    | Annotated[ToolUseBlock, Tag("@tool_use")]
    | Annotated[ToolResultBlock, Tag("@tool_result")],
    by_type(tuple(BLOCKS)),
]
_Blocks = Annotated[list[Block], Field(max_length=MAX_PARTS)]
BlockContent = Annotated[
    Annotated[str, Tag("@text")] | Annotated[_Blocks, Tag("@list")],
    by_kind("it must be a text or a list of blocks"),
]


class Turn(Strict):
    """A turn of a conversation. Text and tool results are the user's, text, thoughts and calls the assistant's."""

    role: Literal["user", "assistant"] = Field(description="Whose turn it is.")
    content: BlockContent = Field(description="Text, or blocks of type text, thinking, tool_use and tool_result.")


class CustomTool(Strict):
    """A tool that the client has."""

    type: Literal["custom"] | None = Field(None, description="Only custom: there are no tools on the server.")
    name: str = Field(min_length=1, max_length=64, description="Its name.")
    description: str | None = Field(None, description="What it does, for the model.")
    input_schema: dict[str, Any] = Field(description="JSON schema of its arguments.")
    strict: bool | None = Field(None, description="As for chat.")
    cache_control: CacheControl | None = Field(None, description=_CACHE)


class ToolChoice(Strict):
    """Which tool is used."""

    type: Literal["auto", "any", "tool", "none"] = Field(description="auto: as the model likes; any: one at least.")
    name: str | None = Field(None, min_length=1, max_length=64, description="The tool, for type tool.")
    disable_parallel_tool_use: bool | None = Field(None, description="At most one call.")

    @model_validator(mode="after")
    def _check_name(self) -> ToolChoice:
        if (self.name is not None) != (self.type == "tool"):
            raise InvalidRequestError(
                "tool_choice", f"is of type {self.type!r}", limit="tool needs a name, and no other type has one"
            )
        return self


class Thinking(Strict):
    """Whether the model thinks."""

    type: Literal["enabled", "disabled", "adaptive"] = Field(
        description="Sets enable_thinking for templates that have it; with disabled, thoughts are not shown either."
    )
    budget_tokens: int | None = Field(
        None, ge=1024, description="A target of the model's own; the limit is max_tokens, which must be greater."
    )
    display: Literal["summarized", "omitted"] | None = Field(
        None, description="omitted leaves thoughts out of the answer; they are never summarised."
    )


class OutputFormat(Strict):
    """What the text must be."""

    type: Literal["json_schema"] = Field(description="Only json_schema.")
    schema_: dict[str, Any] = Field(alias="schema", description="The JSON schema.")


class OutputConfig(Strict):
    """What the answer is like."""

    format: OutputFormat | None = Field(None, description="What the text must be; any text by default.")
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="As reasoning_effort of chat; max is xhigh."
    )


class MessageMetadata(Strict):
    """Labels of a request."""

    user_id: str | None = Field(None, max_length=512, description="The caller's own label; it changes nothing.")


class Conversation(Strict):
    """What makes the prompt."""

    messages: list[Turn] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="The turns. A last one of the assistant's, of text alone, is left open and goes on; it must not end with "
        "whitespace.",
    )
    system: TextContent | None = Field(None, description="A system message before all.")
    tools: list[CustomTool] | None = Field(None, max_length=MAX_TOOLS, description="Tools that may be used.")
    tool_choice: ToolChoice | None = Field(None, description="Which tool is used; auto by default.")
    thinking: Thinking | None = Field(None, description="Whether the model thinks; by default as its template says.")
    output_config: OutputConfig | None = Field(None, description="What the answer is like.")
    cache_control: CacheControl | None = Field(None, description=_CACHE)
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, max_length=64, description="Further variables of the chat template."
    )
    speed: Literal["standard"] | None = Field(None, description="Only standard: there is one speed.")

    @property
    def field_names(self) -> Mapping[str, str]:
        """As `NAMES`."""
        return NAMES


class CountTokensRequest(Conversation):
    """The body of POST /v1/messages/count_tokens."""

    model: str | None = Field(
        None, max_length=MAX_NAME_CHARACTERS, description="A name of /v1/models; by default the one served."
    )


class MessagesRequest(Conversation, RequestFields):
    """The body of POST /v1/messages."""

    max_tokens: int = Field(
        ge=1,
        le=MAX_TOKEN_COUNT,
        description="Most tokens, thoughts included. Where the model's length ends it before, the "
        "stop_reason is model_context_window_exceeded.",
    )
    stop_sequences: list[str] | None = Field(None, description="At most 32 texts that end the answer.")
    metadata: MessageMetadata | None = Field(None, description="Labels.")
    service_tier: str | None = Field(None, description="Only auto or standard_only.")
    container: Any = Field(None, description="Only null.")
    context_management: Any = Field(None, description="Only null.")
    diagnostics: Any = Field(None, description="Only null.")
    inference_geo: Any = Field(None, description="Only null.")
    mcp_servers: Any = Field(None, description="Only null or empty.")
    user_profile_id: Any = Field(None, description="Only null.")

    REFUSED: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        **NO_HIDDEN_STATES,
        "n": ((None, 1), "a message is one: it must be 1"),
        "stop": ((None,), "its name here is stop_sequences"),
        "prompt_logprobs": ((None,), "not available here: use /v1/completions"),
        "return_token_ids": ((None, False), "not available here: use /v1/chat/completions"),
        "stream_options": ((None,), "usage is always there: it must be absent"),
        "service_tier": ((None, "auto", "standard_only"), "there are no tiers: it must be auto or standard_only"),
        "container": ((None,), "containers are not available"),
        "context_management": ((None,), "context management is not available"),
        "diagnostics": ((None,), "diagnostics are not available"),
        "inference_geo": ((None,), "there is one place: it must be absent"),
        "mcp_servers": ((None, []), "MCP servers are not available"),
        "user_profile_id": ((None,), "profiles are not available"),
    }

    @model_validator(mode="after")
    def _check_budget(self) -> MessagesRequest:
        budget = None if self.thinking is None else self.thinking.budget_tokens
        if budget is not None and budget >= self.max_tokens:
            raise InvalidRequestError(
                "thinking.budget_tokens",
                f"is {budget:,}",
                limit=f"it must be less than max_tokens, {self.max_tokens:,}",
            )
        return self
