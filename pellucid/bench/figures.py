"""The arithmetic of benchmarks: percentiles, and where the time of steps went. Pure functions on numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pellucid.trace.records import StepRecord


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks, as numpy's default.

    Raises:
        ValueError: no values, or `percent` outside of 0..100.
    """
    if not values:
        raise ValueError("there are no values to take a percentile of")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent is {percent}; it must be from 0 to 100")
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass(frozen=True)
class Spread:
    """How values lie. Same unit as the values."""

    count: int
    mean: float
    least: float
    median: float
    p90: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError when there are no values."""
        if not values:
            raise ValueError("there are no values to describe")
        percentiles = [percentile(values, percent) for percent in (0, 50, 90, 99, 100)]
        return cls(len(values), math.fsum(values) / len(values), *percentiles)


@dataclass(frozen=True)
class StepShares:
    """Seconds of a run's steps by what they were spent on; `other` is what the records do not account for."""

    steps: int
    wall: float
    schedule: float
    execute: float  # the core's forward pass, without sampling
    sample: float
    output: float

    @classmethod
    def of(cls, records: Sequence[StepRecord], wall: float) -> StepShares:
        """Sums over the records of a run that took `wall` seconds.

        Raises:
            ValueError: `wall` is not positive.
        """
        if wall <= 0:
            raise ValueError(f"wall is {wall}; a run takes more than 0 seconds")
        sample = math.fsum(record.sample_seconds for record in records)
        return cls(
            steps=len(records),
            wall=wall,
            schedule=math.fsum(record.schedule_seconds for record in records),
            execute=math.fsum(record.execute_seconds for record in records) - sample,
            sample=sample,
            output=math.fsum(record.output_seconds for record in records),
        )

    @property
    def other(self) -> float:
        """Time between steps; negative where parts of steps overlap."""
        return self.wall - self.schedule - self.execute - self.sample - self.output

    @property
    def host_share(self) -> float:
        """The part of the time in which the core computes no forward pass, 0..1."""
        return min(1.0, max(0.0, 1 - self.execute / self.wall))

    def as_dict(self) -> dict[str, float]:
        """Seconds by name, and the host's share."""
        names = ("steps", "wall", "schedule", "execute", "sample", "output", "other", "host_share")
        return {name: float(getattr(self, name)) for name in names}


def spread_lengths(length: int, ratio: float, count: int, seed: int) -> list[int]:
    """`count` lengths drawn evenly from length * (1 - ratio) .. length * (1 + ratio), at least 1. The same for the same seed.

    Raises:
        ValueError: `ratio` is not in [0, 1).
    """
    import random

    if not 0 <= ratio < 1:
        raise ValueError(f"random_range_ratio is {ratio}; it must be at least 0 and below 1")
    draw = random.Random(seed)
    low, high = max(1, math.floor(length * (1 - ratio))), max(1, math.ceil(length * (1 + ratio)))
    return [draw.randint(low, high) if ratio else length for _ in range(count)]
