"""The reference that most people trust: the same model in transformers, on the CPU, greedy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pellucid.testing.compare import Generated
from pellucid.weights import hub

_NUM_CANDIDATES = 5


def load_transformers(model: str | Path, dtype: str = "float32") -> Any:
    """The transformers module of a model that `LLM` takes: a folder, a .gguf file (dequantised as it is read), or a name.

    Raises:
        ModelNotFoundError: no such model.
        ImportError: torch or transformers is missing.
    """
    import torch
    import transformers

    path = hub.resolve_model(model)
    place: dict[str, Any] = {} if path.is_dir() else {"gguf_file": path.name}
    folder = path if path.is_dir() else path.parent
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **place)
    return loaded.eval()


def follow_with_transformers(
    module: Any, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]
) -> list[Generated]:
    """What greedy decoding in transformers gives for each prompt, up to the first token that is not the output's.

    As long as both agree they stand on the same tokens, so one forward pass over prompt and output says what decoding would: that
    takes a fraction of the time. End tokens end nothing.
    """
    import torch

    with torch.inference_mode():
        return [_follow(module, prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]


def _follow(module: Any, prompt: Sequence[int], output: Sequence[int]) -> Generated:
    import torch

    ids = torch.tensor([[*prompt, *output[:-1]]])
    logprobs_NV = module(ids, logits_to_keep=len(output), use_cache=False).logits[0].float().log_softmax(-1)
    chosen = logprobs_NV.argmax(-1).tolist()
    agreed = next((i for i, (a, b) in enumerate(zip(chosen, output, strict=True)) if a != b), len(output))
    num_known = min(agreed + 1, len(output))
    top = logprobs_NV[:num_known].topk(_NUM_CANDIDATES)
    candidates = [
        dict(zip(ids_K, values_K, strict=True))
        for ids_K, values_K in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    token_ids = chosen[:num_known]
    logprobs = [float(logprobs_NV[i, token_id]) for i, token_id in enumerate(token_ids)]
    if agreed < len(output):  # what it thinks of the other one, likely or not
        candidates[agreed][output[agreed]] = float(logprobs_NV[agreed, output[agreed]])
    return Generated(token_ids, logprobs, candidates)
