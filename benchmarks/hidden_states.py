"""What hidden states and captured activations cost: output tokens a second of a batch, with and without, in turns.

    python benchmarks/hidden_states.py [--model M] [--batch 32] [--output-len 64] [--rounds 7] [--quantization int8] [--http]

Offline, "hidden_states off" is a second engine that was opened without them. With --http the same batch is asked of a server over
concurrent connections, plain and with every row in base64. `peak_mb` is the most resident memory while the case ran, in all rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from serve_compare import Place, Server, free_port, own_environment, running

from pellucid import LLM, SamplingParams
from pellucid.bench.serve_client import COMPLETIONS, OpenAIClient

CASES: dict[str, dict[str, Any]] = {
    "nobody asks": {},
    "last row": {"return_hidden_states": True},
    "every row of the last layer": {"return_hidden_states": True, "hidden_states_for_tokens": "all"},
    "three layers captured": {"capture": ["layers.5.mlp", "layers.15.mlp", "layers.25.mlp"]},
}
HTTP_CASES: dict[str, dict[str, Any]] = {
    "over HTTP": {},
    "over HTTP, every row in base64": {**CASES["every row of the last layer"], "hidden_states_format": "base64"},
}
PROMPT_LEN = 128
MAX_MODEL_LEN = 512


class Batch:
    """The work of every case."""

    def __init__(self, size: int, output_len: int) -> None:
        self.size, self.output_len = size, output_len
        self.prompts = [[1000 + 7 * row + i for i in range(PROMPT_LEN)] for row in range(size)]

    def asked(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a case."""
        every = list(range(PROMPT_LEN + self.output_len - 1))
        return {name: every if value == "all" else value for name, value in case.items()}

    def offline(self, llm: LLM, case: Mapping[str, Any]) -> None:
        """Through `LLM.generate`."""
        params = SamplingParams(temperature=0, max_tokens=self.output_len, ignore_eos=True)
        llm.generate(self.prompts, params, use_tqdm=False, **self.asked(case))

    def online(self, url: str, case: Mapping[str, Any]) -> None:
        """Through a server."""
        asyncio.run(self._online(url, case))

    async def _online(self, url: str, case: Mapping[str, Any]) -> None:
        client = OpenAIClient(url)
        body = {"max_tokens": self.output_len, "temperature": 0, "ignore_eos": True, **self.asked(case)}
        answers = await asyncio.gather(
            *[client.whole(COMPLETIONS, {**body, "prompt": prompt}) for prompt in self.prompts]
        )
        await client.close()
        for answer in answers:
            if answer.error:
                raise SystemExit(answer.error)
            if case and "hidden_states" not in answer.body["choices"][0]:
                raise SystemExit("an answer has no hidden states")


def peak_mb(pid: str, *, reset: bool) -> float:
    """The most resident memory of a process since the last reset, by Linux' account of it."""
    if reset:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1000


def measure(cases: Mapping[str, Callable[[], None]], pid: str, rounds: int, tokens: int) -> None:
    """Runs all cases in every round, in another order each; prints medians, of which `of_plain` is of the share of the first
    case's rate in the same round."""
    rates: dict[str, list[float]] = {name: [] for name in cases}
    peaks: dict[str, float] = dict.fromkeys(cases, 0.0)
    for turn in range(-1, rounds):
        for name in sorted(cases, key=lambda name: hash((turn, list(cases).index(name)))):
            peak_mb(pid, reset=True)
            began = time.perf_counter()
            cases[name]()
            took = time.perf_counter() - began
            if turn >= 0:
                rates[name].append(tokens / took)
                peaks[name] = max(peaks[name], peak_mb(pid, reset=False))
    plain = next(iter(rates.values()))
    for name, found in rates.items():
        median = statistics.median(found)
        share = statistics.median(rate / beside for rate, beside in zip(found, plain, strict=True))
        print(json.dumps({"case": name, "tokens_s": round(median), "least": round(min(found)), "most": round(max(found)),
                          "of_plain": round(share, 3), "peak_mb": round(peaks[name])}), flush=True)  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quantization")
    parser.add_argument("--http", action="store_true", help="over HTTP in place of offline")
    options = parser.parse_args()
    batch = Batch(options.batch, options.output_len)
    engine: dict[str, Any] = {
        "max_num_seqs": options.batch,
        "max_model_len": MAX_MODEL_LEN,
        "num_blocks": options.batch * MAX_MODEL_LEN // 16,
        "quantization": options.quantization,
    }
    with ExitStack() as stack:
        cases: dict[str, Callable[[], None]] = {}
        pid = "self"
        if options.http:
            given = [f"--{name.replace('_', '-')}={value}" for name, value in engine.items() if value is not None]
            start = [sys.executable, "-m", "pellucid.cli", "serve", options.model, "--no-enable-prefix-caching", *given]
            server = Server(lambda place: [*start, "--port", str(place.port), "--no-log-requests"], own_environment)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            place = Place(folder, options.model, free_port(), 2)
            found = stack.enter_context(running(server, place, folder / "log"))
            pid = str(found.process.pid)
            for name, case in HTTP_CASES.items():
                cases[name] = lambda case=case: batch.online(found.url, case)  # type: ignore[misc]
        else:
            engine["enable_prefix_caching"] = False
            llm = stack.enter_context(LLM(options.model, **engine))
            without = stack.enter_context(LLM(options.model, hidden_states=False, **engine))
            for name, case in CASES.items():
                cases[name] = lambda case=case: batch.offline(llm, case)  # type: ignore[misc]
            cases["hidden_states off"] = lambda: batch.offline(without, {})
        measure(cases, pid, options.rounds, options.batch * options.output_len)


if __name__ == "__main__":
    main()
