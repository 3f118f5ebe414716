"""Pellucid as a benchmark worker."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from protocol import Measure, Prompts, serve

import pellucid
from pellucid import LLM, SamplingParams


class Engine:
    """Every measure drives the engine step by step, as `LLM.generate` does."""

    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        self.llm = LLM(
            model,
            **options,
            num_threads=threads,
            enable_prefix_caching=False,
            max_num_seqs=32,
            max_model_len=2048,
        )

    def _submit(self, prompts: Prompts, outputs: list[int]) -> list[str]:
        return [
            self.llm.client.submit(prompt, SamplingParams(temperature=0, ignore_eos=True, max_tokens=count))
            for prompt, count in zip(prompts, outputs, strict=True)
        ]

    def _finish(self, ids: list[str]) -> None:
        while self.llm.client.has_unfinished:
            self.llm.client.step()
        for request_id in ids:
            self.llm.client.release(request_id)

    def decode(self, prompts: Prompts, outputs: list[int]) -> Measure:
        """From the moment when every sequence has its first token."""
        ids = self._submit(prompts, outputs)
        started: dict[str, int] = dict.fromkeys(ids, 0)
        while not all(started.values()):
            for chunk in self.llm.client.step_outputs().chunks:
                started[chunk.request_id] += len(chunk.token_ids)
        began = time.perf_counter()
        self._finish(ids)
        return sum(outputs) - sum(started.values()), time.perf_counter() - began

    def prefill(self, prompts: Prompts, outputs: list[int]) -> Measure:
        """Prompt tokens until the first token."""
        return sum(map(len, prompts)), self.mixed(prompts, [1] * len(prompts))[1]

    def single(self, prompts: Prompts, outputs: list[int]) -> Measure:
        """Output tokens, prompt included in the time."""
        return self.mixed(prompts, outputs)

    def mixed(self, prompts: Prompts, outputs: list[int]) -> Measure:
        """All at once, at most 32 running."""
        began = time.perf_counter()
        self._finish(self._submit(prompts, outputs))
        return sum(outputs), time.perf_counter() - began


def load(command: dict[str, Any]) -> Engine:
    model, options = Path(command["model"]), command["options"]
    if model.suffix == ".gguf":  # the GGUF files of benchmarks have no vocabulary
        options = {"tokenizer": str(model.parent / "hf"), **options}
    return Engine(str(model), command["threads"], options)


if __name__ == "__main__":
    serve(load, lambda: {"pellucid": pellucid.__version__})
