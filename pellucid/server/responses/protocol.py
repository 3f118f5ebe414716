"""The request of /v1/responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag, model_validator

from pellucid.errors import InvalidRequestError
from pellucid.server.chat.protocol import MAX_METADATA, MAX_PARTS
from pellucid.server.chat.tools import MAX_TOOLS
from pellucid.server.generate.protocol import (
    NO_HIDDEN_STATES,
    Integer,
    RequestFields,
    StreamOptions,
    Strict,
    by_kind,
    by_type,
    sampling_field,
)

MAX_ITEMS = 4096
MAX_ID_CHARACTERS = 256
LOGPROBS = "message.output_text.logprobs"

Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARACTERS)]
Status = Literal["in_progress", "completed", "incomplete"]


# What chat calls a field that a response's request knows under another name.
NAMES: Mapping[str, str] = {
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


class InputText(Strict):
    """Text that was said to the model."""

    type: Literal["input_text"] = Field(description="What it is.")
    text: str = Field(description="The text.")


class OutputText(Strict):
    """Text that the model made."""

    type: Literal["output_text"] = Field(description="What it is.")
    text: str = Field(description="The text.")
    annotations: list[Any] | None = Field(None, max_length=0, description="Only null or empty.")
    logprobs: list[Any] | None = Field(None, description="As answered; not read.")
    parsed: Any = Field(None, description="What a client makes of it; not read.")


class Refusal(Strict):
    """A refusal that a model made."""

    type: Literal["refusal"] = Field(description="What it is.")
    refusal: str = Field(description="The text.")


Part = Annotated[
    Annotated[InputText, Tag("@input_text")]
    | Annotated[OutputText, Tag("@output_text")]
    | Annotated[Refusal, Tag("@refusal")],
    by_type(("input_text", "output_text", "refusal")),
]
Parts = Annotated[list[Part], Field(max_length=MAX_PARTS)]
Content = Annotated[
    Annotated[str, Tag("@text")] | Annotated[Parts, Tag("@list")], by_kind("it must be a text or a list of parts")
]


class MessageItem(Strict):
    """Something that was said."""

    type: Literal["message"] = Field("message", description="What it is; may be left out.")
    role: Literal["system", "developer", "user", "assistant"] = Field(description="Who speaks.")
    content: Content = Field(description="Text, or parts of type input_text, output_text or refusal.")
    id: Id | None = Field(None, description="As answered; not read.")
    status: Status | None = Field(None, description="As answered; not read.")
    phase: None = Field(None, description="Only null.")


class FunctionCallItem(Strict):
    """A call that the model made."""

    type: Literal["function_call"] = Field(description="What it is.")
    call_id: Id = Field(description="Ties the output to the call.")
    name: Id = Field(description="The function.")
    arguments: str = Field(description="Its arguments, as JSON.")
    parsed_arguments: Any = Field(None, description="What a client makes of them; not read.")
    id: Id | None = Field(None, description="As answered; not read.")
    status: Status | None = Field(None, description="As answered; not read.")


class FunctionCallOutputItem(Strict):
    """What a function that was called has returned."""

    type: Literal["function_call_output"] = Field(description="What it is.")
    call_id: Id = Field(description="The call.")
    output: Content = Field(description="Text, or parts of type input_text.")
    id: Id | None = Field(None, description="As answered; not read.")
    status: Status | None = Field(None, description="As answered; not read.")


class ReasoningText(Strict):
    """Text that the model wrote for itself."""

    type: Literal["reasoning_text"] = Field(description="What it is.")
    text: str = Field(description="The text.")


class ReasoningItem(Strict):
    """Thoughts of the turn that follows, for templates that show them."""

    type: Literal["reasoning"] = Field(description="What it is.")
    content: list[ReasoningText] | None = Field(None, max_length=MAX_PARTS, description="Its texts.")
    summary: list[Any] | None = Field(None, max_length=0, description="Only null or empty.")
    encrypted_content: None = Field(None, description="Only null.")
    id: Id | None = Field(None, description="As answered; not read.")
    status: Status | None = Field(None, description="As answered; not read.")


ITEMS: dict[str, type[Strict]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutputItem,
    "reasoning": ReasoningItem,
}
Item = Annotated[
    Annotated[MessageItem, Tag("@message")]
    | Annotated[FunctionCallItem, Tag("@function_call")]
    | Annotated[FunctionCallOutputItem, Tag("@function_call_output")]
    | Annotated[ReasoningItem, Tag("@reasoning")],
    by_type(tuple(ITEMS), default="message"),
]
Items = Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS)]
Input = Annotated[
    Annotated[str, Tag("@text")] | Annotated[Items, Tag("@list")], by_kind("it must be a text or a list of items")
]


class FunctionTool(Strict):
    """A function that the model may call."""

    type: Literal["function"] = Field(description="Only functions: there are no built-in tools.")
    name: str = Field(min_length=1, max_length=64, description="Its name.")
    description: str | None = Field(None, description="What it does, for the model.")
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments.")
    strict: bool | None = Field(None, description="As for chat.")


class FunctionChoice(Strict):
    """The function that must be called."""

    type: Literal["function"] = Field(description="Only function.")
    name: str = Field(min_length=1, max_length=64, description="Its name.")


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("@text")] | Annotated[FunctionChoice, Tag("@object")],
    by_kind("it must be none, auto, required or an object of type function"),
]


class TextFormat(Strict):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"] = Field(description="The kind.")
    name: str | None = Field(None, max_length=64, description="Of the schema.")
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="The JSON schema, for json_schema.")
    description: str | None = Field(None, description="Of the schema; it changes nothing.")
    strict: bool | None = Field(None, description="The schema always holds.")

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if (self.schema_ is not None) != (self.type == "json_schema"):
            raise InvalidRequestError(
                "text.format",
                f"is of type {self.type!r}",
                limit="json_schema needs a schema, and no other type has one",
            )
        return self


class TextOptions(Strict):
    """How the text is written."""

    format: TextFormat | None = Field(None, description="What it must be; any text by default.")
    verbosity: Literal["medium"] | None = Field(None, description="Only medium: the model has no such switch.")


class Reasoning(Strict):
    """How the model thinks."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="As reasoning_effort of chat."
    )
    summary: Literal["auto"] | None = Field(
        None, description="Only auto or null: thoughts are not summarised, they are in the reasoning item's content."
    )
    generate_summary: Literal["auto"] | None = Field(None, description="As summary.")


