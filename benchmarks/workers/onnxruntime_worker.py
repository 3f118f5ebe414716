"""onnxruntime-genai as a benchmark worker: static batches; it has no continuous batching, so it takes no mixed load."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
from protocol import Measure, Prompts, serve


class Engine:
    """One model; a generator for each measurement."""

    def __init__(self, model: str, threads: int) -> None:
        path = Path(model) / "genai_config.json"
        config = json.loads(path.read_text())
        options = config["model"]["decoder"].setdefault("session_options", {})
        if options.get("intra_op_num_threads") != threads:
            options["intra_op_num_threads"] = threads
            path.write_text(json.dumps(config))
        self.model = og.Model(model)

    def _generator(self, prompts: Prompts, length: int) -> og.Generator:
        params = og.GeneratorParams(self.model)
        params.set_search_options(
            max_length=length,
            min_length=length,
            batch_size=len(prompts),
            do_sample=False,
            past_present_share_buffer=True,
        )
        return og.Generator(self.model, params)

    def decode(self, prompts: Prompts, outputs: list[int]) -> Measure:
        generator = self._generator(prompts, len(prompts[0]) + outputs[0])
        generator.append_tokens(np.array(prompts, np.int32))
        generator.generate_next_token()
        began = time.perf_counter()
        for _ in range(outputs[0] - 1):
            generator.generate_next_token()
        return len(prompts) * (outputs[0] - 1), time.perf_counter() - began

    def prefill(self, prompts: Prompts, outputs: list[int]) -> Measure:
        return sum(map(len, prompts)), self._run(prompts, 1)

    def single(self, prompts: Prompts, outputs: list[int]) -> Measure:
        return sum(outputs), self._run(prompts, outputs[0])

    def _run(self, prompts: Prompts, count: int) -> float:
        began = time.perf_counter()
        generator = self._generator(prompts, len(prompts[0]) + count)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(count):
            generator.generate_next_token()
        return time.perf_counter() - began


if __name__ == "__main__":
    serve(
        lambda command: Engine(command["model"], command["threads"]),
        lambda: {"onnxruntime-genai": version("onnxruntime-genai")},
    )
