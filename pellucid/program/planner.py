"""Planning: which buffers may share memory. A buffer lives from the op that writes it to the last that reads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pellucid.program.tracer import Recording


@dataclass(frozen=True)
class Uses:
    """What a plan is made of: the buffers that each op reads and writes, in order, and those that outlive the program."""

    reads: Sequence[Sequence[int]]
    writes: Sequence[Sequence[int]]
    widths: Sequence[int]
    domains: Sequence[object]
    outlive: Iterable[int]

    @classmethod
    def of(cls, recording: Recording) -> Uses:
        """Of a recording: its hidden states and logits outlive it."""
        reads = [[operand[0] for operand in op.inputs if operand is not None] for op in recording.ops]
        writes = [op.outputs for op in recording.ops]
        return cls(reads, writes, recording.widths, recording.domains, (recording.hidden, recording.logits))


def last_uses(uses: Uses) -> list[int]:
    """The index of the last op that touches each buffer; those that outlive the program have the number of ops."""
    last = [0] * len(uses.widths)
    for index, (reads, writes) in enumerate(zip(uses.reads, uses.writes, strict=True)):
        for buffer in (*reads, *writes):
            last[buffer] = index
    for buffer in uses.outlive:
        last[buffer] = len(uses.reads)
    return last


def assign_slots(uses: Uses) -> list[int]:
    """A slot for each buffer: buffers of one domain whose lives do not meet share one, best fit by width.

    An op's outputs never share a slot with its inputs, because a kernel may still read a row when it writes another.
    """
    last = last_uses(uses)
    slots = [-1] * len(uses.widths)
    slot_width: list[int] = []
    slot_domain: list[object] = []
    free: set[int] = set()
    dying: dict[int, list[int]] = {}
    for buffer, index in enumerate(last):
        dying.setdefault(index, []).append(buffer)
    for index, writes in enumerate(uses.writes):
        for buffer in writes:
            if slots[buffer] >= 0:  # another op has begun to fill it
                continue
            width, domain = uses.widths[buffer], uses.domains[buffer]
            candidates = [s for s in free if slot_domain[s] == domain]
            fitting = [s for s in candidates if slot_width[s] >= width]
            if fitting:
                slot = min(fitting, key=lambda s: (slot_width[s], s))
            elif candidates:
                slot = max(candidates, key=lambda s: (slot_width[s], -s))
                slot_width[slot] = width
            else:
                slot = len(slot_width)
                slot_width.append(width)
                slot_domain.append(domain)
            free.discard(slot)
            slots[buffer] = slot
        free.update(slots[buffer] for buffer in dying.get(index, ()) if slots[buffer] >= 0)
    return slots
