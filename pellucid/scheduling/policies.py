"""Which requests a step takes. A policy orders the scheduler's passes; the passes themselves are the same for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from pellucid.scheduling.request import Request


class StepPasses(Protocol):
    """The passes a step is made of."""

    @property
    def is_empty(self) -> bool:
        """True while no request has been taken."""

    @property
    def running(self) -> list[Request]:
        """Running requests, in order of admission."""

    def continue_running(self, requests: Iterable[Request]) -> None:
        """Take the pending tokens of running requests while the token budget lasts; preempt where blocks are short."""

    def admit_waiting(self, whole_prompts: bool, one_prompt: bool = False) -> None:
        """Admit from the head of the queue until one cannot come in, or one has."""


def mixed(step: StepPasses) -> None:
    """Running requests first, then waiting ones, prompts cut into chunks by what is left of the budget."""
    step.continue_running(step.running)
    step.admit_waiting(whole_prompts=False)


def prefill_first(step: StepPasses) -> None:
    """Whole prompts, in order, as long as they fit; a decode of all that runs only where no prefill was possible.

    A resumed request (prompt + outputs) that is longer than a step may be is the one exception to whole prompts: it
    is cut.
    """
    step.continue_running(request for request in step.running if request.is_prefill)
    step.admit_waiting(whole_prompts=True)
    if step.is_empty:
        step.continue_running(step.running)


def padded(step: StepPasses) -> None:
    """One whole prompt, as soon as the static shapes let it in (`scheduling/padded.py`); else a decode of all that runs."""
    step.admit_waiting(whole_prompts=True, one_prompt=True)
    if step.is_empty:
        step.continue_running(step.running)


@dataclass(frozen=True)
class Policy:
    """How a step is put together, and what holds for its requests."""

    take: Callable[[StepPasses], None]
    whole_prompts: bool = False  # a prompt is never cut, so it must fit a step
    newest_first: bool = False  # the order of those that run: by admission, or the other way round
    pads: bool = False  # static shapes are accounted for


POLICIES: dict[str, Policy] = {
    "mixed": Policy(mixed),
    "prefill_first": Policy(prefill_first, whole_prompts=True),
    "padded": Policy(padded, whole_prompts=True, newest_first=True, pads=True),
}
