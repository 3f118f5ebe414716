"""Damage to a tokenizer.json in what the library takes without a word: ids, kinds of parts, what stands around a text."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from typing import Any

from utils.file_mutations import damaged_json

_IDS = (0, 299, 300, 301, 400, 5_000, 2**31, 2**32 - 1, 2**32, -1)
_TOKENS = ("<x>", "", "a", "\0", "é", "<0x41>", "missing")
_PARTS: tuple[dict[str, Any], ...] = (
    {"decoder": None},
    {"decoder": {"type": "Fuse"}},
    {"decoder": {"type": "WordPiece", "prefix": "#", "cleanup": True}},
    {"decoder": {"type": "Sequence", "decoders": []}},
    {"pre_tokenizer": None},
    {"pre_tokenizer": {"type": "Digits", "individual_digits": True}},
    {"pre_tokenizer": {"type": "BertPreTokenizer"}},
    {"normalizer": {"type": "Lowercase"}},
    {"normalizer": {"type": "Prepend", "prepend": "x"}},
    {"truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 1, "direction": "Left"}},
    {"truncation": {"max_length": 1, "strategy": "OnlySecond", "stride": 4, "direction": "Right"}},
    {"post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}},
    {"model": {"type": "WordLevel", "vocab": {"a": 3}, "unk_token": "missing"}},
    {"model": {"type": "WordLevel", "vocab": {"a": 3}, "unk_token": "a"}},
    {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0], ["b", -1.0]]}},
    {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], ["b", -1.0]]}},
    {
        "model": {
            "type": "WordPiece",
            "vocab": {"a": 0},
            "unk_token": "missing",
            "continuing_subword_prefix": "",
            "max_input_chars_per_word": 2,
        }
    },
)
_MODEL_PARTS: tuple[dict[str, Any], ...] = (
    {"unk_token": None, "fuse_unk": True},
    {"unk_token": "missing"},
    {"byte_fallback": True},
    {"dropout": 0.5},
    {"continuing_subword_prefix": "#", "end_of_word_suffix": "x"},
    {"ignore_merges": True},
)


def damaged_tokenizer(rng: random.Random, content: bytes) -> bytes:
    """Damage to anything, or one to three of the changes above."""
    if rng.random() < 0.3:
        return damaged_json()(rng, content)
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        with contextlib.suppress(KeyError, TypeError, IndexError):  # an earlier change took away what this one is about
            rng.choice(_CHANGES)(rng, value)
    return json.dumps(value).encode()


def _token(rng: random.Random, value: dict[str, Any]) -> str:
    return rng.choice((*_TOKENS, rng.choice(list(value["model"]["vocab"]))))


def _give_an_id(rng: random.Random, value: dict[str, Any]) -> None:
    value["model"]["vocab"][_token(rng, value)] = rng.choice(_IDS)


def _take_a_token(rng: random.Random, value: dict[str, Any]) -> None:
    del value["model"]["vocab"][_token(rng, value)]


def _add_a_token(rng: random.Random, value: dict[str, Any]) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), rng.random() < 0.5)
    token = {"id": rng.choice(_IDS), "content": _token(rng, value), "special": rng.random() < 0.5, **flags}
    value["added_tokens"].append(token)


def _move_an_added_token(rng: random.Random, value: dict[str, Any]) -> None:
    value["added_tokens"][0]["id"] = rng.choice(_IDS)


def _put_a_token_before(rng: random.Random, value: dict[str, Any]) -> None:
    token = _token(rng, value)
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    value["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [rng.choice(_IDS)], "tokens": [token]}},
    }


def _change_a_part(rng: random.Random, value: dict[str, Any]) -> None:
    value.update(rng.choice(_PARTS))


def _change_the_model(rng: random.Random, value: dict[str, Any]) -> None:
    value["model"].update(rng.choice(_MODEL_PARTS))


_CHANGES: tuple[Callable[[random.Random, dict[str, Any]], None], ...] = (
    _give_an_id,
    _take_a_token,
    _add_a_token,
    _move_an_added_token,
    _put_a_token_before,
    _change_a_part,
    _change_the_model,
)
