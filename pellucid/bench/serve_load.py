"""When requests are sent, and sending them. Arrivals are drawn beforehand, so that the same trace can be played to another server."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np

from pellucid.bench.serve_client import Answer
from pellucid.errors import InvalidRequestError

RAMPS = ("linear", "exponential")


@dataclass(frozen=True)
class Arrivals:
    """Requests a second. `burstiness` 1: a Poisson process; below it burstier, above it more even (a gamma distribution's shape)."""

    request_rate: float = math.inf
    burstiness: float = 1.0
    ramp_up_strategy: str | None = None  # one of RAMPS; then the rate goes from start to end over the requests
    ramp_up_start_rps: float | None = None
    ramp_up_end_rps: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InvalidRequestError when a value is out of range or does not fit the others."""
        for name in ("request_rate", "burstiness"):
            value = getattr(self, name)
            if not value > 0:
                raise InvalidRequestError(name, f"is {value}", limit="it must be above 0")
        ends = (self.ramp_up_start_rps, self.ramp_up_end_rps)
        if self.ramp_up_strategy is None:
            if ends != (None, None):
                raise InvalidRequestError(None, "ramp_up_start_rps and ramp_up_end_rps need ramp_up_strategy")
            return
        if self.ramp_up_strategy not in RAMPS:
            raise InvalidRequestError(
                None, f"ramp_up_strategy is {self.ramp_up_strategy!r}", limit=f"it takes {' or '.join(RAMPS)}"
            )
        if math.isfinite(self.request_rate):
            raise InvalidRequestError(
                None, f"request_rate is {self.request_rate}", limit="with ramp_up_strategy it is not given"
            )
        for name in ("ramp_up_start_rps", "ramp_up_end_rps"):
            value = getattr(self, name)
            if value is None or not 0 < value < math.inf:
                raise InvalidRequestError(name, f"is {value}", limit="with ramp_up_strategy it must be above 0")

    def rates(self, count: int) -> list[float]:
        """Requests a second before each request."""
        start, end = self.ramp_up_start_rps, self.ramp_up_end_rps
        if self.ramp_up_strategy is None or start is None or end is None:
            return [self.request_rate] * count
        parts = [i / max(count - 1, 1) for i in range(count)]
        if self.ramp_up_strategy == "linear":
            return [start + (end - start) * part for part in parts]
        return [start * (end / start) ** part for part in parts]

    def times(self, count: int) -> list[float]:
        """Seconds since the beginning at which each of `count` requests is sent, ascending.

        At a constant rate the gaps are scaled so that the last one is sent at count / rate, whatever was drawn: else two seeds would
        ask for two rates.
        """
        rates = self.rates(count)
        if not count or math.isinf(rates[0]):
            return [0.0] * count
        draw = np.random.default_rng(self.seed)
        even = math.isinf(self.burstiness)
        gaps = np.array([1 / r if even else draw.gamma(self.burstiness, 1 / (r * self.burstiness)) for r in rates])
        times = np.cumsum(gaps)
        if self.ramp_up_strategy is None:
            times *= count / self.request_rate / times[-1]
        return [float(at) for at in times]


@dataclass
class LoadRun:
    """What came of a load: an answer for each request that ended, by its number."""

    began: float = 0.0  # time.perf_counter()
    seconds: float = 0.0
    answers: dict[int, Answer] = field(default_factory=dict)
    was_interrupted: bool = False


Ask = Callable[[int], Awaitable[Answer]]  # sends the request of this number


async def run_load(
    ask: Ask,
    times: Sequence[float],
    *,
    max_concurrency: int | None = None,
    on_answer: Callable[[Answer], None] = lambda answer: None,
    stop: asyncio.Event | None = None,
) -> LoadRun:
    """Sends request i at `times[i]`, or later where `max_concurrency` are open. Ends early, with what it has, when `stop` is set."""
    run = LoadRun(began=time.perf_counter())
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()

    async def one(number: int) -> None:
        await asyncio.sleep(times[number] - (time.perf_counter() - run.began))
        async with gate:
            answer = await ask(number)
        run.answers[number] = answer
        on_answer(answer)

    async def all_sent() -> None:
        await asyncio.gather(*(one(number) for number in range(len(times))))

    async def stopped() -> None:
        await (stop or asyncio.Event()).wait()

    load, watch = asyncio.create_task(all_sent()), asyncio.create_task(stopped())
    try:
        await asyncio.wait({load, watch}, return_when=asyncio.FIRST_COMPLETED)
        run.was_interrupted = not load.done()
        if load.done():
            load.result()
    finally:
        load.cancel()
        watch.cancel()
        await asyncio.gather(load, watch, return_exceptions=True)
        run.seconds = time.perf_counter() - run.began
    return run
