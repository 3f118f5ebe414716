"""Token ids and sampling values that a model's files give, held against the model: what it cannot use is left out, and said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pellucid.api.sampling_params import SamplingParams, model_defaults
from pellucid.errors import InvalidRequestError, about, shown
from pellucid.models.config import TOKEN_KEYS, GivenTokens, ModelConfig


@dataclass(frozen=True)
class Origins:
    """What the files are called in messages."""

    config: str
    generation_config: str
    tokenizer: str

    @classmethod
    def read(cls, value: object, fallback: str) -> Origins:
        """From the header of a program file, which may be damaged or of an older version."""
        if isinstance(value, list) and len(value) == 3 and all(isinstance(name, str) for name in value):
            return cls(*value)
        return cls(fallback, fallback, fallback)


@dataclass(frozen=True)
class FileValues:
    """What can be used.

    `generation_config` has the keys that are read, `eos_token_ids` what ends a request: the generation config's ends, else the
    model's, and the tokenizer's. `problems` says what was left out, one line for each key.
    """

    generation_config: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    problems: tuple[str, ...]

    @classmethod
    def of(
        cls, config: ModelConfig, generation_config: Mapping[str, Any], tokenizer_ends: Sequence[int], origins: Origins
    ) -> FileValues:
        """`tokenizer_ends`: ids of the tokenizer's end tokens.

        Raises:
            ConfigError: a token id is no integer; the text names the file and the key.
        """
        size = config.vocab_size
        problems = [_left_out(origins.config, name, ids, size) for name, ids in config.foreign_tokens.items()]
        usable: dict[str, Any] = {}
        foreign = {token for ids in config.foreign_tokens.values() for token in ids}
        for name in TOKEN_KEYS:
            with about(origins.generation_config):
                tokens = GivenTokens.read(name, generation_config.get(name), size)
            usable[name] = tokens.known
            if tokens.outside:
                foreign.update(tokens.outside)
                problems.append(_left_out(origins.generation_config, name, tokens.outside, size))
        strangers = [token for token in tokenizer_ends if not 0 <= token < size and token not in foreign]
        if strangers:
            problems.append(_left_out(origins.tokenizer, "eos_token", strangers, size))
        ends = (
            *(usable["eos_token_id"] or config.eos_token_ids),
            *(token for token in tokenizer_ends if 0 <= token < size),
        )
        usable |= _sampling(generation_config, origins.generation_config, problems)
        return cls(usable, tuple(dict.fromkeys(ends)), tuple(dict.fromkeys(problems)))


def _left_out(origin: str, name: str, tokens: Iterable[int], vocab_size: int) -> str:
    ids = shown(list(tokens))[1:-1]
    return f"{origin}: {name} names token {ids}; the vocabulary has {vocab_size:,} tokens: it is left out"


def _sampling(given: Mapping[str, Any], origin: str, problems: list[str]) -> dict[str, Any]:
    """The sampling parameters of a generation_config.json that are in range."""
    usable: dict[str, Any] = {}
    for name, value in model_defaults(given).items():
        try:
            usable[name] = getattr(SamplingParams.from_dict({name: value}), name)
        except InvalidRequestError as error:
            problems.append(f"{origin}: {error}: it is left out")
    return usable
