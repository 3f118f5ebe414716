"""`Job`: what one HTTP request wants generated."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pellucid.params import SamplingParams


@dataclass(frozen=True)
class Job:
    """What to generate. Choice `i` of prompt `p` has index `p * params.n + i`."""

    request_id: str
    prompts: list[list[int]]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    stream: bool = True  # deltas are read; without it only the whole
    arrived: float = field(default_factory=time.perf_counter)

    @property
    def engine_ids(self) -> list[str]:
        """The engine's name of each prompt's request."""
        if len(self.prompts) == 1:
            return [self.request_id]
        return [f"{self.request_id}-{number}" for number in range(len(self.prompts))]
