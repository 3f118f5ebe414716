"""The request of /v1/embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SkipValidation, model_validator

from pellucid.server.completions.protocol import MAX_PROMPTS, Prompts, as_prompts
from pellucid.server.generate.protocol import MAX_NAME_CHARACTERS, REQUEST_ID_PATTERN, Strict, check_refused

Pooling = Literal["mean", "last"]


class EmbeddingRequest(Strict):
    """The body of POST /v1/embeddings."""

    input: Annotated[str | list[str] | list[int] | list[list[int]], SkipValidation] = Field(
        description=f"A text, a list of texts, a list of token ids, or a list of those; at most {MAX_PROMPTS}."
    )
    model: str | None = Field(
        None, max_length=MAX_NAME_CHARACTERS, description="A name of /v1/models; by default the one served."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="float (the default) or base64: little-endian float32."
    )
    pooling: Pooling | None = Field(
        None, description="Of the last layer's rows: mean (the default) over the prompt, or the last one."
    )
    normalize: bool | None = Field(None, description="Scales each embedding to length 1; true by default.")
    dimensions: int | None = Field(None, description="Only the model's width: embeddings are not cut.")
    add_special_tokens: bool | None = Field(
        None, description="Tokenises text with what the tokenizer puts around it; true by default."
    )
    request_id: str | None = Field(
        None, pattern=REQUEST_ID_PATTERN, description="Name of the request for cancelling; not one that runs."
    )
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1, description="Lower is served first; 0 by default.")
    user: str | None = Field(None, max_length=512, description="The caller's own label; it changes nothing.")
    truncate_prompt_tokens: int | None = Field(None, description="Only null: inputs are not cut.")

    REFUSED: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "truncate_prompt_tokens": ((None,), "inputs are not cut: it must be absent"),
    }

    @model_validator(mode="after")
    def _check_refused(self) -> EmbeddingRequest:
        check_refused(self, self.REFUSED)
        return self

    def prompts(self) -> Prompts:
        """The inputs as a list, in order.

        Raises:
            InvalidRequestError: another shape, or too many.
        """
        return as_prompts(self.input)

    @property
    def field_names(self) -> Mapping[str, str]:
        """That of the inputs, which the engine calls prompts."""
        return {"prompt": "input"}
