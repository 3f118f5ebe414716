"""What a model's text is made of, piece by piece: content, reasoning, tool calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ContentDelta:
    """Text for the reader."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """Text that the model wrote for itself."""

    text: str


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of call `index`. The first one has `id` and `name`; the `arguments` of all join to its JSON."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


Delta = ContentDelta | ReasoningDelta | ToolCallDelta


def joined(deltas: list[Delta]) -> list[Delta]:
    """The same with neighbours of one kind joined, and without empty ones."""
    made: list[Delta] = []
    for delta in deltas:
        last = made[-1] if made else None
        if isinstance(delta, ToolCallDelta):
            if isinstance(last, ToolCallDelta) and last.index == delta.index and delta.id is None:
                made[-1] = ToolCallDelta(last.index, last.id, last.name, last.arguments + delta.arguments)
            else:
                made.append(delta)
        elif delta.text:
            if last is not None and type(last) is type(delta) and not isinstance(last, ToolCallDelta):
                made[-1] = type(delta)(last.text + delta.text)
            else:
                made.append(delta)
    return made