class ResponsesRequest(RequestFields):
    """The body of POST /v1/responses."""

    input: Input = Field(description="What is said: a text, or items.")
    instructions: str | None = Field(None, description="A system message before all; not carried over to the next.")
    max_output_tokens: Integer = sampling_field(
        "max_tokens", "Most tokens, thoughts included; by default what the model's length allows."
    )
    previous_response_id: str | None = Field(
        None, max_length=MAX_ID_CHARACTERS, description="A stored response whose conversation goes on."
    )
    store: bool | None = Field(
        None,
        description="Keeps the response in memory for GET and previous_response_id, while there is room; true by default.",
    )
    text: TextOptions | None = Field(None, description="What the text must be.")
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS, description="Functions that may be called.")
    tool_choice: ToolChoice | None = Field(
        None, description="none, auto, required or a function's name; auto by default."
    )
    parallel_tool_calls: bool | None = Field(None, description="Whether several calls may be made; true by default.")
    max_tool_calls: int | None = Field(
        None, ge=1, description="Calls of built-in tools, of which there are none: it changes nothing."
    )
    reasoning: Reasoning | None = Field(None, description="How the model thinks.")
    include: list[Literal["message.output_text.logprobs"]] | None = Field(
        None, description="Only message.output_text.logprobs: the log-probability of each token."
    )
    top_logprobs: Integer = sampling_field(
        "logprobs", f"Most likely tokens reported beside it; needs include {LOGPROBS}."
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        None,
        description="auto drops the oldest turns of a conversation that is too long; disabled, the default, refuses it.",
    )
    metadata: dict[str, str] | None = Field(
        None, max_length=MAX_METADATA, description="The caller's own labels; they come back."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, max_length=64, description="Further variables of the chat template."
    )
    safety_identifier: str | None = Field(None, max_length=512, description="As user.")
    prompt_cache_key: str | None = Field(
        None,
        max_length=512,
        description="Names the machine that has a prefix cached; there is one: it changes nothing.",
    )
    service_tier: str | None = Field(None, description="Only auto or default.")
    background: bool | None = Field(None, description="Only false: a response lives as long as its request.")
    conversation: Any = Field(None, description="Only null: use previous_response_id.")
    prompt: Any = Field(None, description="Only null: no prompts are kept.")
    context_management: Any = Field(None, description="Only null; see truncation.")
    moderation: Any = Field(None, description="Only null.")
    prompt_cache_options: Any = Field(None, description="Only null: whole blocks are always cached.")
    prompt_cache_retention: Any = Field(None, description="Only null: blocks stay until they are reused.")

    REFUSED: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        **NO_HIDDEN_STATES,
        "n": ((None, 1), "a response is one: it must be 1"),
        "prompt_logprobs": ((None,), "not available here: use /v1/completions"),
        "return_token_ids": ((None, False), "not available here: use /v1/chat/completions"),
        "stream_options": (
            (None, *(StreamOptions.model_validate({"include_obfuscation": off}) for off in (None, False))),
            "usage is always there: only include_obfuscation false can be honoured",
        ),
        "service_tier": ((None, "auto", "default"), "there are no tiers: it must be auto or default"),
        "background": ((None, False), "a response lives as long as its request: it must be false"),
        "conversation": ((None,), "not available: use previous_response_id"),
        "prompt": ((None,), "not available: no prompts are kept"),
        "context_management": ((None,), "not available: see truncation"),
        "moderation": ((None,), "moderation is not available"),
        "prompt_cache_options": ((None,), "not available: whole blocks of a prompt are always cached"),
        "prompt_cache_retention": ((None,), "not available: cached blocks stay until they are reused"),
    }

    @model_validator(mode="after")
    def _check_own(self) -> ResponsesRequest:
        if self.top_logprobs is not None and self.top_logprobs != 0 and not self.wants_logprobs:
            raise InvalidRequestError("top_logprobs", f"is given, but include lacks {LOGPROBS}")
        return self

    @property
    def field_names(self) -> Mapping[str, str]:
        """As `NAMES`."""
        return NAMES

    @property
    def wants_logprobs(self) -> bool:
        """True when `include` asks for them."""
        return LOGPROBS in (self.include or ())

    @property
    def items(self) -> list[MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem]:
        """The input as items: a text is a user's message."""
        if isinstance(self.input, str):
            content = [{"type": "input_text", "text": self.input}]
            return [MessageItem.model_validate({"role": "user", "content": content})]
        return self.input
