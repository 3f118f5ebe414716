"""What request models share: strict types, and fields that are documented, honoured or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, SkipValidation, ValidationError, model_validator

from pellucid.api.sampling_params import SamplingParams, range_of
from pellucid.errors import InvalidRequestError, shown
from pellucid.json_text import path_of

MAX_NAME_CHARACTERS = 256
REQUEST_ID_PATTERN = r"^[A-Za-z0-9._:-]{1,128}$"
_SAMPLING_NAMES = frozenset(entry.name for entry in fields(SamplingParams))


class Strict(BaseModel):
    """No conversions, no unknown keys, finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @property
    def field_names(self) -> Mapping[str, str]:
        """What the client calls the fields that errors behind the validation speak of: their paths there, and its own."""
        return {}


def sampling_field(name: str, text: str) -> Any:
    """A field that `SamplingParams` checks: type, range and what it is called there are told in one place."""
    limits = range_of(name)
    if limits is None:
        return Field(None, description=text)
    low, high, words = limits
    return Field(
        None, description=f"{text} {words[0].upper()}{words[1:]}.", json_schema_extra={"minimum": low, "maximum": high}
    )


# Checked by `SamplingParams`, whose messages name field, value and limit; the annotation is what the OpenAPI says.
Number = Annotated[float | None, SkipValidation]
Integer = Annotated[int | None, SkipValidation]
Flag = Annotated[bool | None, SkipValidation]
Texts = Annotated[str | list[str] | None, SkipValidation]
TokenIds = Annotated[list[int] | None, SkipValidation]
Positions = Annotated[list[int] | None, SkipValidation]
Biases = Annotated[dict[str, float] | None, SkipValidation]


class SamplingFields(Strict):
    """The sampling parameters that chat and completions share. null is the same as absent: then the model's
    generation_config.json decides, else the neutral value."""

    n: Integer = sampling_field("n", "Choices for each prompt.")
    temperature: Number = sampling_field("temperature", "0 is greedy.")
    top_p: Number = sampling_field("top_p", "Keeps the shortest prefix of likely tokens whose mass reaches this.")
    top_k: Integer = sampling_field("top_k", "Keeps the k most likely tokens; 0 and -1 keep all.")
    min_p: Number = sampling_field("min_p", "Keeps tokens at least this fraction as likely as the likeliest.")
    presence_penalty: Number = sampling_field("presence_penalty", "Subtracted once from tokens that occurred.")
    frequency_penalty: Number = sampling_field("frequency_penalty", "Subtracted for every occurrence.")
    repetition_penalty: Number = sampling_field("repetition_penalty", "Divides the logits of tokens that occurred.")
    seed: Integer = sampling_field("seed", "Makes the draw repeatable; without it one is drawn and reported.")
    stop: Texts = sampling_field("stop", "Texts that end the answer: one, or a list of at most 32.")
    stop_token_ids: TokenIds = sampling_field("stop_token_ids", "Tokens that end the answer.")
    include_stop_str_in_output: Flag = sampling_field(
        "include_stop_str_in_output", "Keeps the stop text in the answer."
    )
    ignore_eos: Flag = sampling_field("ignore_eos", "Goes on behind the end token.")
    min_tokens: Integer = sampling_field("min_tokens", "Fewest tokens before a stop.")
    logit_bias: Biases = sampling_field(
        "logit_bias", "Added to the logits of token ids, in [-100, 100]; at most 1,024."
    )
    bad_words: Texts = sampling_field("bad_words", "Texts that are never made; at most 256.")
    allowed_token_ids: TokenIds = sampling_field("allowed_token_ids", "The only tokens that may be made.")
    prompt_logprobs: Integer = sampling_field(
        "prompt_logprobs", "Most likely tokens reported at each prompt position; not while streaming."
    )
    skip_special_tokens: Flag = sampling_field("skip_special_tokens", "Leaves special tokens out of the text.")

    def sampling_values(self) -> dict[str, Any]:
        """What was given of the fields that carry the names of `SamplingParams`."""
        return {name: getattr(self, name) for name in SamplingFields.model_fields if name in _SAMPLING_NAMES}


class StreamOptions(Strict):
    """What a stream carries besides text."""

    include_usage: bool | None = Field(None, description="A last chunk with token counts, before [DONE].")
    continuous_usage_stats: bool | None = Field(None, description="Token counts so far in every chunk.")
    include_obfuscation: bool | None = Field(None, description="Only false or null: chunks are not padded.")


