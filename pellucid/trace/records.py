"""What every step did, kept in memory. `recorder.py` writes it, and what else happens, into a file."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pellucid.contract.plan import StepKind
from pellucid.errors import ConfigError


class Place(NamedTuple):
    """Where in a run something happens: after so many calls of `step` that had something to do, before the plan `step`."""

    turn: int
    step: int


@dataclass(frozen=True)
class StepRecord:
    """One step. Lists hold request ids; `waiting` and `running` are the queues as the step was planned, without those that
    ended in it.

    Where the engine plans ahead, the times of a step overlap with those of its neighbours. `idle_seconds` is what the host
    costs in any case: the time in which the core had nothing to do because this step was not there yet.
    """

    step: int
    kind: StepKind
    tkv: int = 0  # common position of a left-padded batch; 0 where nothing is padded
    waiting: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    request_outputs: list[str] = field(default_factory=list)  # got a token in this step
    finished_requests: list[str] = field(default_factory=list)  # ended in this step
    n_reserved_blocks: int = 0
    n_used_blocks: int = 0
    n_free_blocks: int = 0
    n_prefix_hits: int = 0  # requests admitted in this step that found their beginning in the cache
    tokens: dict[str, int] = field(default_factory=dict)  # request id -> tokens computed
    preempted: list[str] = field(default_factory=list)
    schedule_seconds: float = 0.0
    execute_seconds: float = 0.0  # the forward pass and sampling
    sample_seconds: float = 0.0  # the part of execute_seconds that sampling took
    output_seconds: float = 0.0
    idle_seconds: float = 0.0  # the core, between the step before and this one; 0 when nothing was asked of it
    n_draft_tokens: int = 0  # guesses that this step verified
    n_accepted_tokens: int = 0  # those that came out as sampled
    waiting_reasons: Mapping[str, str] = field(default_factory=dict)


class Trace:
    """The last `capacity` records.

    Raises:
        ConfigError: `capacity` is below 1.
    """

    def __init__(self, capacity: int = 4096) -> None:
        if capacity < 1:
            raise ConfigError(f"trace capacity is {capacity}; it must be at least 1")
        self._records: deque[StepRecord] = deque(maxlen=capacity)

    @property
    def records(self) -> list[StepRecord]:
        """The records, oldest first."""
        return list(self._records)

    @property
    def last(self) -> StepRecord | None:
        """The newest record; None before the first step."""
        return self._records[-1] if self._records else None

    def record(self, record: StepRecord) -> None:
        """Adds a step."""
        self._records.append(record)
