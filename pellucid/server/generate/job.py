"""`Job`: what one HTTP request wants generated."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pellucid.api.request_options import RequestOptions
from pellucid.api.sampling_params import SamplingParams
from pellucid.api.structured_outputs import FIELD


@dataclass(frozen=True)
class Job:
    """What to generate. Choice `i` of prompt `p` has index `p * params.n + i`."""

    request_id: str
    prompts: list[list[int]]
    params: SamplingParams
    options: list[RequestOptions]  # of each prompt
    structure_field: str = FIELD  # what the request calls the structure of its answer
    stream: bool = True  # deltas are read; without it only the whole
    arrived: float = field(default_factory=time.perf_counter)

    @property
    def wants_states(self) -> bool:
        """True when an answer may be too large to be encoded on the event loop."""
        return any(one.hidden_states is not None or one.capture is not None for one in self.options)

    @property
    def engine_ids(self) -> list[str]:
        """The engine's name of each prompt's request."""
        if len(self.prompts) == 1:
            return [self.request_id]
        return [f"{self.request_id}-{number}" for number in range(len(self.prompts))]
