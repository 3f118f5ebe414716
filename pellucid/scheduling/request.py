"""A request: what the engine is asked (`EngineCoreRequest`) and how far it has got (`Request`)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum

from pellucid.api.hidden_states import HiddenStatesParams, SteeringParams, WantedRows
from pellucid.api.outputs import FinishReason
from pellucid.api.sampling_params import MAX_TOKEN_COUNT, SamplingParams
from pellucid.errors import InvalidRequestError, InvariantError
from pellucid.scheduling.speculative import PromptLookup


@dataclass(frozen=True)
class EngineCoreRequest:
    """One choice of one request, resolved: tokenised, its seed drawn, its `max_tokens` known.

    Choices of one request with n > 1 share a `group_id` and differ in `choice_index`. A lower `priority` value is more
    important. `cache_salt` and `adapter` part the prefix cache: only requests with equal ones share blocks.
    Hidden states are asked for by `hidden_states`, or by the three fields that say the same in the words of a request.
    `arrival_time` (seconds of the engine's clock) is for metrics alone: the order of arrival is the order of `RequestScheduler.add`.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams
    seed: int = 0
    max_tokens: int = None  # type: ignore[assignment]  # None: as the sampling parameters say
    choice_index: int = 0
    group_id: str | None = None
    priority: int = 0
    cache_salt: str | None = None
    arrival_time: float = 0.0
    eos_token_ids: tuple[int, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    adapter: str | None = None
    hidden_states: HiddenStatesParams | None = None
    capture: tuple[str, ...] = ()  # names of activations, resolved
    steering: SteeringParams | None = None

    return_hidden_states: bool = False
    hidden_states_for_tokens: list[int] | None = None  # positions; None: the last row that exists
    hidden_states_layers: list[int] | None = None  # None: what the head reads

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        put("prompt_token_ids", tuple(self.prompt_token_ids))
        if self.max_tokens is None:
            put("max_tokens", self.sampling_params.max_tokens or MAX_TOKEN_COUNT)
        hidden = self.hidden_states
        asked = (self.return_hidden_states, self.hidden_states_for_tokens, self.hidden_states_layers)
        if hidden is None:
            put("hidden_states", HiddenStatesParams.from_request(*asked))
            return
        positions = None if hidden.positions is None else list(hidden.positions)
        same = (True, positions, None if hidden.layers is None else list(hidden.layers))
        if asked not in ((False, None, None), same):
            raise InvalidRequestError("hidden_states", f"is {hidden}", limit=f"the three fields say {asked}")
        for name, value in zip(
            ("return_hidden_states", "hidden_states_for_tokens", "hidden_states_layers"), same, strict=True
        ):
            put(name, value)


def first_wanted_row(core: EngineCoreRequest) -> int | None:
    """The first position of which a caller may be handed something, so that it has to be computed; None: there is none."""
    if core.capture:
        return 0
    hidden = core.hidden_states
    return None if hidden is None else WantedRows(hidden, len(core.prompt_token_ids)).first


class RequestStatus(str, Enum):
    """Where a request stands; the values are what callers see."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED_STOPPED = "finished_stopped"
    FINISHED_LENGTH = "finished_length"
    FINISHED_ABORTED = "finished_aborted"
    FINISHED_ERROR = "finished_error"

    @property
    def is_finished(self) -> bool:
        """True for the four statuses that a request never leaves."""
        return self in FINISH_REASONS


FINISH_REASONS: dict[RequestStatus, FinishReason] = {
    RequestStatus.FINISHED_STOPPED: "stop",
    RequestStatus.FINISHED_LENGTH: "length",
    RequestStatus.FINISHED_ABORTED: "abort",
    RequestStatus.FINISHED_ERROR: "error",
}

_ENDINGS = frozenset(FINISH_REASONS)
TRANSITIONS: dict[RequestStatus, frozenset[RequestStatus]] = {
    RequestStatus.WAITING: frozenset(
        {RequestStatus.RUNNING, RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR}
    ),
    RequestStatus.RUNNING: _ENDINGS | {RequestStatus.PREEMPTED},
    RequestStatus.PREEMPTED: _ENDINGS | {RequestStatus.RUNNING},
    **{status: frozenset() for status in FINISH_REASONS},
}


class Request:
    """The state of one request. Mutated by the scheduler and the block manager alone; everybody else reads.

    A step lets `num_computed_tokens` catch up with `num_tokens` (prompt + outputs). Tokens that stand in a plan which
    has not been applied yet are `num_scheduled_tokens`; the next plan starts after them. Outputs that plans in flight
    will bring, where the scheduler plans ahead, are `num_placeholders`: they can be computed before they are known here.
    """

    __slots__ = (
        "block_hashes",
        "block_table",
        "cached_blocks",
        "core",
        "error",
        "first_wanted_row",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_placeholders",
        "num_preemptions",
        "num_scheduled_tokens",
        "output_token_ids",
        "prompt_lookup",
        "request_id",
        "sequence",
        "status",
        "stop_reason",
        "token_ids",
    )

    def __init__(self, core: EngineCoreRequest, sequence: int = 0) -> None:
        self.core = core
        self.request_id = core.request_id
        self.sequence = sequence  # number of arrival
        self.status = RequestStatus.WAITING
        self.output_token_ids: list[int] = []
        self.token_ids: list[int] = list(core.prompt_token_ids)  # prompt, then outputs
        self.num_computed_tokens = 0  # tokens whose K/V stand in the blocks
        self.num_scheduled_tokens = 0
        self.num_placeholders = 0
        self.num_cached_tokens = 0  # prefix hit at the first admission
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []  # chain over the full blocks of token_ids, grown on demand by BlockManager
        self.cached_blocks: list[tuple[int, bytes]] = []  # that it computed and others may share, and their hashes
        self.num_preemptions = 0
        self.prompt_lookup: PromptLookup | None = None  # where drafts come from, made when the first are asked for
        self.first_wanted_row = first_wanted_row(core)
        self.error: str | None = None
        self.stop_reason: int | str | None = None

    def __repr__(self) -> str:
        return f"Request({self.request_id!r}, {self.status.value}, {self.num_computed_tokens}/{self.num_tokens} tokens)"

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.core.prompt_token_ids

    @property
    def sampling_params(self) -> SamplingParams:
        return self.core.sampling_params

    @property
    def priority(self) -> int:
        return self.core.priority

    @property
    def group_id(self) -> str | None:
        return self.core.group_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.core.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt + outputs."""
        return len(self.token_ids)

    @property
    def next_start(self) -> int:
        """The first position that no plan has computed or is computing."""
        return self.num_computed_tokens + self.num_scheduled_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that no plan has taken yet. Not above 0 while drafts are in flight."""
        known = len(self.token_ids) + self.num_placeholders
        return known - self.num_computed_tokens - self.num_scheduled_tokens

    @property
    def is_prefill(self) -> bool:
        """True when more than the newest output is still to be computed: a prompt, a chunk, or a resumed request."""
        return self.num_pending_tokens > 1 or not (self.output_token_ids or self.num_placeholders)

    @property
    def is_finished(self) -> bool:
        return self.status.is_finished

    @property
    def finish_reason(self) -> FinishReason | None:
        """`stop`, `length`, `abort` or `error`; None while it has not ended."""
        return FINISH_REASONS.get(self.status)

    @property
    def queue_key(self) -> tuple[int, int]:
        """Most important first, then in order of arrival. The victim of a preemption is the largest key."""
        return (self.core.priority, self.sequence)

    def append_output(self, token_id: int) -> None:
        """Add a sampled token."""
        self.output_token_ids.append(token_id)
        self.token_ids.append(token_id)

    def transition(self, status: RequestStatus) -> None:
        """Move to `status`.

        Raises:
            InvariantError: the table of transitions has no such edge.
        """
        if status not in TRANSITIONS[self.status]:
            raise InvariantError(f"request {self.request_id!r} cannot go from {self.status.value} to {status.value}")
        self.status = status


def queue_key(request: Request) -> tuple[int, int]:
    """`Request.queue_key`, to sort by."""
    return request.queue_key
