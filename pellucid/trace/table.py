"""The steps of a trace as a table; steps in which nothing happens but one more token each are joined."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from pellucid.trace.lines import CancelLine, Header, Line, ResetLine, StepLine, SubmitLine
from pellucid.trace.timeline import choice_ids, is_choice_of

HEAD = ("step", "kind", "tokens", "run", "wait", "blocks", "ms", "what happens")
_MOST_NAMES = 4


@dataclass
class StepRow:
    """One step, or several that are alike."""

    first: StepLine
    last: StepLine
    num_steps: int
    seconds: float
    num_tokens: int
    events: list[str]

    def cells(self) -> tuple[str, ...]:
        """As text, in the order of `HEAD`."""
        line, many = self.last, self.num_steps > 1
        steps = f"{self.first.step:,}–{line.step:,}" if many else f"{line.step:,}"
        blocks = line.n_used_blocks + line.n_free_blocks
        return (
            steps,
            line.kind,
            f"{self.num_tokens:,}",
            str(len(line.running or ())),
            str(len(line.waiting or ())),
            f"{line.n_used_blocks:,}/{blocks:,}",
            f"{1e3 * self.seconds / self.num_steps:.1f}",
            "; ".join([*([f"{self.num_steps:,} steps alike"] if many else []), *self.events, *_head(line)]),
        )


def table_rows(
    lines: Iterable[Line], first: int, last: int, only: Collection[str] = (), *, joined: bool = True
) -> Iterator[StepRow]:
    """Rows of steps `first` to `last`; with `only`, of those that have to do with these requests."""
    pending: StepRow | None = None
    news: list[str] = []  # of commands, told with the next step
    for line in lines:
        if isinstance(line, StepLine):
            if line.step > last:
                break
            if line.step >= first and (not only or _concerns(line, only) or news):
                row = _row(line, news)
                if pending is not None and joined and _is_alike(pending, row):
                    pending = _join(pending, row)
                else:
                    if pending is not None:
                        yield pending
                    pending = row
            news = []
        elif not isinstance(line, Header) and line.step >= first:
            news += _news(line, only)
    if pending is not None:
        yield pending


def _row(line: StepLine, news: list[str]) -> StepRow:
    seconds = line.schedule_seconds + line.execute_seconds + line.output_seconds
    return StepRow(line, line, 1, seconds, sum(entry.num_tokens for entry in line.entries), [*news, *_events(line)])


def _is_alike(before: StepRow, row: StepRow) -> bool:
    same = ("kind", "running", "waiting")
    is_plain = row.first.kind == "decode" and not row.events and not before.events
    return is_plain and all(getattr(before.last, name) == getattr(row.first, name) for name in same)


def _join(before: StepRow, row: StepRow) -> StepRow:
    total = before.num_tokens + row.num_tokens
    return StepRow(before.first, row.last, before.num_steps + 1, before.seconds + row.seconds, total, before.events)


def _news(line: Line, only: Collection[str]) -> list[str]:
    if isinstance(line, ResetLine):
        return ["prefix cache reset"]
    if isinstance(line, CancelLine) and (not only or line.request_id in only):
        return [f"{line.request_id} cancelled"]
    if isinstance(line, SubmitLine) and (not only or line.request_id in only):
        many = len(choice_ids(line))
        return [
            f"{line.request_id} comes: {len(line.prompt_token_ids):,} tokens{f', {many} choices' if many > 1 else ''}"
        ]
    return []


def _events(line: StepLine) -> list[str]:
    events = []
    cached = [f"{entry.request_id} ({entry.num_cached_tokens:,})" for entry in line.entries if entry.num_cached_tokens]
    if line.preempted:
        events.append(f"preempted: {_names(line.preempted)}")
    if cached:
        events.append(f"cached: {_names(cached)}")
    if line.finished:
        ends = [f"{name} ({ending.reason})" for name, ending in line.finished.items()]
        events.append(f"ended: {_names(ends)}")
    return events


def _head(line: StepLine) -> list[str]:
    return [f"{line.waiting[0]} waits: {line.head_reason}"] if line.waiting and line.head_reason else []


def _names(names: list[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _concerns(line: StepLine, only: Collection[str]) -> bool:
    names = (*(entry.request_id for entry in line.entries), *line.preempted, *line.finished, *(line.waiting or ()))
    return any(is_choice_of(name, request_id) for name in names for request_id in only)
