"""What hidden states and captured activations cost: output tokens a second of a batch, with and without, in turns.

python benchmarks/hidden_states.py [--model M] [--batch 32] [--output-len 64] [--rounds 7] [--quantization int8]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from pellucid import LLM, SamplingParams

CASES: dict[str, dict[str, Any]] = {
    "nobody asks": {},
    "last row": {"return_hidden_states": True},
    "every row of the last layer": {"return_hidden_states": True, "hidden_states_for_tokens": "all"},
    "three layers captured": {"capture": ["layers.5.mlp", "layers.15.mlp", "layers.25.mlp"]},
}
PROMPT_LEN = 128


def seconds(llm: LLM, case: dict[str, Any], batch: int, output_len: int) -> float:
    """Of one batch."""
    asked = dict(case)
    if asked.get("hidden_states_for_tokens") == "all":
        asked["hidden_states_for_tokens"] = list(range(PROMPT_LEN + output_len - 1))
    prompts = [[1000 + 7 * row + i for i in range(PROMPT_LEN)] for row in range(batch)]
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    began = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False, **asked)
    return time.perf_counter() - began


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quantization")
    options = parser.parse_args()
    with LLM(
        options.model,
        quantization=options.quantization,
        max_num_seqs=options.batch,
        max_model_len=512,
        enable_prefix_caching=False,
        hidden_states_max_mb=1000,
    ) as llm:
        found: dict[str, list[float]] = {name: [] for name in CASES}
        for turn in range(-1, options.rounds):
            for name in sorted(CASES, key=lambda name: hash((turn, list(CASES).index(name)))):
                took = seconds(llm, CASES[name], options.batch, options.output_len)
                if turn >= 0:
                    found[name].append(options.batch * options.output_len / took)
    plain = statistics.median(found["nobody asks"])
    for name, rates in found.items():
        median = statistics.median(rates)
        print(json.dumps({"case": name, "tokens_s": round(median), "least": round(min(rates)), "most": round(max(rates)),
                          "of_plain": round(median / plain, 3)}))  # fmt: skip


if __name__ == "__main__":
    main()
