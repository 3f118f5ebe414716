"""The limits of a step and of a request, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pellucid.errors import ConfigError
from pellucid.scheduling.request import Request


@dataclass(frozen=True)
class DraftConfig:
    """Prompt lookup: at most `num_tokens` drafts a request and step, found by tails of `shortest` to `longest` tokens, while
    at most `max_num_seqs` requests run."""

    num_tokens: int
    shortest: int
    longest: int
    max_num_seqs: int


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step.

    `max_num_seqs`: requests running at once. `max_num_batched_tokens`: tokens computed in one step. `max_model_len`:
    prompt + outputs of one request. `max_prefill_chunk`: most tokens of one prompt in one step (policy `mixed` only;
    None: the budget). `async_scheduling`: plans may count on tokens that plans in flight sample. `drafts`: None for none.
    `max_batch_tkv_limit`: see `PaddedBatch`.

    Raises:
        ConfigError: a limit is below 1.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    policy: Literal["mixed", "prefill_first", "padded"] = "mixed"
    max_prefill_chunk: int | None = None
    async_scheduling: bool = False
    drafts: DraftConfig | None = None
    max_batch_tkv_limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")

    def is_at_full_length(self, request: Request, more: int = 0) -> bool:
        """True when no output can follow those that the request has and `more`."""
        full = len(request.output_token_ids) + more >= request.core.max_tokens
        return full or len(request.token_ids) + more >= self.max_model_len
