"""What P1 speaks of, as tensors, and the settings whose bits are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pellucid.api.outputs import RequestOutput

PRECISIONS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int8, int8 cache": {"quantization": "int8", "kv_cache_dtype": "int8"},
    "int8 a channel": {"quantization": "int8_channel"},
    "int4": {"quantization": "int4"},
    "stored types": {},
}


@dataclass(frozen=True)
class Bits:
    """Of one output."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    prompt_logprobs: torch.Tensor


def bits_of(output: RequestOutput) -> Bits:
    """Of its first choice."""
    choice = output.outputs[0]
    rows = [[(token, row[token].logprob) for token in sorted(row)] for row in choice.logprobs or []]
    prompt_rows = [
        [(token, row[token].logprob) for token in sorted(row)] for row in output.prompt_logprobs or [] if row
    ]
    return Bits(
        torch.tensor(choice.token_ids),
        torch.tensor([value for row in rows for pair in row for value in pair], dtype=torch.float64),
        torch.tensor([value for row in prompt_rows for pair in row for value in pair], dtype=torch.float64),
    )


def assert_same_bits(found: list[Bits], expected: list[Bits]) -> None:
    """Request by request."""
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one.tokens, other.tokens), f"tokens of request {index} differ"
        assert torch.equal(one.logprobs, other.logprobs), f"logprobs of request {index} differ"
        assert torch.equal(one.prompt_logprobs, other.prompt_logprobs), f"prompt logprobs of request {index} differ"
