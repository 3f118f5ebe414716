"""The request of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag, model_validator

from pellucid.errors import InvalidRequestError
from pellucid.server.chat.tools import MAX_TOOLS, NamedTool, ToolCall, ToolDefinition
from pellucid.server.generate.protocol import Integer, Strict, by_kind, sampling_field
from pellucid.server.generate.protocol_structure import StructureFields

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_METADATA = 16


class TextPart(Strict):
    """A piece of a message's content."""

    type: Literal["text", "input_text", "refusal"] = Field(description="Only text is understood.")
    text: str | None = Field(None, description="The text.")
    refusal: str | None = Field(None, description="The text of a refusal.")

    @model_validator(mode="after")
    def _has_its_text(self) -> TextPart:
        if (self.refusal if self.type == "refusal" else self.text) is None:
            raise InvalidRequestError("messages", f"has a part of type {self.type!r} that lacks its text")
        return self


Content = Annotated[
    Annotated[str, Tag("@text")] | Annotated[list[TextPart], Tag("@list")],
    by_kind("it must be a text or a list of parts"),
]
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("@text")] | Annotated[NamedTool, Tag("@object")],
    by_kind("it must be none, auto, required or an object of type function"),
]


class Message(Strict):
    """One message of a conversation. Keys that clients echo from an answer may be null."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(description="Who speaks.")
    content: Content | None = Field(None, description="Text, or parts of type text.")
    name: str | None = Field(None, max_length=256, description="Of the speaker, for templates that show it.")
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOLS, description="Calls that the assistant made.")
    tool_call_id: str | None = Field(None, max_length=256, description="The call that a tool's message answers.")
    reasoning_content: str | None = Field(
        None, description="Thoughts of an assistant's turn, for templates that show them."
    )
    reasoning: str | None = Field(None, description="As reasoning_content.")
    refusal: str | None = Field(None, description="An assistant's refusal, as its content.")
    audio: None = Field(None, description="Only null: there is no audio.")
    function_call: None = Field(None, description="Only null: use tool_calls.")
    annotations: list[Any] | None = Field(None, max_length=0, description="Only null or empty.")

    def to_template(self) -> dict[str, Any]:
        """What a chat template gets: only what was given."""
        given: dict[str, Any] = {
            name: getattr(self, name) for name in ("role", "name", "tool_call_id") if getattr(self, name) is not None
        }
        given["content"] = self._text()
        if self.tool_calls is not None:
            given["tool_calls"] = [call.to_template() for call in self.tool_calls]
        thoughts = self.reasoning_content if self.reasoning_content is not None else self.reasoning
        return given if thoughts is None else {**given, "reasoning_content": thoughts}

    def _text(self) -> Any:
        if self.content is None:
            return self.refusal
        if isinstance(self.content, str):
            return self.content
        return [{"type": "text", "text": part.text if part.text is not None else part.refusal} for part in self.content]


class ChatCompletionRequest(StructureFields):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, description="The conversation.")
    max_tokens: Integer = sampling_field(
        "max_tokens", "Most tokens of a choice; by default what the model's length allows."
    )
    max_completion_tokens: Integer = sampling_field("max_tokens", "The same, and stronger.")
    logprobs: bool | None = Field(None, description="Reports the log-probability of each token.")
    top_logprobs: Integer = sampling_field("logprobs", "Most likely tokens reported beside it; needs logprobs.")
    add_generation_prompt: bool | None = Field(
        None, description="Opens the assistant's turn; true unless continue_final_message."
    )
    continue_final_message: bool | None = Field(
        None,
        description="The last message is left open and goes on; it must have a text and no calls. Not together with "
        "add_generation_prompt.",
    )
    add_special_tokens: bool | None = Field(
        None, description="Adds the tokenizer's own, over those that the template writes; false by default."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, max_length=64, description="Further variables of the chat template."
    )
    echo: bool | None = Field(
        None,
        description="The answer begins with the last message, if that is the assistant's; where it goes on, as the prompt has it.",
    )
    metadata: dict[str, str] | None = Field(
        None, max_length=MAX_METADATA, description="The caller's own labels; they change nothing."
    )
    safety_identifier: str | None = Field(None, max_length=512, description="As user.")
    prompt_cache_key: str | None = Field(
        None,
        max_length=512,
        description="Names the machine that has a prefix cached; there is one: it changes nothing.",
    )
    store: bool | None = Field(None, description="Only false: nothing is stored.")
    service_tier: str | None = Field(None, description="Only auto or default.")
    modalities: list[str] | None = Field(None, description="Only text.")
    verbosity: str | None = Field(None, description="Only medium: the model has no such switch.")
    audio: Any = Field(None, description="Only null.")
    prediction: Any = Field(None, description="Only null; see speculative_method of the engine.")
    moderation: Any = Field(None, description="Only null.")
    web_search_options: Any = Field(None, description="Only null.")
    prompt_cache_options: Any = Field(None, description="Only null: whole blocks are always cached.")
    prompt_cache_retention: Any = Field(None, description="Only null: blocks stay until they are reused.")
    functions: Any = Field(None, description="Only null: use tools.")
    function_call: Any = Field(None, description="Only null: use tool_choice.")
    tools: list[ToolDefinition] | None = Field(
        None, max_length=MAX_TOOLS, description="Functions that the model may call."
    )
    tool_choice: ToolChoice | None = Field(
        None,
        description="auto (the default with tools): the model decides; none: the tools are not shown; required, or one by "
        "name: the answer is nothing but calls, whose arguments follow the tools' schemas.",
    )
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most. true by default.")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None,
        description="For chat templates that read it; none also for those that read enable_thinking, and for models that do "
        "not reason.",
    )
    include_reasoning: bool | None = Field(None, description="false: the reasoning is left out of the answer.")

    REFUSED: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "store": ((None, False), "nothing is stored: it must be false"),
        "service_tier": ((None, "auto", "default"), "there are no tiers: it must be auto or default"),
        "modalities": ((None, ["text"]), "only text is made: it must be ['text']"),
        "verbosity": ((None, "medium"), "not available: it must be medium or absent"),
        "audio": ((None,), "audio is not available"),
        "prediction": ((None,), "predicted output is not available"),
        "moderation": ((None,), "moderation is not available"),
        "web_search_options": ((None,), "web search is not available"),
        "prompt_cache_options": ((None,), "not available: whole blocks of a prompt are always cached"),
        "prompt_cache_retention": ((None,), "not available: cached blocks stay until they are reused"),
        "functions": ((None,), "not available: use tools"),
        "function_call": ((None,), "not available: use tool_choice"),
    }

    @model_validator(mode="after")
    def _check_template(self) -> ChatCompletionRequest:
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message",
                ("continue_final_message and add_generation_prompt are both true",),
                limit="only one can be",
            )
        if self.top_logprobs is not None and self.top_logprobs != 0 and not self.logprobs:
            raise InvalidRequestError("top_logprobs", "is given, but logprobs is not true")
        return self

    @property
    def field_names(self) -> Mapping[str, str]:
        """Also of what `SamplingParams` and the prompt's checks know under other names."""
        tokens = {} if self.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
        logprobs = {} if self.top_logprobs is None else {"logprobs": "top_logprobs"}
        return {"prompt": "messages", **tokens, **logprobs, **super().field_names}

    def sampling_values(self) -> dict[str, Any]:
        """As names of `SamplingParams`. `max_tokens` null or absent is "as many as the model's length allows"."""
        values = super().sampling_values()
        asked = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        logprobs = (0 if self.top_logprobs is None else self.top_logprobs) if self.logprobs else None
        return {**values, "max_tokens": asked, "logprobs": logprobs}
