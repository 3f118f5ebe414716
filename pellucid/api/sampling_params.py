"""How a request is sampled: `SamplingParams`, validated when it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import c_double
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from pellucid.api.structured_outputs import CustomStructure, StructuredOutputsParams
from pellucid.errors import FieldName, InvalidRequestError, items_of
from pellucid.float32 import Range
from pellucid.json_text import lone_surrogate

MAX_N = 128
MAX_STOPS = 32
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGPROBS = 100
MAX_LOGIT_BIASES = 1024
MAX_BAD_WORDS = 256
MAX_TEMPERATURE = 100.0
# Logits are divided by the penalty: with this one those below 3.4e32 stay finite. The core has it too.
MIN_REPETITION_PENALTY = 1e-6
MAX_TOKEN_ID = 2**31 - 1
MAX_TOKEN_COUNT = 2**31 - 1
# a seed is a 64-bit word, read as signed or unsigned: -1 and 2**64 - 1 are the same seed
MIN_SEED = -(2**63)
MAX_SEED = 2**64 - 1


# Those of the core's `check_numbers`: what is admitted here is taken there.
FLOAT_RANGES = {
    "temperature": Range(0.0, MAX_TEMPERATURE, f"in [0, {MAX_TEMPERATURE:g}]"),
    "top_p": Range(0.0, 1.0, "in (0, 1]", above_low=True, core=c_double),
    "min_p": Range(0.0, 1.0, "in [0, 1]"),
    "presence_penalty": Range(-2.0, 2.0, "in [-2, 2]"),
    "frequency_penalty": Range(-2.0, 2.0, "in [-2, 2]"),
    "repetition_penalty": Range(MIN_REPETITION_PENALTY, 10.0, f"in [{MIN_REPETITION_PENALTY:g}, 10]"),
}
_INTEGER_RANGES = {
    "n": Range(1, MAX_N, f"in [1, {MAX_N}]"),
    "max_tokens": Range(1, MAX_TOKEN_COUNT, "at least 1"),
    "min_tokens": Range(0, MAX_TOKEN_COUNT, "at least 0"),
    "top_k": Range(-1, MAX_TOKEN_ID, "at least 1, or 0 or -1 for all"),
    "seed": Range(MIN_SEED, MAX_SEED, "in [-2**63, 2**64 - 1]"),
    "logprobs": Range(0, MAX_LOGPROBS, f"in [0, {MAX_LOGPROBS}]"),
    "prompt_logprobs": Range(0, MAX_LOGPROBS, f"in [0, {MAX_LOGPROBS}]"),
}
_OPTIONAL = frozenset({"max_tokens", "seed", "logprobs", "prompt_logprobs"})
_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")
BIAS_RANGE = Range(-100.0, 100.0, "in [-100, 100]")
_TOKEN_RANGE = Range(0, MAX_TOKEN_ID, f"in [0, {MAX_TOKEN_ID:,}]")


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters, with vLLM's names and defaults.

    Greedy when `temperature` is 0 or `top_k` is 1. `top_k` 0 or -1 means all. `logprobs` is the number of most likely
    tokens reported beside the chosen one (0: the chosen one alone; None: nothing). `max_tokens` None means as many as
    the model length allows. `logit_bias` maps token ids to values in [-100, 100]. `seed` None: the engine draws one and
    reports it. Sequences are kept as tuples, numbers as plain `int` and `float`. `structured_outputs` (or a mapping with its
    names) says what the text must be; when the text is complete the output ends, before `min_tokens` if it must.

    Raises:
        InvalidRequestError: naming the field, the value and the limit.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[str] = ()
    allowed_token_ids: Sequence[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        for name, limits in FLOAT_RANGES.items():
            self._set(name, _float(name, getattr(self, name), limits))
        for name, limits in _INTEGER_RANGES.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                self._set(name, integer(name, value, limits))
        for name in _FLAGS:
            _flag(name, getattr(self, name))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            limit = ("it must be at most ", FieldName("max_tokens"), f", {self.max_tokens:,}")
            raise InvalidRequestError("min_tokens", f"is {self.min_tokens:,}", limit=limit)
        self._set("stop", _strings("stop", self.stop, MAX_STOPS))
        self._set("bad_words", _strings("bad_words", self.bad_words, MAX_BAD_WORDS))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS))
        self._set("logit_bias", _biases("logit_bias", self.logit_bias))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids, MAX_TOKEN_ID))
            if not self.allowed_token_ids:
                raise InvalidRequestError("allowed_token_ids", "is empty", limit="it must name at least one token")
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, CustomStructure):
            self._set("structured_outputs", StructuredOutputsParams.of(self.structured_outputs))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def is_greedy(self) -> bool:
        """True when the most likely token is taken without a draw."""
        return self.temperature == 0.0 or self.top_k == 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """The parameters of a JSON object. Keys of `logit_bias` may be decimal strings, for JSON has no others.

        Raises:
            TypeError: naming an unknown parameter.
            InvalidRequestError: as the constructor does.
        """
        _check_names(values)
        arguments = dict(values)
        biases = arguments.get("logit_bias")
        if isinstance(biases, Mapping):
            arguments["logit_bias"] = {_key_to_id(key): bias for key, bias in biases.items()}
        return cls(**arguments)

    @classmethod
    def with_defaults(cls, defaults: Mapping[str, Any] | None = None, /, **given: Any) -> SamplingParams:
        """What a request gives, over `defaults` (such as a model's generation config), over the neutral values.

        A keyword that is None counts as not given; None within `defaults` is a value.

        Raises:
            TypeError: naming an unknown parameter.
            InvalidRequestError: as the constructor does.
        """
        _check_names(given)
        return cls.from_dict(
            {**(defaults or {}), **{name: value for name, value in given.items() if value is not None}}
        )


_NAMES = frozenset(entry.name for entry in fields(SamplingParams))


# What a model's generation_config.json may set for requests that do not.
_MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def model_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters that a generation_config.json sets; none when it says that the model does not sample."""
    if generation_config.get("do_sample") is False:
        return {}
    return {name: generation_config[name] for name in _MODEL_DEFAULTS if generation_config.get(name) is not None}


def range_of(name: str) -> tuple[float, float, str] | None:
    """(lowest, highest, the range in words) of a number of `SamplingParams`; None for a field that is no number."""
    limits = FLOAT_RANGES.get(name) or _INTEGER_RANGES.get(name)
    return None if limits is None else (limits.low, limits.high, limits.text)


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Check that every token id which `params` names is in [0, vocab_size).

    Raises:
        InvalidRequestError: naming the field, the id and the size of the vocabulary.
    """
    for name in ("logit_bias", "stop_token_ids", "allowed_token_ids"):
        outside = [token_id for token_id in getattr(params, name) or () if token_id >= vocab_size]
        if outside:
            raise InvalidRequestError(
                name, f"names token {outside[0]}", limit=f"the vocabulary has {vocab_size:,} tokens"
            )


def check_well_formed(name: str, text: str) -> None:
    """Check that a text has no lone surrogates, which no encoding can carry.

    Raises:
        InvalidRequestError: naming the field and the place.
    """
    found = lone_surrogate(text)
    if found:
        raise InvalidRequestError(name, f"holds {found}", limit="it must be well-formed Unicode")


def _check_names(values: Mapping[str, Any]) -> None:
    unknown = [name for name in values if name not in _NAMES]
    if unknown:
        raise TypeError(f"unknown sampling parameter {unknown[0]!r}; known are {', '.join(sorted(_NAMES))}")


def _plain(value: object) -> object:
    """`value` as an error quotes it: numpy's numbers as Python's."""
    return value.item() if isinstance(value, np.generic) else value


def _float(name: str, value: object, limits: Range) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise InvalidRequestError(name, "is", _plain(value), f"it must be a number {limits.text}")
    if not limits.holds(value):  # type: ignore[arg-type]  # false for NaN too; ints too large for a float compare exactly
        raise InvalidRequestError(name, "is", _plain(value), f"it must be {limits.text}")
    return float(value)  # type: ignore[arg-type]


def integer(name: str, value: object, limits: Range) -> int:
    """`value` as an int.

    Raises:
        InvalidRequestError: it is none, or not in `limits`.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise InvalidRequestError(name, "is", _plain(value), f"it must be an integer {limits.text}")
    number = int(value)  # type: ignore[call-overload]
    if not limits.low <= number <= limits.high:
        raise InvalidRequestError(name, "is", _plain(value), f"it must be {limits.text}")
    return int(number)


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidRequestError(name, "is", _plain(value), "it must be true or false")


def _strings(name: str, value: object, limit: int) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else items_of(name, () if value is None else value, "strings", limit)
    for index, item in enumerate(items):
        if not isinstance(item, str):
            raise InvalidRequestError(f"{name}[{index}]", "is", _plain(item), "it must be a string")
        if not item:
            raise InvalidRequestError(f"{name}[{index}]", "is empty", limit="it must have at least one character")
        if len(item) > MAX_STOP_CHARACTERS:
            raise InvalidRequestError(
                f"{name}[{index}]", f"has {len(item):,} characters", limit=f"the limit is {MAX_STOP_CHARACTERS:,}"
            )
        check_well_formed(name, item)
    return tuple(items)


def _token_ids(name: str, value: object, limit: int) -> tuple[int, ...]:
    items = items_of(name, () if value is None else value, "token ids", limit)
    return tuple(integer(f"{name}[{index}]", item, _TOKEN_RANGE) for index, item in enumerate(items))


def _biases(name: str, value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidRequestError(name, "is", _plain(value), "it must map token ids to numbers")
    pairs = dict(value)  # type: ignore[call-overload]
    if len(pairs) > MAX_LOGIT_BIASES:
        raise InvalidRequestError(name, f"has {len(pairs):,} entries", limit=f"the limit is {MAX_LOGIT_BIASES:,}")
    return {_key(name, key): _float(f"{name}[{key!r}]", bias, BIAS_RANGE) for key, bias in pairs.items()}


def _key(name: str, key: object) -> int:
    try:
        return integer(name, key, _TOKEN_RANGE)
    except InvalidRequestError as error:
        raise InvalidRequestError(name, ("a key of ", FieldName(name), " is"), error.value, error.limit) from None


def _key_to_id(key: object) -> object:
    """A decimal string of at most ten digits as a number; anything else as it is, for the constructor to judge."""
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10 else key
