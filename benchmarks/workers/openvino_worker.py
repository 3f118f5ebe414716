"""OpenVINO GenAI as a benchmark worker: its continuous batching pipeline, driven step by step."""

from __future__ import annotations

import itertools
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from protocol import Measure, Prompts, serve


class Engine:
    """Settings as its documentation advises for throughput on a CPU; no prefix caching."""

    def __init__(self, model: str, threads: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = 512
        scheduler.max_num_seqs = 32
        scheduler.cache_size = 2
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "bf16"}
        self.pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self._ids = itertools.count()

    def _submit(self, prompts: Prompts, outputs: list[int]) -> list[Any]:
        handles = []
        for prompt, count in zip(prompts, outputs, strict=True):
            config = genai.GenerationConfig()
            config.max_new_tokens = count
            config.ignore_eos = True
            config.do_sample = False
            ids = ov.Tensor(np.array([prompt], np.int64))
            handles.append(self.pipeline.add_request(next(self._ids), ids, config))
        return handles

    @staticmethod
    def _read(handle: Any) -> int:
        count = 0
        while handle.can_read():
            count += sum(len(output.generated_ids) for output in handle.read().values())
        return count

    def _finish(self) -> None:
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()

    def decode(self, prompts: Prompts, outputs: list[int]) -> Measure:
        """From the moment when every sequence has its first token."""
        handles = self._submit(prompts, outputs)
        started = [0] * len(handles)
        while not all(started):
            self.pipeline.step()
            started = [count + self._read(handle) for count, handle in zip(started, handles, strict=True)]
        began = time.perf_counter()
        self._finish()
        return sum(outputs) - sum(started), time.perf_counter() - began

    def prefill(self, prompts: Prompts, outputs: list[int]) -> Measure:
        return sum(map(len, prompts)), self.mixed(prompts, [1] * len(prompts))[1]

    def single(self, prompts: Prompts, outputs: list[int]) -> Measure:
        return self.mixed(prompts, outputs)

    def mixed(self, prompts: Prompts, outputs: list[int]) -> Measure:
        began = time.perf_counter()
        handles = self._submit(prompts, outputs)
        self._finish()
        seconds = time.perf_counter() - began
        made = sum(self._read(handle) for handle in handles)
        if made != sum(outputs):
            raise RuntimeError(f"{made} tokens were made of {sum(outputs)}")
        return made, seconds


if __name__ == "__main__":
    serve(
        lambda command: Engine(command["model"], command["threads"]),
        lambda: {"openvino-genai": version("openvino-genai")},
    )
