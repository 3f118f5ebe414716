"""Why a request took as long as it did: what it waited for and what it was given, step by step, equal steps joined."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pellucid.contract.plan import PlanEntry
from pellucid.trace.lines import CancelLine, Line, StepLine, SubmitLine
from pellucid.trace.timeline import choice_ids, is_choice_of, is_prefill

_NUMBERS = re.compile(r"\d+")
# How the first and the last value of joined steps are put together.
_BETWEEN = {"prefill": " to ", "wait": " … "}
PREEMPTED = "preempted: its blocks went to others; what it had computed is lost, what it had said is not"
STALLED = "runs, but had no part in the step: the budget was spent, or its last token is still in flight"


class Said(NamedTuple):
    """What one step has to say of a choice. Steps of equal `key` are joined."""

    key: tuple[str, ...]
    text: str
    first: str = ""
    last: str = ""
    num_tokens: int = 0


@dataclass
class Stretch:
    """Steps `first` to `last`, `num_steps` of them, in which the same was to be said of one choice."""

    choice: str
    said: Said
    first: int
    last: int
    began: float  # seconds since the engine began
    ended: float
    last_value: str = ""
    num_steps: int = 1
    num_tokens: int = 0

    @property
    def kind(self) -> str:
        """wait, prefill, decode, preempted, stalled, hit or end."""
        return self.said.key[0]

    def describe(self) -> str:
        """The whole stretch in words."""
        if self.kind == "decode":
            return f"decode: {self.num_tokens:,} token{'s' * (self.num_tokens != 1)}"
        first, last = self.said.first, self.last_value
        return self.said.text + (first if first == last else f"{first}{_BETWEEN.get(self.kind, ' ')}{last}")


class Why:
    """Takes lines in and has the stretches of one request, and of each of its choices, in order."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.submitted: SubmitLine | None = None
        self.stretches: list[Stretch] = []
        self._choices: dict[str, int | None] = {}  # living choices and the length of their prompt
        self._open: dict[str, Stretch] = {}
        self._at = 0.0  # of the line before

    def feed(self, lines: Iterable[Line]) -> Why:
        """Takes in all lines."""
        for line in lines:
            if isinstance(line, SubmitLine) and line.request_id == self.request_id:
                self.submitted = line
                self._choices = dict.fromkeys(choice_ids(line), len(line.prompt_token_ids))
                self._at = line.at
            elif isinstance(line, StepLine):
                self._step(line)
            elif isinstance(line, CancelLine) and line.request_id == self.request_id:
                for choice in list(self._choices):
                    self._take(choice, Said(("end",), "cancelled"), line.step, line.at)
                    self._forget(choice)
        return self

    def _step(self, line: StepLine) -> None:
        if self.submitted is None:  # it came before the trace begins
            known = [entry.request_id for entry in line.entries if is_choice_of(entry.request_id, self.request_id)]
            self._choices.update(dict.fromkeys(known))
        for choice, num_prompt in list(self._choices.items()):
            for said in _said(choice, num_prompt, line):
                self._take(choice, said, line.step, line.at)
            if choice in line.finished:
                self._forget(choice)
        self._at = line.at

    def _take(self, choice: str, said: Said, step: int, at: float) -> None:
        stretch = self._open.get(choice)
        if stretch is None or stretch.said.key != said.key:
            stretch = self._open[choice] = Stretch(choice, said, step, step, self._at, at, num_steps=0)
            self.stretches.append(stretch)
        stretch.last, stretch.ended, stretch.last_value = step, at, said.last
        stretch.num_steps += 1
        stretch.num_tokens += said.num_tokens

    def _forget(self, choice: str) -> None:
        del self._choices[choice]
        self._open.pop(choice, None)


def _said(choice: str, num_prompt: int | None, line: StepLine) -> Iterator[Said]:
    entries = [(entry, new) for entry, new in zip(line.entries, line.new_token_ids, strict=True)]
    entry, new = next((pair for pair in entries if pair[0].request_id == choice), (None, []))
    if choice in line.preempted:
        yield Said(("preempted",), PREEMPTED)
    elif entry is not None:
        yield from _of_entry(entry, new, num_prompt)
    elif choice in (line.waiting or ()):
        yield _wait(choice, line)
    elif choice in (line.running or ()):
        yield Said(("stalled",), STALLED)
    ending = line.finished.get(choice)
    if ending is not None:
        by = "" if ending.stop_reason is None else f", by {ending.stop_reason!r}"
        yield Said(("end",), f"ended: {ending.reason}{by}" + ("" if ending.error is None else f": {ending.error}"))


def _of_entry(entry: PlanEntry, new: list[int], num_prompt: int | None) -> Iterator[Said]:
    if entry.num_cached_tokens:
        yield Said(("hit",), f"found {entry.num_cached_tokens:,} tokens in the prefix cache")
    if is_prefill(entry, num_prompt):
        first, last = f"{entry.start:,}", f"{entry.start + entry.num_tokens - 1:,}"
        yield Said(("prefill",), "prefill: positions ", first, last, len(new))
    else:
        yield Said(("decode",), "decode", num_tokens=len(new))


def _wait(choice: str, line: StepLine) -> Said:
    """The head of the queue waits for a reason; the others for the head."""
    head, reason = (line.waiting or [choice])[0], line.head_reason or "no reason was recorded"
    text = "waits: " if head == choice else f"waits behind {head}: "
    return Said(("wait", head, _NUMBERS.sub("#", reason)), text, reason, reason)
