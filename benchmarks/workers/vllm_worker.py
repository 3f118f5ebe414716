"""vLLM's CPU backend as a benchmark worker: its engine in this process, driven step by step."""

from __future__ import annotations

import itertools
import os
import time
from importlib.metadata import version

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from protocol import Measure, Prompts, serve
from vllm import LLM, SamplingParams


class Engine:
    """Settings as its documentation advises on a CPU; no prefix caching."""

    def __init__(self, model: str, threads: int) -> None:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
        self.llm = LLM(
            model=model,
            dtype="bfloat16",
            max_model_len=2048,
            max_num_seqs=32,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )
        self.engine = self.llm.llm_engine
        self._ids = itertools.count()

    def _submit(self, prompts: Prompts, outputs: list[int]) -> list[str]:
        ids = []
        for prompt, count in zip(prompts, outputs, strict=True):
            params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=count, detokenize=False)
            ids.append(str(next(self._ids)))
            self.engine.add_request(ids[-1], {"prompt_token_ids": prompt}, params)
        return ids

    def _finish(self) -> None:
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def decode(self, prompts: Prompts, outputs: list[int]) -> Measure:
        """From the moment when every sequence has its first token."""
        started = dict.fromkeys(self._submit(prompts, outputs), 0)
        while not all(started.values()):
            for output in self.engine.step():
                started[output.request_id] = len(output.outputs[0].token_ids)
        began = time.perf_counter()
        self._finish()
        return sum(outputs) - sum(started.values()), time.perf_counter() - began

    def prefill(self, prompts: Prompts, outputs: list[int]) -> Measure:
        return sum(map(len, prompts)), self.mixed(prompts, [1] * len(prompts))[1]

    def single(self, prompts: Prompts, outputs: list[int]) -> Measure:
        return self.mixed(prompts, outputs)

    def mixed(self, prompts: Prompts, outputs: list[int]) -> Measure:
        began = time.perf_counter()
        self._submit(prompts, outputs)
        self._finish()
        return sum(outputs), time.perf_counter() - began


if __name__ == "__main__":
    serve(lambda command: Engine(command["model"], command["threads"]), lambda: {"vllm-cpu": version("vllm-cpu")})
