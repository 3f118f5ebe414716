"""The request of /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, SkipValidation, model_validator

from pellucid.api.sampling_params import MAX_TOKEN_COUNT, MAX_TOKEN_ID
from pellucid.errors import InvalidRequestError
from pellucid.server.generate.protocol import Integer, sampling_field
from pellucid.server.generate.protocol_structure import StructureFields

MAX_PROMPTS = 256
DEFAULT_MAX_TOKENS = 16  # OpenAI's

Prompts = list[str] | list[list[int]]
_PROMPT_ERROR = "it must be a text, a list of texts, a list of token ids, or a list of lists of token ids"


class CompletionRequest(StructureFields):
    """The body of POST /v1/completions."""

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], SkipValidation] = Field(
        description=f"A text, a list of texts, a list of token ids, or a list of those; at most {MAX_PROMPTS} prompts."
    )
    max_tokens: Annotated[int | None, SkipValidation] = Field(
        None,
        description=f"Most tokens of a choice; {DEFAULT_MAX_TOKENS} by default. 0 only with echo: the prompt alone.",
        json_schema_extra={"minimum": 0, "maximum": MAX_TOKEN_COUNT},
    )
    logprobs: Integer = sampling_field("logprobs", "Reports each token's log-probability and those of the likeliest.")
    echo: bool | None = Field(None, description="Each choice begins with the prompt. With stream: not with logprobs.")
    add_special_tokens: bool | None = Field(
        None, description="Tokenises text with what the tokenizer puts around it; true by default."
    )
    best_of: int | None = Field(None, description="Only n: choices are not ranked.")
    suffix: str | None = Field(None, description="Only null or empty: text is not filled in.")

    REFUSED: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "suffix": ((None, ""), "text is not filled in: it must be absent"),
    }

    @model_validator(mode="after")
    def _check_own(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (1 if self.n is None else self.n):
            raise InvalidRequestError(
                "best_of", f"is {self.best_of}", limit="it must equal n, for choices are not ranked"
            )
        if self.stream and self.echo and self.logprobs is not None:
            raise InvalidRequestError("echo", "with logprobs cannot be streamed: leave out stream")
        return self

    @property
    def echoes_alone(self) -> bool:
        """True when nothing but the prompt is wanted: `max_tokens` 0 with `echo`."""
        return self.max_tokens == 0 and type(self.max_tokens) is int and bool(self.echo)

    def sampling_values(self) -> dict[str, Any]:
        """As names of `SamplingParams`. An echo with logprobs needs those of the prompt."""
        values = super().sampling_values()
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        values.update(max_tokens=1 if self.echoes_alone else max_tokens, logprobs=self.logprobs)
        if self.echo and self.logprobs is not None and self.prompt_logprobs is None:
            values["prompt_logprobs"] = self.logprobs
        return values

    def prompts(self) -> Prompts:
        """The prompts as a list, in order.

        Raises:
            InvalidRequestError: another shape, or too many.
        """
        return as_prompts(self.prompt)


def as_prompts(prompt: Any) -> Prompts:
    """One prompt or several, as a list of texts or of lists of ids.

    Raises:
        InvalidRequestError: another shape, or too many, or an id that is no integer.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise InvalidRequestError("prompt", "is", prompt, _PROMPT_ERROR)
    if not prompt:
        raise InvalidRequestError("prompt", "is an empty list", limit="it must have at least 1 entry")
    if _is_id_like(prompt[0]):
        return [check_ids(prompt, "prompt")]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequestError("prompt", f"has {len(prompt):,} entries", limit=f"the limit is {MAX_PROMPTS}")
    if all(isinstance(entry, str) for entry in prompt):
        return prompt
    if all(isinstance(entry, list) for entry in prompt):
        return [check_ids(entry, f"prompt[{index}]") for index, entry in enumerate(prompt)]
    raise InvalidRequestError("prompt", "is", prompt, _PROMPT_ERROR)


def check_ids(ids: Sequence[Any], where: str) -> list[int]:
    """`ids` when all are integers that could be token ids.

    Raises:
        InvalidRequestError: naming the first that is not.
    """
    for index, token in enumerate(ids):
        if type(token) is not int or not 0 <= token <= MAX_TOKEN_ID:
            raise InvalidRequestError(
                f"{where}[{index}]", "is", token, f"token ids are integers in [0, {MAX_TOKEN_ID:,}]"
            )
    return list(ids)


def _is_id_like(value: object) -> bool:
    """Numbers, among them those that are no ids: their list is told what is wrong with it."""
    return isinstance(value, (int, float)) or value is None
