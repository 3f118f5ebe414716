"""What one step does: the messages between scheduler, executor and output processing. Plain data, no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pellucid.api.hidden_states import HiddenStatesParams, SteeringParams
from pellucid.api.outputs import TokenLogprobs
from pellucid.api.sampling_params import SamplingParams

StepKind = Literal["prefill", "decode", "mixed", "none"]

# Why a request waits that is not the head of the queue.
WAIT_BEHIND_HEAD = "head of the queue waits"


@dataclass(frozen=True)
class RequestSampling:
    """What sampling alone must know of a request, beside its tokens. A structure stands in `params` by its source: whoever samples
    finds its grammar, or compiles it."""

    params: SamplingParams
    seed: int
    choice_index: int = 0
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class NewRequest:
    """All that the executor must know of a request before its first step, or again after a preemption."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]  # not empty after a preemption
    block_ids: tuple[int, ...]  # all blocks held before this step's `new_block_ids`
    sampling: RequestSampling
    hidden_states: HiddenStatesParams | None = None
    capture: tuple[str, ...] = ()  # names of activations
    steering: SteeringParams | None = None


class PlanEntry(NamedTuple):
    """One request's part of a step: compute tokens [start, start + num_tokens).

    A token that a plan in flight samples is known to the executor alone; it stands for the last token that is no draft.
    """

    request_id: str
    start: int
    num_tokens: int
    samples: bool  # the last row is sampled from: the request has caught up with itself
    new_block_ids: tuple[int, ...] = ()
    num_cached_tokens: int = 0  # prefix hit, on the first entry after admission
    draft_token_ids: tuple[int, ...] = ()  # guesses, the last of `num_tokens`: each is sampled for and may be refused


class WaitingReasons(Mapping[str, str]):
    """Each waiting request, in queue order, with the reason why it waits. The head has its own, the others wait for it."""

    __slots__ = ("_head_reason", "_request_ids")

    def __init__(self, request_ids: tuple[str, ...] = (), head_reason: str = WAIT_BEHIND_HEAD) -> None:
        self._request_ids, self._head_reason = request_ids, head_reason

    def __getitem__(self, request_id: str) -> str:
        if self._request_ids and request_id == self._request_ids[0]:
            return self._head_reason
        if request_id in self._request_ids:
            return WAIT_BEHIND_HEAD
        raise KeyError(request_id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._request_ids)

    def __len__(self) -> int:
        return len(self._request_ids)

    def __repr__(self) -> str:
        return repr(self.as_dict())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self.as_dict() == dict(other)

    __hash__ = None  # type: ignore[assignment]  # equal to dicts, which have none

    def as_dict(self) -> dict[str, str]:
        """The same as a dict."""
        reasons = dict.fromkeys(self._request_ids, WAIT_BEHIND_HEAD)
        if self._request_ids:
            reasons[self._request_ids[0]] = self._head_reason
        return reasons


@dataclass(frozen=True)
class StepPlan:
    """Entries stand in batch order. `waiting` maps each request that waits to the reason why."""

    step_id: int
    kind: StepKind
    entries: tuple[PlanEntry, ...]
    new_requests: tuple[NewRequest, ...] = ()
    preempted: tuple[str, ...] = ()
    finished: tuple[str, ...] = ()  # ended since the last plan: the executor forgets them
    waiting: Mapping[str, str] = field(default_factory=WaitingReasons)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(entry.num_tokens for entry in self.entries)

    @property
    def num_draft_tokens(self) -> int:
        """Those of them that are drafts."""
        return sum(len(entry.draft_token_ids) for entry in self.entries)


class AcceptedDraft(NamedTuple):
    """A draft that came out as sampled: as good as a sampled token."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class CapturedRows(NamedTuple):
    """Activations [n, width] by name, of positions `start` and on."""

    start: int
    values: dict[str, npt.NDArray[np.float32]]


class _AsTensors:
    """A field of float32 arrays by name that reads as torch tensors on the same memory, where torch is installed."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        arrays = None if instance is None else vars(instance)[self._name]
        if arrays is None or importlib.util.find_spec("torch") is None:
            return arrays
        import torch

        return {name: torch.as_tensor(rows) for name, rows in arrays.items()}

    def __set__(self, instance: Any, value: Mapping[str, Any] | None) -> None:
        vars(instance)[self._name] = None if value is None else {name: np.asarray(rows) for name, rows in value.items()}


@dataclass(frozen=True)
class ModelRunnerOutput:
    """What the executor made of a plan. Keys are request ids; only entries with `samples` have a sampled token."""

    sampled_token_ids: dict[str, int]
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    # (start, rows for prompt positions start + 1 and on that this step's chunk computed), where asked for
    prompt_logprobs: dict[str, tuple[int, list[TokenLogprobs]]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)  # requests that failed alone, e.g. logits that are not finite
    # the drafts of a request that stand, in order, before its sampled token; no key where none does
    accepted_drafts: dict[str, list[AcceptedDraft]] = field(default_factory=dict)
    # rows [n, layers, D] and their n positions, ascending, of requests that want some of what this step computed; None: nobody does.
    # Given and kept as numpy arrays (`hidden_rows`), read as torch tensors.
    last_hidden_states: dict[str, Any] | None = _AsTensors()  # type: ignore[assignment]
    hidden_states_positions: dict[str, list[int]] | None = None
    captured: dict[str, CapturedRows] = field(default_factory=dict)
    # where they are traced: of the rows that were sampled from, one for each accepted draft and for the token behind them
    logits_checksums: dict[str, list[int]] = field(default_factory=dict)
    execute_seconds: float = 0.0
    sample_seconds: float = 0.0
    idle_seconds: float = 0.0  # between the end of the step before and the beginning of this one's forward pass

    @property
    def hidden_rows(self) -> dict[str, npt.NDArray[np.float32]]:
        """`last_hidden_states` as the arrays that they are, without torch; empty where nobody wants any."""
        return vars(self)["last_hidden_states"] or {}
