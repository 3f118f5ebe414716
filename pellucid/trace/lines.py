"""The lines of a trace: typed, plain data. docs/trace.md describes them for readers of other languages.

A file begins with a `Header`; then come commands and steps, in the order in which the engine met them, and an `EndLine`.
`turn` counts the calls of `LLMEngine.step` before a command, or up to and with the one that brought a step: it says exactly
between which two calls a command came. `at` is in seconds since the engine began.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from pellucid import json_text
from pellucid.api.hidden_states import HiddenStatesParams
from pellucid.api.outputs import FinishReason
from pellucid.contract.facts import ContractDigest
from pellucid.contract.plan import PlanEntry, StepKind, WaitingReasons
from pellucid.errors import TraceError
from pellucid.scheduling.request import FINISH_REASONS
from pellucid.scheduling.scheduler import TokenEvent
from pellucid.trace.records import StepRecord

FORMAT = 1
# Longer lines are refused: a prompt of a million tokens has less than 8 MB.
MAX_LINE_BYTES = 64 * 2**20

Count = Annotated[int, Meta(ge=0, le=2**62)]


class ModelIdentity(Struct, frozen=True):
    """Which model it was; its contents stand in the contract. `fingerprint` names the program on that machine."""

    name: str
    fingerprint: str = ""


class Resolved(Struct, frozen=True):
    """What the engine made of settings that say "by the machine"."""

    max_model_len: Count
    num_blocks: Count
    block_size: Count
    num_threads: Count
    isa: str


class Header(Struct, frozen=True, tag="header", tag_field="tag"):
    """The first line of each file of a trace. `run` is the same in all its files; `part` counts them from 0."""

    format: int
    pellucid: str
    run: str
    part: Count
    created: float  # unix seconds
    model: ModelIdentity
    config: dict[str, Any]  # EngineConfig
    resolved: Resolved
    contract: ContractDigest | None = None  # None: the trace is of a version that named none


class SubmitLine(Struct, frozen=True, tag="submit", tag_field="tag", omit_defaults=True):
    """A request was queued. `params` are its SamplingParams with the seed that it was given; `cache_salt` is a keyed hash of
    the real one, equal where those are. With n > 1 its choices are called `request_id/0` and so on."""

    turn: Count
    step: Count  # number of the next plan
    at: float
    request_id: str
    prompt_token_ids: list[int]
    params: dict[str, Any]
    priority: int = 0
    cache_salt: str | None = None
    hidden_states: HiddenStatesParams | None = None
    capture: tuple[str, ...] = ()
    steering: dict[str, list[float]] | None = None


class CancelLine(Struct, frozen=True, tag="cancel", tag_field="tag"):
    """A request was ended from outside."""

    turn: Count
    step: Count
    at: float
    request_id: str


class ResetLine(Struct, frozen=True, tag="reset", tag_field="tag"):
    """The prefix cache forgot its blocks."""

    turn: Count
    step: Count
    at: float


class Ending(Struct, frozen=True, array_like=True, omit_defaults=True):
    """How a request ended in a step."""

    reason: FinishReason
    stop_reason: int | str | None = None
    error: str | None = None


class StepLine(Struct, frozen=True, tag="step", tag_field="tag", omit_defaults=True):
    """One step: the plan, what came of it, and what it took. `new_token_ids` and `logits` stand beside `entries`.

    In a file `waiting` and `running` are absent where they are as in the step before.
    """

    turn: Count
    at: float
    step: Count
    kind: StepKind
    entries: list[PlanEntry]
    new_token_ids: list[list[int]]
    logits: list[list[int]] | None = None  # checksums of the rows that were sampled from (executor/checksum.py)
    finished: dict[str, Ending] = {}
    preempted: list[str] = []
    waiting: list[str] | None = None
    running: list[str] | None = None
    head_reason: str | None = None  # why the first of `waiting` waits; the others wait for it
    tkv: int = 0
    n_reserved_blocks: int = 0
    n_used_blocks: int = 0
    n_free_blocks: int = 0
    n_prefix_hits: int = 0
    n_draft_tokens: int = 0
    n_accepted_tokens: int = 0
    schedule_seconds: float = 0.0
    execute_seconds: float = 0.0
    sample_seconds: float = 0.0
    output_seconds: float = 0.0
    idle_seconds: float = 0.0

    def to_record(self) -> StepRecord:
        """The record of the step, as `engine.trace` had it."""
        same = {name: getattr(self, name) for name in _SAME}
        waiting = self.waiting or []
        reasons = (
            WaitingReasons(tuple(waiting), self.head_reason) if self.head_reason else WaitingReasons(tuple(waiting))
        )
        return StepRecord(
            **same,
            waiting=waiting,
            running=self.running or [],
            request_outputs=[e.request_id for e, new in zip(self.entries, self.new_token_ids, strict=True) if new],
            finished_requests=list(self.finished),
            tokens={entry.request_id: entry.num_tokens for entry in self.entries},
            waiting_reasons=reasons,
        )


class EndLine(Struct, frozen=True, tag="end", tag_field="tag"):
    """The engine was closed."""

    turn: Count
    step: Count
    at: float


Line = Header | SubmitLine | CancelLine | ResetLine | StepLine | EndLine

# Fields that a line has as the record has them; the others of a record follow from the line.
_MADE = {"waiting", "running", "request_outputs", "finished_requests", "tokens", "waiting_reasons"}
_SAME = tuple(name for name in StepRecord.__dataclass_fields__ if name not in _MADE)

_DECODER: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


def encode(line: Line) -> bytes:
    """A line of the file."""
    return json_text.encode(line) + b"\n"


def decode(text: bytes) -> Line:
    """The line again.

    Raises:
        TraceError: it is none; the text says why.
    """
    try:
        line = _DECODER.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError, OverflowError) as error:
        raise TraceError(str(error)) from None
    if isinstance(line, StepLine):
        _check_step(line)
    return line


def _check_step(line: StepLine) -> None:
    for name in ("new_token_ids", "logits"):
        beside = getattr(line, name)
        if beside is not None and len(beside) != len(line.entries):
            raise TraceError(f"{name} has {len(beside)} lists beside {len(line.entries)} entries")


def step_line(
    record: StepRecord,
    entries: tuple[PlanEntry, ...],
    events: list[TokenEvent],
    checksums: dict[str, list[int]] | None,
    turn: int,
    at: float,
) -> StepLine:
    """The line of a step, with its queues whole."""
    tokens: dict[str, list[int]] = {}
    finished = {}
    for event in events:
        if event.token_id is not None:
            tokens.setdefault(event.request_id, []).append(event.token_id)
        if event.finish_status is not None:
            reason = FINISH_REASONS[event.finish_status]
            finished[event.request_id] = Ending(reason, event.stop_reason, event.error)
    return StepLine(
        turn=turn,
        at=at,
        entries=list(entries),
        new_token_ids=[tokens.get(entry.request_id, []) for entry in entries],
        logits=None if checksums is None else [checksums.get(entry.request_id, []) for entry in entries],
        finished=finished,
        waiting=record.waiting,
        running=record.running,
        head_reason=record.waiting_reasons[record.waiting[0]] if record.waiting else None,
        **{name: getattr(record, name) for name in _SAME},
    )
