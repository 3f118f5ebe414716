"""transformers as a benchmark worker: static batches, left padding, scaled dot-product attention, bfloat16."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from protocol import Measure, Prompts, serve

BATCH = 32


class Engine:
    """One model on the CPU."""

    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()

    def _prefill(self, prompts: Prompts) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = self.model(ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1].argmax(-1), mask, positions[:, -1:]

    def _run(self, prompts: Prompts, steps: int) -> tuple[float, float]:
        """Seconds of the prompts, and of `steps` further tokens of each."""
        with torch.inference_mode():
            began = time.perf_counter()
            cache, token, mask, position = self._prefill(prompts)
            middle = time.perf_counter()
            for _ in range(steps):
                mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
                position = position + 1
                out = self.model(
                    token[:, None],
                    attention_mask=mask,
                    position_ids=position,
                    past_key_values=cache,
                    use_cache=True,
                )
                token = out.logits[:, -1].argmax(-1)
            return middle - began, time.perf_counter() - middle

    def decode(self, prompts: Prompts, outputs: list[int]) -> Measure:
        return len(prompts) * (outputs[0] - 1), self._run(prompts, outputs[0] - 1)[1]

    def prefill(self, prompts: Prompts, outputs: list[int]) -> Measure:
        return sum(map(len, prompts)), self._run(prompts, 0)[0]

    def single(self, prompts: Prompts, outputs: list[int]) -> Measure:
        return sum(outputs), sum(self._run(prompts, outputs[0] - 1))

    def mixed(self, prompts: Prompts, outputs: list[int]) -> Measure:
        seconds = 0.0
        for i in range(0, len(prompts), BATCH):
            seconds += sum(self._run(prompts[i : i + BATCH], max(outputs[i : i + BATCH]) - 1))
        return sum(outputs), seconds


def load(command: dict[str, Any]) -> Engine:
    return Engine(command["model"], command["threads"])


if __name__ == "__main__":
    serve(load, lambda: {"transformers": transformers.__version__, "torch": torch.__version__})
