"""What the examples share: running prompts, printing texts, and the comparison with transformers."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from pellucid import LLM, RequestOutput, SamplingParams
from pellucid.config import DEFAULT_MODEL, POLICIES
from pellucid.errors import PellucidError
from pellucid.testing import compare_outputs, follow_with_transformers, load_transformers

DIFFERENT, REFUSED = 1, 2  # exit statuses


def add_engine_options(parser: argparse.ArgumentParser, *, max_model_len: int) -> None:
    """Options that both examples have."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder, .gguf file, hub id or packaged name")
    parser.add_argument("--max-model-len", type=int, default=max_model_len, help="longest prompt + output")
    parser.add_argument("--max-num-seqs", type=int, default=2, help="most requests that run at once")
    parser.add_argument("--tp", type=int, default=1, help="tensor_parallel_size")
    parser.add_argument("--policy", default="mixed", help=f"one of: {', '.join(POLICIES)}")
    parser.add_argument("--dtype", default="float32", help="of the engine and of the reference: float32 or bfloat16")
    parser.add_argument("--num-threads", type=int, default=0, help="threads of the engine; 0: one for each core")
    parser.add_argument("--compare-with-cpu", action="store_true", help="compare with transformers on the CPU")
    parser.add_argument("--rtol", type=float, default=1e-3, help="relative tolerance of logprobs")
    parser.add_argument("--atol", type=float, default=1e-3, help="absolute tolerance of logprobs")


def load(options: argparse.Namespace, **settings: Any) -> LLM:
    """The engine that the options describe; what it refuses ends the program with the reason."""
    try:
        return LLM(
            options.model,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            tensor_parallel_size=options.tp,
            policy=options.policy,
            dtype=options.dtype,
            num_threads=options.num_threads,
            **settings,
        )
    except PellucidError as error:
        sys.exit(refused(error))


def refused(error: object) -> int:
    """Says why nothing runs; gives the exit status."""
    print(f"error: {error}", file=sys.stderr)
    return REFUSED


def run(llm: LLM, prompts: Sequence[list[int]], max_tokens: Sequence[int]) -> list[RequestOutput]:
    """Greedy outputs of exactly these lengths, and a line on the time that they took."""
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=5) for count in max_tokens]
    began = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds, steps = time.perf_counter() - began, len(llm.engine.trace.records)
    num_tokens = sum(max_tokens)
    print(
        f"{len(prompts)} prompts, {num_tokens} tokens, {steps} steps in {seconds:.2f} s: {num_tokens / seconds:.1f} tokens/s"
    )
    return outputs


def compare(options: argparse.Namespace, llm: LLM, outputs: Sequence[RequestOutput]) -> int:
    """Compares with transformers, prints the outcome, gives the exit status."""
    tokenizer = llm.engine.tokenizer
    prompts = [output.prompt_token_ids for output in outputs]
    began = time.perf_counter()
    module = load_transformers(options.model, options.dtype)
    references = follow_with_transformers(module, prompts, [output["token_ids"] for output in outputs])
    print(f"transformers took {time.perf_counter() - began:.2f} s")
    decode = None if tokenizer is None else lambda token_id: tokenizer.decode([token_id])
    comparison = compare_outputs(outputs, references, rtol=options.rtol, atol=options.atol, decode=decode)
    print(comparison.table())
    if not comparison.all_match:
        different = [str(row.index) for row in comparison.rows if not row.matches]
        print(f"Results differ: prompt {', '.join(different)}")
        return DIFFERENT
    print("All results match!")
    return 0
