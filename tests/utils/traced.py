"""Recorded runs for tests: a server-like load with arrivals, cancels and preemptions."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.async_engines import start_engine

from pellucid.api.request_options import RequestOptions
from pellucid.api.sampling_params import SamplingParams
from pellucid.service.async_engine import AsyncLLMEngine


def some_params(random_: random.Random, index: int) -> SamplingParams:
    """Greedy or drawn without a seed of its own, some with more than one choice, some with a stop string."""
    return SamplingParams(
        n=2 if index % 11 == 0 else 1,
        max_tokens=random_.randrange(1, 30),
        temperature=random_.choice([0, 0.9]),
        stop=("ab",) if index % 5 == 0 else (),
        logit_bias={7: 1.5} if index % 13 == 0 else {},
    )


async def record(path: Path, model: Path, kind: str, num_requests: int, **settings: Any) -> None:
    """Traces an engine under random arrivals; every sixth request is cancelled, and the prefix cache is reset on the way."""
    options = {"num_blocks": 60, "trace_path": str(path), "trace_logits": True, **settings}
    engine = start_engine(kind, model, **options)
    try:
        await _serve(engine, range(num_requests // 2))
        assert await engine.reset_prefix_cache()
        await _serve(engine, range(num_requests // 2, num_requests))
    finally:
        engine.close()


async def _serve(engine: AsyncLLMEngine, numbers: range) -> None:
    random_ = random.Random(numbers.start)
    shared = [random_.randrange(3, 290) for _ in range(30)]

    async def one(index: int) -> None:
        await asyncio.sleep(
            random_.random() * 0.02
        )  # close together, so that they stand in each other's way on any machine
        own = [random_.randrange(3, 290) for _ in range(random_.randrange(1, 50))]
        leaves, params = index % 6 == 0, some_params(random_, index)
        request_id = await engine.submit(
            (shared[: random_.randrange(30)] if index % 3 == 0 else []) + own,
            replace(params, max_tokens=150, ignore_eos=True, stop=()) if leaves else params,
            request_id=f"r{index}",
            options=RequestOptions(random_.choice([0, 0, 1]), "a secret" if index % 4 == 0 else None),
        )
        if leaves:
            await asyncio.sleep(random_.random() * 0.02)
            await engine.cancel(request_id)
        else:
            await engine.wait(request_id)

    await asyncio.gather(*[one(index) for index in numbers])
