"""Sampling parameters: each bad value gets a typed error that names the field, the value and the limit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from pellucid.api.sampling_params import (
    MAX_BAD_WORDS,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_N,
    MAX_SEED,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MIN_SEED,
    SamplingParams,
    check_vocabulary,
)
from pellucid.errors import InvalidRequestError

NAN, INFINITY = float("nan"), float("inf")

# keyword arguments, the field that the error names, the text of the error
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 0}, "n", f"n is 0; it must be in [1, {MAX_N}]"),
    ({"n": MAX_N + 1}, "n", f"n is {MAX_N + 1}; it must be in [1, {MAX_N}]"),
    ({"n": True}, "n", f"n is True; it must be an integer in [1, {MAX_N}]"),
    ({"n": 1.0}, "n", f"n is 1.0; it must be an integer in [1, {MAX_N}]"),
    ({"n": None}, "n", f"n is None; it must be an integer in [1, {MAX_N}]"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; it must be at least 1"),
    ({"max_tokens": "16"}, "max_tokens", "max_tokens is '16'; it must be an integer at least 1"),
    ({"max_tokens": 10**30}, "max_tokens", f"max_tokens is {10**30}; it must be at least 1"),
    ({"min_tokens": -1}, "min_tokens", "min_tokens is -1; it must be at least 0"),
    ({"min_tokens": 17}, "min_tokens", "min_tokens is 17; it must be at most max_tokens, 16"),
    ({"temperature": -0.1}, "temperature", "temperature is -0.1; it must be in [0, 100]"),
    ({"temperature": 100.5}, "temperature", "temperature is 100.5; it must be in [0, 100]"),
    ({"temperature": NAN}, "temperature", "temperature is nan; it must be in [0, 100]"),
    ({"temperature": INFINITY}, "temperature", "temperature is inf; it must be in [0, 100]"),
    ({"temperature": True}, "temperature", "temperature is True; it must be a number in [0, 100]"),
    ({"temperature": "1"}, "temperature", "temperature is '1'; it must be a number in [0, 100]"),
    ({"temperature": None}, "temperature", "temperature is None; it must be a number in [0, 100]"),
    ({"temperature": np.float32(NAN)}, "temperature", "temperature is nan; it must be in [0, 100]"),
    ({"top_p": 0}, "top_p", "top_p is 0; it must be in (0, 1]"),
    ({"top_p": 1.5}, "top_p", "top_p is 1.5; it must be in (0, 1]"),
    ({"top_p": NAN}, "top_p", "top_p is nan; it must be in (0, 1]"),
    ({"top_k": -2}, "top_k", "top_k is -2; it must be at least 1, or 0 or -1 for all"),
    ({"top_k": 2.5}, "top_k", "top_k is 2.5; it must be an integer at least 1, or 0 or -1 for all"),
    ({"min_p": -0.5}, "min_p", "min_p is -0.5; it must be in [0, 1]"),
    ({"min_p": 1.01}, "min_p", "min_p is 1.01; it must be in [0, 1]"),
    ({"presence_penalty": 2.5}, "presence_penalty", "presence_penalty is 2.5; it must be in [-2, 2]"),
    ({"frequency_penalty": -3}, "frequency_penalty", "frequency_penalty is -3; it must be in [-2, 2]"),
    ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty is 0; it must be in [1e-06, 10]"),
    ({"repetition_penalty": 11}, "repetition_penalty", "repetition_penalty is 11; it must be in [1e-06, 10]"),
    ({"seed": 1.5}, "seed", "seed is 1.5; it must be an integer in [-2**63, 2**64 - 1]"),
    ({"seed": MAX_SEED + 1}, "seed", f"seed is {MAX_SEED + 1}; it must be in [-2**63, 2**64 - 1]"),
    ({"seed": MIN_SEED - 1}, "seed", f"seed is {MIN_SEED - 1}; it must be in [-2**63, 2**64 - 1]"),
    ({"stop": 3}, "stop", "stop is 3; it must be a list of strings"),
    ({"stop": ""}, "stop", "stop[0] is empty; it must have at least one character"),
    ({"stop": ["a", ""]}, "stop", "stop[1] is empty; it must have at least one character"),
    ({"stop": ["a", 7]}, "stop", "stop[1] is 7; it must be a string"),
    ({"stop": {"a": 1}}, "stop", "stop is {'a': 1}; it must be a list of strings"),
    ({"stop": ["x"] * (MAX_STOPS + 1)}, "stop", f"stop has {MAX_STOPS + 1} entries; the limit is {MAX_STOPS}"),
    (
        {"stop": "x" * (MAX_STOP_CHARACTERS + 1)},
        "stop",
        f"stop[0] has {MAX_STOP_CHARACTERS + 1:,} characters; the limit is {MAX_STOP_CHARACTERS:,}",
    ),
    ({"stop_token_ids": 2}, "stop_token_ids", "stop_token_ids is 2; it must be a list of token ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "stop_token_ids[0] is -1; it must be in [0, 2,147,483,647]"),
    ({"stop_token_ids": [1, True]}, "stop_token_ids", "stop_token_ids[1] is True; it must be an integer in"),
    ({"stop_token_ids": [0] * 1025}, "stop_token_ids", "stop_token_ids has 1,025 entries; the limit is 1,024"),
    (
        {"include_stop_str_in_output": 1},
        "include_stop_str_in_output",
        "include_stop_str_in_output is 1; it must be true",
    ),
    ({"ignore_eos": None}, "ignore_eos", "ignore_eos is None; it must be true or false"),
    ({"skip_special_tokens": "yes"}, "skip_special_tokens", "skip_special_tokens is 'yes'; it must be true or false"),
    ({"logit_bias": [1]}, "logit_bias", "logit_bias is [1]; it must map token ids to numbers"),
    ({"logit_bias": {1: 101}}, "logit_bias", "logit_bias[1] is 101; it must be in [-100, 100]"),
    ({"logit_bias": {1: NAN}}, "logit_bias", "logit_bias[1] is nan; it must be in [-100, 100]"),
    ({"logit_bias": {-1: 0.0}}, "logit_bias", "a key of logit_bias is -1; it must be in [0, 2,147,483,647]"),
    ({"logit_bias": {"a": 0.0}}, "logit_bias", "a key of logit_bias is 'a'; it must be an integer in"),
    (
        {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIASES + 1), 1.0)},
        "logit_bias",
        f"logit_bias has {MAX_LOGIT_BIASES + 1:,} entries; the limit is {MAX_LOGIT_BIASES:,}",
    ),
    ({"bad_words": [""]}, "bad_words", "bad_words[0] is empty"),
    ({"bad_words": ["x"] * (MAX_BAD_WORDS + 1)}, "bad_words", f"bad_words has {MAX_BAD_WORDS + 1} entries"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "allowed_token_ids is empty; it must name at least one token"),
    ({"allowed_token_ids": ["1"]}, "allowed_token_ids", "allowed_token_ids[0] is '1'; it must be an integer in"),
    ({"logprobs": -1}, "logprobs", f"logprobs is -1; it must be in [0, {MAX_LOGPROBS}]"),
    ({"logprobs": True}, "logprobs", f"logprobs is True; it must be an integer in [0, {MAX_LOGPROBS}]"),
    (
        {"prompt_logprobs": 101},
        "prompt_logprobs",
        f"prompt_logprobs is 101; it must be in [0, {MAX_LOGPROBS}]",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "field", "text"), REFUSED, ids=[f"{row[1]}-{i}" for i, row in enumerate(REFUSED)]
)
def test_bad_value_when_params_are_made_then_error_names_field_value_and_limit(
    arguments: dict[str, Any], field: str, text: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**arguments)
    assert str(caught.value).startswith(text)
    assert caught.value.param == field


def test_huge_value_when_refused_then_error_stays_short() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(n="x" * 100_000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200


def test_values_at_the_limits_when_params_are_made_then_accepted() -> None:
    SamplingParams(temperature=0, top_p=1, min_p=1, repetition_penalty=10, presence_penalty=-2, n=MAX_N, top_k=-1)
    SamplingParams(seed=MIN_SEED, max_tokens=5, min_tokens=5, logprobs=MAX_LOGPROBS, stop=["x"] * MAX_STOPS)
    SamplingParams(seed=MAX_SEED, max_tokens=None, min_tokens=10**6, logit_bias={0: -100, 1: 100})


def test_lists_and_numpy_numbers_when_params_are_made_then_kept_as_plain_python() -> None:
    params = SamplingParams(
        n=np.int64(2),  # type: ignore[arg-type]
        temperature=np.float64(0.5),
        top_p=1,
        stop="end",
        stop_token_ids=np.array([3, 4]),  # type: ignore[arg-type]
        bad_words=["a"],
        allowed_token_ids=range(3),
        logit_bias={np.int32(5): 1},  # type: ignore[dict-item]
    )
    assert (params.stop, params.stop_token_ids, params.bad_words) == (("end",), (3, 4), ("a",))
    assert params.allowed_token_ids == (0, 1, 2)
    assert params.logit_bias == {5: 1.0}
    kinds = [type(params.n), type(params.temperature), type(params.top_p), type(params.stop_token_ids[0])]
    assert kinds == [int, float, float, int]


def test_none_for_a_list_when_params_are_made_then_empty() -> None:
    params = SamplingParams(stop=None, stop_token_ids=None, logit_bias=None, bad_words=None)  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids, params.logit_bias, params.bad_words) == ((), (), {}, ())


def test_valid_params_when_replaced_then_validated_again() -> None:
    params = SamplingParams(stop=["a"], stop_token_ids=[1], logit_bias={1: 2.0})
    assert dataclasses.replace(params, n=1) == params
    with pytest.raises(InvalidRequestError, match="n is 0"):
        dataclasses.replace(params, n=0)


@pytest.mark.parametrize(("arguments", "greedy"), [({"temperature": 0}, True), ({"top_k": 1}, True), ({}, False)])
def test_params_when_asked_whether_greedy_then_temperature_and_top_k_decide(
    arguments: dict[str, Any], greedy: bool
) -> None:
    assert SamplingParams(**arguments).is_greedy is greedy


def test_json_object_when_read_then_string_keys_of_logit_bias_become_ids() -> None:
    params = SamplingParams.from_dict({"logit_bias": {"50": -1}, "temperature": 0.5})
    assert (params.logit_bias, params.temperature) == ({50: -1.0}, 0.5)
    with pytest.raises(InvalidRequestError, match="a key of logit_bias is '-50'"):
        SamplingParams.from_dict({"logit_bias": {"-50": -1}})


@pytest.mark.parametrize("make", [SamplingParams.from_dict, lambda values: SamplingParams.with_defaults(**values)])
def test_unknown_name_when_read_then_type_error_names_it(make: Any) -> None:
    with pytest.raises(TypeError, match="unknown sampling parameter 'temprature'"):
        make({"temprature": 1.0})


def test_request_and_model_defaults_when_merged_then_request_goes_first() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9, "max_tokens": None}
    params = SamplingParams.with_defaults(defaults, temperature=0.2, top_k=None)
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.2, 0.9, 0, None)


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids", "allowed_token_ids"])
def test_id_outside_the_vocabulary_when_checked_then_error_names_id_and_size(field: str) -> None:
    values: Any = {99: 1.0, 100: 1.0} if field == "logit_bias" else [99, 100]
    params = SamplingParams(**{field: values})
    check_vocabulary(params, 101)
    with pytest.raises(InvalidRequestError, match=f"{field} names token 100; the vocabulary has 100 tokens") as caught:
        check_vocabulary(params, 100)
    assert caught.value.param == field
