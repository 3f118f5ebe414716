"""The real SmolLM2-135M-Instruct against transformers on the same GGUF file, dequantised identically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from utils.hidden_parity import assert_states_are_transformers

from pellucid import LLM, SamplingParams

MAX_TOKENS = 64
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics are",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: What is the boiling point of water at sea level?\nA:",
    "1, 1, 2, 3, 5, 8, 13,",
    "In 1969, the first humans",
    "Photosynthesis is the process by which",
    "To make a good cup of tea, you should",
    "The opposite of hot is",
    "import numpy as np\n\n",
    "SELECT name, age FROM",
    "Shakespeare wrote many plays, among them",
    "The quick brown fox",
    "Water is made of hydrogen and",
    "Bonjour, je m'appelle",
    "Machine learning is a field of",
    "If it rains tomorrow, then",
    "# Shopping list\n\n- eggs\n- milk\n-",
]


@pytest.fixture(scope="module")
def gguf_file(real_model: Path) -> Path:
    path = real_model
    if path.suffix != ".gguf":
        pytest.skip(f"{path.name} is no GGUF file")
    return path


def load_reference(gguf_file: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=dtype
    ).eval()


def logprobs_of(model: Any, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities [length, V] of each sequence, computed in one right-padded batch."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits.float()
    return [logits[i, : len(sequence)].log_softmax(-1) for i, sequence in enumerate(sequences)]


def test_float32_when_twenty_prompts_are_decoded_greedily_then_ids_are_transformers(gguf_file: Path) -> None:
    """Teacher forcing on our own ids: each must be the reference's first choice, or lie within 1e-4 of it."""
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)
    with LLM(gguf_file, dtype="float32", max_model_len=256) as llm:
        prompts = llm.encode(PROMPTS)
        outputs = llm.generate(prompts, params)
    sequences = [prompt + output["token_ids"] for prompt, output in zip(prompts, outputs, strict=True)]
    model = load_reference(gguf_file, torch.float32)
    for prompt, output, logprobs in zip(prompts, outputs, logprobs_of(model, sequences), strict=True):
        assert len(output["token_ids"]) == MAX_TOKENS
        for position, token in enumerate(output["token_ids"]):
            row = logprobs[len(prompt) - 1 + position]
            top, runner_up = row.topk(2).values.tolist()
            assert token == int(row.argmax()) or (top - runner_up < 1e-4 and row[token].item() == runner_up)
            found = (output.outputs[0].logprobs or [])[position][token].logprob
            assert found == pytest.approx(row[token].item(), abs=1e-3)


@pytest.mark.slow
def test_bfloat16_when_decoded_greedily_then_tokens_equal_or_their_logprobs_close(
    gguf_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)
    with LLM(gguf_file, dtype="bfloat16", max_model_len=256) as llm:
        prompts = llm.encode(PROMPTS)
        outputs = llm.generate(prompts, params)
    sequences = [prompt + output["token_ids"] for prompt, output in zip(prompts, outputs, strict=True)]
    model = load_reference(gguf_file, torch.bfloat16)
    differences, others = [], 0
    for prompt, output, logprobs in zip(prompts, outputs, logprobs_of(model, sequences), strict=True):
        for position, token in enumerate(output["token_ids"]):
            row = logprobs[len(prompt) - 1 + position]
            found = (output.outputs[0].logprobs or [])[position][token].logprob
            differences.append(abs(found - row[token].item()))
            others += token != int(row.argmax())
            assert token == int(row.argmax()) or row.max().item() - row[token].item() < 0.5
    mean = sum(differences) / len(differences)
    with capsys.disabled():
        print(f" [bfloat16: {others} of {len(differences)} tokens differ, mean logprob difference {mean:.4f}]", end="")
    assert mean < 0.05


@pytest.mark.slow
def test_hidden_states_when_asked_of_the_engine_then_every_layer_and_position_is_transformers(gguf_file: Path) -> None:
    with LLM(gguf_file, dtype="float32", max_model_len=256) as llm:
        prompts = llm.encode(PROMPTS[:6])
        assert_states_are_transformers(llm, load_reference(gguf_file, torch.float32), prompts, max_tokens=8)
