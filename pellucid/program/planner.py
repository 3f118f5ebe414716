"""Planning: which buffers may share memory. A buffer lives from the op that writes it to the last that reads it."""

from __future__ import annotations

from pellucid.program.tracer import Recording


def last_uses(recording: Recording) -> list[int]:
    """The index of the last op that touches each buffer; the hidden states and logits outlive the program."""
    last = [0] * len(recording.widths)
    for index, op in enumerate(recording.ops):
        for buffer in (*op.outputs, *(operand[0] for operand in op.inputs if operand is not None)):
            last[buffer] = index
    for buffer in (recording.hidden, recording.logits):
        last[buffer] = len(recording.ops)
    return last


def assign_slots(recording: Recording) -> list[int]:
    """A slot for each buffer: buffers of one domain whose lives do not meet share one, best fit by width.

    An op's outputs never share a slot with its inputs, because a kernel may still read a row when it writes another.
    """
    last = last_uses(recording)
    slots = [-1] * len(recording.widths)
    slot_width: list[int] = []
    slot_domain: list[str] = []
    free: set[int] = set()
    dying: dict[int, list[int]] = {}
    for buffer, index in enumerate(last):
        dying.setdefault(index, []).append(buffer)
    for index, op in enumerate(recording.ops):
        for buffer in op.outputs:
            if slots[buffer] >= 0:  # another op has begun to fill it
                continue
            width, domain = recording.widths[buffer], recording.domains[buffer]
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
