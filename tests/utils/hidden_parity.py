"""Hidden states of the engine beside those of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from pellucid import LLM, SamplingParams

BOUND = 1e-4  # of transformers' greatest magnitude


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Fails when a value is further away than `BOUND`."""
    worst = ((found - expected).abs().max() / expected.abs().max()).item()
    assert worst <= BOUND, f"{what}: {worst:.2e} of the greatest magnitude; the bound is {BOUND:.0e}"


def assert_states_are_transformers(llm: LLM, model: Any, prompts: Iterable[list[int]], max_tokens: int) -> None:
    """Every layer and every position of each prompt and its answer."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    layers = [*range(model.config.num_hidden_layers), -1]
    for prompt in prompts:
        positions = list(range(len(prompt) + max_tokens - 1))
        asked: dict[str, Any] = {"hidden_states_for_tokens": positions, "hidden_states_layers": layers}
        output = llm.generate([prompt], params, return_hidden_states=True, **asked)[0]
        with torch.no_grad():
            expected = model(torch.tensor([prompt + output["token_ids"]]), output_hidden_states=True).hidden_states
        found: Any = output.outputs[0].hidden_states
        assert output.outputs[0].hidden_states_positions == positions
        assert len(expected) == len(layers)
        for index, state in enumerate(expected):
            assert_close(found[:, index], state[0, :-1], f"layer {layers[index]}")
