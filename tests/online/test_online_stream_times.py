"""Streams are real: a chunk leaves when its step ends, not when the answer does."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from utils.async_engines import owner_of
from utils.http_server import running_server

NUM_TOKENS = 24
STEP_SECONDS = 0.05  # 20 tokens a second


def test_chunks_when_steps_are_slow_then_each_comes_while_the_engine_is_at_the_next_ones(tiny_model: Path) -> None:
    with running_server(tiny_model) as server:
        executor = owner_of(server.engine).engine.executor
        execute, ends = executor.execute, list[float]()

        def slow(plan: Any) -> Any:
            time.sleep(STEP_SECONDS)
            result = execute(plan)
            ends.append(time.perf_counter())
            return result

        executor.execute = slow
        # Tokens of one printable byte each, so that every one of them shows at once.
        body = {"prompt": [40, 41, 42], "max_tokens": NUM_TOKENS, "temperature": 1, "seed": 3, "ignore_eos": True}
        body |= {"stream": True, "return_token_ids": True}
        arrivals: list[float] = []
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {") and '"token_ids":[]' not in line:
                    arrivals.append(time.perf_counter())
    assert len(arrivals) == NUM_TOKENS == len(ends)
    assert all(arrival >= end for arrival, end in zip(arrivals, ends, strict=True))
    # Before the step behind the next one ends: a machine that stands still for a moment may hold up a few.
    prompt = sum(arrival < end for arrival, end in zip(arrivals[:-2], ends[2:], strict=True))
    assert prompt >= 0.8 * (NUM_TOKENS - 2), f"only {prompt} chunks came in time"
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    assert sorted(gaps)[len(gaps) // 2] >= 0.8 * STEP_SECONDS