class RequestFields(SamplingFields):
    """What chat and completions share besides sampling."""

    model: str | None = Field(
        None, max_length=MAX_NAME_CHARACTERS, description="A name of /v1/models; by default the one served."
    )
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    request_id: str | None = Field(
        None, pattern=REQUEST_ID_PATTERN, description="Name of the request for cancelling; not one that runs."
    )
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1, description="Lower is served first; 0 by default.")
    cache_salt: str | None = Field(
        None, min_length=1, max_length=256, description="Prompt blocks are shared only with requests of the same salt."
    )
    return_token_ids: bool | None = Field(None, description="Adds prompt_token_ids and each choice's token_ids.")
    user: str | None = Field(None, max_length=512, description="The caller's own label; it changes nothing.")
    return_hidden_states: Flag = Field(
        None, description="Adds hidden_states: what the head read to choose the last token, float32."
    )
    hidden_states_for_tokens: Positions = Field(
        None, description="Rows by position in prompt + output; negative ones count from the last row. Rows, then."
    )
    hidden_states_layers: Positions = Field(
        None, description="0: the embedding's output, i: behind block i, -1: what the head reads. Rows x layers, then."
    )
    hidden_states_format: Annotated[str | None, SkipValidation] = Field(
        None, description="float (the default) or base64: little-endian, with hidden_states_shape and _dtype beside it."
    )
    capture: Annotated[list[str] | None, SkipValidation] = Field(
        None, description="Activations by name at every position, with * between dots; only where the server allows it."
    )
    steering: Annotated[dict[str, list[float]] | None, SkipValidation] = Field(
        None, description="Vectors added to activations at every position, by name; only where the server allows it."
    )
    hidden_states_stream: Flag = Field(
        None, description="While streaming, each chunk has a row for each of its tokens."
    )

    # Fields that are known and of which only these values can be honoured: (values, why no others).
    REFUSED: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}

    @model_validator(mode="after")
    def _check_refused(self) -> RequestFields:
        check_refused(self, self.REFUSED)
        return self

    @model_validator(mode="after")
    def _check_stream_options(self) -> RequestFields:
        options = self.stream_options
        if options is not None and not self.stream:
            raise InvalidRequestError("stream_options", "is given, but stream is not true")
        if options is not None and options.include_obfuscation:
            raise InvalidRequestError("stream_options.include_obfuscation", "is true", limit="chunks are not padded")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequestError("prompt_logprobs", "cannot be streamed: leave out stream")
        return self


# For APIs whose answers have no place for them.
NO_HIDDEN_STATES: Mapping[str, tuple[tuple[Any, ...], str]] = dict.fromkeys(
    (
        "return_hidden_states",
        "hidden_states_for_tokens",
        "hidden_states_layers",
        "hidden_states_format",
        "hidden_states_stream",
        "capture",
        "steering",
    ),
    ((None, False), "not available here: use /v1/chat/completions"),
)


def check_refused(request: Strict, refused: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    """Raises InvalidRequestError for a field with another value than those that can be honoured."""
    for name, (allowed, why) in refused.items():
        value = getattr(request, name)
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise InvalidRequestError(name, "is", value, why)


# Tags of unions begin with this, so that paths to fields can leave them out.
TAG = "@"


def by_kind(problem: str) -> Discriminator:
    """Tells texts, tag "@text", lists, "@list", and objects, "@object": an error then speaks of the one that was meant."""
    return _discriminator(lambda value: _KINDS.get(type(value), TAG + "object"), problem)


def by_type(known: Sequence[str], default: str | None = None) -> Discriminator:
    """Tells objects by their `type`, whose tag is "@" and the type."""

    def tag(value: Any) -> str | None:
        kind = value.get("type", default) if isinstance(value, dict) else getattr(value, "type", None)
        return TAG + kind if isinstance(kind, str) else None

    return _discriminator(tag, f"it must be an object of type {', '.join(known)}")


_KINDS: dict[type, str] = {str: TAG + "text", list: TAG + "list"}


def _discriminator(tag: Callable[[Any], str | None], problem: str) -> Discriminator:
    return Discriminator(tag, custom_error_type="other_kind", custom_error_message=problem)


def as_invalid_request(error: ValidationError) -> InvalidRequestError:
    """The first thing that pydantic found, in the manner of our own errors."""
    found = error.errors(include_url=False)[0]
    own = found.get("ctx", {}).get("error")
    if isinstance(own, InvalidRequestError):
        return own
    location = [part for part in found["loc"] if not str(part).startswith(TAG)]
    path = path_of(location)
    if found["type"] == "extra_forbidden":
        return InvalidRequestError(path, (f"unknown field {path!r}",))
    if found["type"] == "missing":
        return InvalidRequestError(path, "is required")
    text = found["msg"][0].lower() + found["msg"][1:]
    problem = f"is {shown(found['input'])}: {text}"
    return InvalidRequestError(path, problem) if path else InvalidRequestError(None, f"the body {problem}")
