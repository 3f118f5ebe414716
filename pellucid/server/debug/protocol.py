"""The requests of /tokenize and /detokenize."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, SkipValidation, model_validator

from pellucid.errors import FieldName, InvalidRequestError
from pellucid.server.chat.protocol import MAX_MESSAGES, Message
from pellucid.server.chat.tools import MAX_TOOLS, ToolDefinition
from pellucid.server.generate.protocol import MAX_NAME_CHARACTERS, Strict


class TokenizeRequest(Strict):
    """The body of POST /tokenize: a text, or a conversation."""

    model: str | None = Field(None, max_length=MAX_NAME_CHARACTERS, description="A name of /v1/models.")
    prompt: str | None = Field(None, description="A text; or messages.")
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES, description="A conversation.")
    add_special_tokens: bool | None = Field(
        None, description="With what the tokenizer puts around a text; true for a prompt, false for messages."
    )
    return_token_strs: bool | None = Field(None, description="Adds the vocabulary's spelling of each token.")
    add_generation_prompt: bool | None = Field(None, description="As for chat.")
    continue_final_message: bool | None = Field(None, description="As for chat.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=64, description="As for chat.")
    tools: list[ToolDefinition] | None = Field(None, max_length=MAX_TOOLS, description="As for chat.")

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError(
                "prompt", ("give ", FieldName("prompt"), " or ", FieldName("messages"), ", one of the two")
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message",
                ("continue_final_message and add_generation_prompt are both true",),
                limit="only one can be",
            )
        return self

    @property
    def field_names(self) -> Mapping[str, str]:
        """That of the prompt, where it is a conversation."""
        return {} if self.messages is None else {"prompt": "messages"}


class DetokenizeRequest(Strict):
    """The body of POST /detokenize."""

    model: str | None = Field(None, max_length=MAX_NAME_CHARACTERS, description="A name of /v1/models.")
    tokens: Annotated[list[int], SkipValidation] = Field(description="Token ids.")
    skip_special_tokens: bool | None = Field(None, description="Leaves special tokens out; false by default.")

    @property
    def field_names(self) -> Mapping[str, str]:
        """That of the ids."""
        return {"token_ids": "tokens"}
