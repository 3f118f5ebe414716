"""Everything that hidden states are asked for beside, as the fields of `SamplingParams` and of a completion alike."""

from __future__ import annotations

from typing import Any

PROMPT = [256, *range(30, 60)]
NUM_TOKENS = 12
_DRAWN: dict[str, Any] = {"temperature": 0.9, "seed": 7, "max_tokens": NUM_TOKENS, "ignore_eos": True}

FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {**_DRAWN, "temperature": 0.0},
    "drawn": {**_DRAWN, "top_p": 0.9, "top_k": 50, "min_p": 0.001},
    "penalties": {**_DRAWN, "presence_penalty": 1.5, "frequency_penalty": -0.5, "repetition_penalty": 1.3},
    "logit_bias": {**_DRAWN, "logit_bias": {17: 50.0, 18: -100.0}},
    "logprobs": {**_DRAWN, "logprobs": 3},
    "prompt_logprobs": {**_DRAWN, "prompt_logprobs": 2},
    "stop strings": {**_DRAWN, "allowed_token_ids": [67, 68, 69], "stop": ["ab", "ca"]},
    "stop tokens": {**_DRAWN, "allowed_token_ids": [67, 68, 69], "stop_token_ids": [68]},
    "min_tokens": {**_DRAWN, "allowed_token_ids": [67, 68, 69], "stop_token_ids": [68], "min_tokens": 6},
    "bad_words": {**_DRAWN, "allowed_token_ids": [67, 68, 69], "bad_words": ["ab"]},
    "structured output": {**_DRAWN, "ignore_eos": False, "structured_outputs": {"regex": "[ab]{4}c"}},
    "n": {**_DRAWN, "n": 3},
    "max_tokens 1": {**_DRAWN, "max_tokens": 1},
}


def every_position(feature: str) -> list[int]:
    """All positions that may have a row."""
    return list(range(len(PROMPT) + int(FEATURES[feature]["max_tokens"]) - 1))
