"""Latency, throughput and the batch curve of one `LLM`. Each gives plain data that can be written as JSON and shown as a table."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from pellucid.api.sampling_params import SamplingParams
from pellucid.bench.figures import StepShares, spread_lengths
from pellucid.bench.limits import Limits, measure_limits, step_cost
from pellucid.bench.workload import Measured, Workload, run, spread_of
from pellucid.errors import InvalidRequestError
from pellucid.executor.uniproc import UniProcExecutor
from pellucid.llm import LLM

Report = dict[str, Any]
Progress = Callable[[str], None]


def positive(name: str, value: int, least: int = 1) -> None:
    """Raises InvalidRequestError when an option is too small."""
    if value < least:
        raise InvalidRequestError(name, f"is {value}", limit=f"it must be at least {least}")


def _quiet(text: str) -> None:
    del text


def latency(
    llm: LLM,
    *,
    input_len: int = 32,
    output_len: int = 128,
    batch_size: int = 8,
    num_iters: int = 10,
    num_iters_warmup: int = 2,
    seed: int = 0,
    progress: Progress = _quiet,
) -> Report:
    """One batch of equal requests again and again: how long a whole batch takes, and its tokens.

    Raises:
        InvalidRequestError: an option is out of range, or the requests do not fit the model.
    """
    positive("batch_size", batch_size)
    positive("num_iters", num_iters)
    positive("num_iters_warmup", num_iters_warmup, 0)
    runs: list[Measured] = []
    for turn in range(num_iters_warmup + num_iters):
        # Other prompts each time: a cached prompt would not be computed.
        workload = _equal(llm, batch_size, input_len, output_len, seed + turn)
        measured = run(llm, workload)
        if turn >= num_iters_warmup:
            runs.append(measured)
            progress(f"iteration {turn - num_iters_warmup + 1} of {num_iters}: {measured.seconds:.3f} s")
    seconds = sum(one.seconds for one in runs)
    return {
        "kind": "latency",
        "input_len": input_len,
        "output_len": output_len,
        "batch_size": batch_size,
        "latency_seconds": spread_of([one.seconds for one in runs]),
        **_token_times(runs),
        "output_tokens_per_second": sum(one.output_tokens for one in runs) / seconds,
        "steps": _shares(runs),
    }


def throughput(
    llm: LLM,
    *,
    num_prompts: int = 64,
    input_len: int = 128,
    output_len: int = 128,
    random_range_ratio: float = 0.0,
    seed: int = 0,
) -> Report:
    """All requests at once; tokens a second until the last one ends. One short request goes before, uncounted.

    Raises:
        InvalidRequestError: an option is out of range, or a request does not fit the model.
    """
    positive("num_prompts", num_prompts)
    if not 0 <= random_range_ratio < 1:
        raise InvalidRequestError(
            None, f"random_range_ratio is {random_range_ratio}", limit="it must be at least 0 and below 1"
        )
    inputs = spread_lengths(input_len, random_range_ratio, num_prompts, seed)
    outputs = spread_lengths(output_len, random_range_ratio, num_prompts, seed + 1)
    workload = Workload.random(inputs, outputs, llm.engine.vocab_size, seed)
    workload.check(llm.engine.max_model_len)
    run(llm, _equal(llm, 1, min(input_len, 16), 2, seed - 1))
    measured = run(llm, workload)
    return {
        "kind": "throughput",
        "num_prompts": num_prompts,
        "prompt_tokens": measured.prompt_tokens,
        "output_tokens": measured.output_tokens,
        "seconds": measured.seconds,
        "requests_per_second": num_prompts / measured.seconds,
        "output_tokens_per_second": measured.output_tokens / measured.seconds,
        "total_tokens_per_second": (measured.prompt_tokens + measured.output_tokens) / measured.seconds,
        **_token_times([measured]),
        "steps": _shares([measured]),
    }


def batch_curve(
    llm: LLM,
    *,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    input_len: int = 128,
    num_steps: int = 32,
    seed: int = 0,
    limits: Limits | None = None,
    progress: Progress = _quiet,
) -> Report:
    """Seconds of a decode step by the number of sequences, beside the least that the machine allows.

    `limits` are measured when None. Each batch size takes `num_steps` decode steps after one that is not counted.

    Raises:
        InvalidRequestError: a batch size is above max_num_seqs, or the requests do not fit the model.
    """
    positive("num_steps", num_steps)
    if not batch_sizes:
        raise InvalidRequestError("batch_sizes", "is empty", limit="it needs at least one size")
    for batch in batch_sizes:
        positive("batch_sizes", batch)
    most = llm.config.max_num_seqs
    if max(batch_sizes) > most:
        raise InvalidRequestError("batch_sizes", f"has {max(batch_sizes)}", limit=f"max_num_seqs is {most}")
    limits = limits or measure_limits(llm.config.num_threads, llm.config.isa)
    executor = llm.engine.executor
    cost = None
    if isinstance(executor, UniProcExecutor):  # what the machine allows is known of a program that runs here
        cost = step_cost(executor.model, executor.kv_cache.bytes_per_token)
    points = []
    for turn, batch in enumerate(batch_sizes):
        prompts = _equal(llm, batch, input_len, num_steps, seed + turn).prompts
        seconds, context = decode_steps(llm, prompts, num_steps)
        middle = statistics.median(seconds)
        best = None if cost is None else cost.seconds(batch, context, limits)
        points.append(
            {
                "batch_size": batch,
                "context": context,
                "step_seconds": spread_of(seconds),
                "tokens_per_second": batch / middle,
                "limit_seconds": best,
                "limit_tokens_per_second": None if best is None else batch / best,
                "reached": None if best is None else best / middle,
            }
        )
        progress(f"{batch} sequences: {1000 * middle:.2f} ms a step")
    return {"kind": "batch-curve", "input_len": input_len, "limits": limits.as_dict(), "points": points}


def decode_steps(llm: LLM, prompts: Sequence[Sequence[int]], num_steps: int) -> tuple[list[float], float]:
    """Seconds of `num_steps` steps in which every prompt decodes one token, and the mean number of positions of a sequence then.

    Prompts that are computed first decode on while others still wait, and the first step with all of them is not counted.

    Raises:
        InvalidRequestError: a request does not fit the model, or not all of them can run at once.
    """
    count, total = len(prompts), sum(map(len, prompts))
    budget = llm.config.max_num_batched_tokens - count
    if budget < 1:
        raise InvalidRequestError(
            None, f"{count} sequences are too many: max_num_batched_tokens is {llm.config.max_num_batched_tokens}"
        )
    output_len = num_steps + 2 + math.ceil(total / budget)
    Workload([list(prompt) for prompt in prompts], [output_len] * count).check(llm.engine.max_model_len)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=output_len)
    ids = [llm.client.submit(prompt, params) for prompt in prompts]
    found: list[float] = []
    computed, contexts = 0, 0.0
    while llm.client.has_unfinished and len(found) <= num_steps:
        began = time.perf_counter()
        llm.client.step()
        seconds = time.perf_counter() - began
        record = llm.engine.trace.last
        computed += 0 if record is None else sum(record.tokens.values())
        if record is not None and record.kind == "decode" and len(record.tokens) == count:
            found.append(seconds)
            contexts += computed / count
    for request_id in ids:
        llm.client.cancel(request_id)
    while llm.client.has_unfinished:
        llm.client.step()
    for request_id in ids:
        llm.client.release(request_id)
    if len(found) <= num_steps:
        tokens = llm.engine.block_manager.num_free_blocks * llm.config.block_size
        raise InvalidRequestError(
            None,
            f"{count} requests of {len(prompts[0]):,} + {output_len:,} tokens did not run at once: the cache holds {tokens:,} tokens",
        )
    return found[1:], contexts / len(found)


def _equal(llm: LLM, count: int, input_len: int, output_len: int, seed: int) -> Workload:
    return Workload.random([input_len] * count, [output_len] * count, llm.engine.vocab_size, seed)


def _token_times(runs: Sequence[Measured]) -> Report:
    return {
        "time_to_first_token_seconds": spread_of([value for one in runs for value in one.first_token]),
        "time_per_output_token_seconds": spread_of([value for one in runs for value in one.between_tokens]),
        "step_seconds": spread_of([value for one in runs for value in one.step_seconds]),
    }


def _shares(runs: Sequence[Measured]) -> dict[str, float]:
    records = [record for one in runs for record in one.records]
    return StepShares.of(records, sum(one.recorded_seconds for one in runs)).as_dict()
