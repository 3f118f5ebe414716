"""What one step does: the messages between scheduler, executor and output processing. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pellucid.outputs import TokenLogprobs
from pellucid.params import SamplingParams

StepKind = Literal["prefill", "decode", "mixed", "none"]


@dataclass(frozen=True)
class NewRequest:
    """All that the executor must know of a request before its first step, or again after a preemption."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]  # not empty after a preemption
    sampling_params: SamplingParams
    seed: int
    choice_index: int
    block_ids: tuple[int, ...]  # all blocks held before this step's `new_block_ids`
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class PlanEntry:
    """One request's part of a step: compute tokens [start, start + num_tokens)."""

    request_id: str
    start: int
    num_tokens: int
    samples: bool  # the last row is sampled from: the request has caught up with itself
    new_block_ids: tuple[int, ...] = ()
    num_cached_tokens: int = 0  # prefix hit, on the first entry after admission


@dataclass(frozen=True)
class StepPlan:
    """Entries stand in batch order. `waiting` maps each request that waits to the reason why."""

    step_id: int
    kind: StepKind
    entries: tuple[PlanEntry, ...]
    new_requests: tuple[NewRequest, ...] = ()
    preempted: tuple[str, ...] = ()
    finished: tuple[str, ...] = ()  # ended since the last plan: the executor forgets them
    waiting: dict[str, str] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(entry.num_tokens for entry in self.entries)


@dataclass(frozen=True)
class ModelRunnerOutput:
    """What the executor made of a plan. Keys are request ids; only entries with `samples` have a sampled token."""

    sampled_token_ids: dict[str, int]
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    # (start, rows for prompt positions start + 1 and on that this step's chunk computed), where asked for
    prompt_logprobs: dict[str, tuple[int, list[TokenLogprobs]]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)  # requests that failed alone, e.g. logits that are not finite
    execute_seconds: float = 0.0
    sample_seconds: float = 0.0
