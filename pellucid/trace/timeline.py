"""What each request did at each step, as spans of steps: what is drawn of a trace."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

from pellucid.contract.plan import PlanEntry
from pellucid.trace.lines import CancelLine, Line, StepLine, SubmitLine

Kind = Literal["waiting", "stalled", "decode", "prefill", "preempted"]
# Where several fall on one place of a picture, the last of these is shown.
KINDS: tuple[Kind, ...] = ("waiting", "stalled", "decode", "prefill", "preempted")
KIND_TEXTS: dict[Kind, str] = {
    "waiting": "waits",
    "stalled": "runs, but not in this step",
    "decode": "decode",
    "prefill": "prefill chunk",
    "preempted": "preempted: waits without blocks",
}
NUM_LOADS = 320  # most that are told apart
_NUM_GONE = 4096
_LASTS: frozenset[Kind] = frozenset({"waiting", "preempted"})  # until something else comes


@dataclass
class Span:
    """Steps `first` to `last` of one kind."""

    kind: Kind
    first: int
    last: int


@dataclass
class Row:
    """One choice of a request."""

    request_id: str
    num_prompt: int | None  # None: it was submitted before the trace begins
    number: int = 0  # in the order in which requests came
    spans: list[Span] = field(default_factory=list)
    end: tuple[int, str] | None = None  # step, finish reason

    def be(self, kind: Kind, step: int) -> None:
        """It is of this kind in this step."""
        self.close(step - 1)
        if self.spans and self.spans[-1].kind == kind:
            self.spans[-1].last = step
        else:
            self.spans.append(Span(kind, step, step))

    def close(self, step: int) -> None:
        """What lasts has lasted up to this step."""
        if self.spans and self.spans[-1].kind in _LASTS:
            self.spans[-1].last = step
            if step < self.spans[-1].first:
                self.spans.pop()


@dataclass
class Load:
    """What one step, or several side by side, had to do. `usage` is the largest part of all blocks that was held."""

    num_steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    usage: float = 0.0

    def add(self, line: StepLine, prefill_tokens: int) -> None:
        """Takes in a step."""
        blocks = line.n_used_blocks + line.n_free_blocks
        self.num_steps += 1
        self.prefill_tokens += prefill_tokens
        self.decode_tokens += sum(entry.num_tokens for entry in line.entries) - prefill_tokens
        self.usage = max(self.usage, line.n_used_blocks / blocks if blocks else 0.0)


def is_prefill(entry: PlanEntry, num_prompt: int | None) -> bool:
    """True when an entry computes more than the newest token: a chunk of a prompt, or of what a preemption took away."""
    return entry.num_tokens - len(entry.draft_token_ids) > 1 or entry.start < (num_prompt or 0)


class Timeline:
    """Takes lines in; then `rows` has a row for each choice that did something in steps `first` to `last`, and `loads` what the
    steps had to do. Rows beyond `max_rows` are counted in `num_hidden` and left out. With `only`, so are all others.
    """

    def __init__(self, first: int, last: int, max_rows: int, only: Collection[str] = ()) -> None:
        self.first, self.last, self._max_rows, self._only = first, last, max_rows, frozenset(only)
        self._living: dict[str, Row] = {}
        self.rows: list[Row] = []
        self.loads = [Load() for _ in range(min(NUM_LOADS, last - first + 1))]
        self._gone: dict[str, None] = {}  # the newest that have ended
        self.num_hidden = self._num_rows = 0
        self._ended: list[Row] = []

    def feed(self, lines: Iterable[Line]) -> Timeline:
        """Takes in lines, up to the last step that is wanted."""
        for line in lines:
            if isinstance(line, (SubmitLine, StepLine, CancelLine)) and line.step > self.last:
                break
            if isinstance(line, SubmitLine):
                self._submit(line)
            elif isinstance(line, StepLine):
                self._step(line)
            elif isinstance(line, CancelLine):
                self._cancel(line)
        for row in self._living.values():
            row.close(self.last)
        self.rows = self._choose()
        return self

    def _choose(self) -> list[Row]:
        """The rows of the picture, in the order in which the requests came."""
        rows = self._ended + [row for row in self._living.values() if row.spans and self._is_wanted(row.request_id)]
        rows.sort(key=lambda row: row.number)
        self.num_hidden += max(0, len(rows) - self._max_rows)
        return rows[: self._max_rows]

    def _submit(self, line: SubmitLine) -> None:
        for name in choice_ids(line):
            self._gone.pop(name, None)
            self._row(name, len(line.prompt_token_ids)).be("waiting", line.step)

    def _row(self, name: str, num_prompt: int | None = None) -> Row:
        row = self._living.get(name)
        if row is None or (num_prompt is not None and row.end is not None):
            row = self._living[name] = Row(name, num_prompt, self._num_rows)
            self._num_rows += 1
        return row

    def _step(self, line: StepLine) -> None:
        step, prefill_tokens = line.step, 0
        for entry in line.entries:
            if entry.request_id not in self._gone:  # else it ended while this step was in flight
                row = self._row(entry.request_id)
                prefill = is_prefill(entry, row.num_prompt)
                row.be("prefill" if prefill else "decode", step)
                prefill_tokens += entry.num_tokens * prefill
        for name in line.preempted:
            self._row(name).be("preempted", step)
        if len(line.running or ()) > len(line.entries):
            taken = {entry.request_id for entry in line.entries}
            for name in line.running or ():
                if name not in taken:
                    self._row(name).be("stalled", step)
        for name, ending in line.finished.items():
            self._end(name, step, ending.reason)
        if step >= self.first:
            self.loads[(step - self.first) * len(self.loads) // (self.last - self.first + 1)].add(line, prefill_tokens)

    def _cancel(self, line: CancelLine) -> None:
        for name in [name for name in self._living if is_choice_of(name, line.request_id)]:
            self._living[name].close(line.step - 1)
            self._end(name, line.step, "abort")

    def _end(self, name: str, step: int, reason: str) -> None:
        """What ended before the steps that are wanted is forgotten, and so is what there is no room for."""
        row = self._living.pop(name, None)
        self._gone[name] = None
        if len(self._gone) > _NUM_GONE:
            del self._gone[next(iter(self._gone))]
        if row is None or step < self.first or not self._is_wanted(name):
            return
        row.end = (step, reason)
        insort(self._ended, row, key=lambda other: other.number)
        if len(self._ended) > self._max_rows:
            self._ended.pop()
            self.num_hidden += 1

    def _is_wanted(self, name: str) -> bool:
        return not self._only or any(is_choice_of(name, request_id) for request_id in self._only)


def choice_ids(line: SubmitLine) -> list[str]:
    """What the choices of a request are called."""
    many = line.params.get("n", 1)
    if not isinstance(many, int) or many <= 1:
        return [line.request_id]
    return [f"{line.request_id}/{index}" for index in range(min(many, 1024))]


def is_choice_of(name: str, request_id: str) -> bool:
    """True when a request is, or has, the choice of this name."""
    return name == request_id or (name.startswith(f"{request_id}/") and name[len(request_id) + 1 :].isdigit())
