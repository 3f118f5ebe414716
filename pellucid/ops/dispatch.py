"""Who runs an op: the recorder of a symbol, or the backend of the current step. Resolved once per step scope, never per call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from pellucid.contract.batch import BatchInput
from pellucid.ops.spec import OpSpec, Symbol


@dataclass(frozen=True)
class Step:
    """The surroundings of an eager forward: the batch, the cache, and the backend that runs the ops."""

    run: Callable[[OpSpec, Step], tuple[Any, ...]]
    batch: BatchInput | None = None
    kv: Any = None


_step: ContextVar[Step | None] = ContextVar("pellucid_step", default=None)


@contextmanager
def step_scope(step: Step) -> Iterator[Step]:
    """Runs the eager ops inside on this step's backend, batch and cache."""
    token = _step.set(step)
    try:
        yield step
    finally:
        _step.reset(token)


def call(spec: OpSpec) -> tuple[Any, ...]:
    """Runs or records one op."""
    for value in spec.inputs:
        if isinstance(value, Symbol):
            return value.recorder.record(spec)
    step = _step.get()
    if step is None:
        raise RuntimeError(f"op {spec.kind} was called outside a step: enter pellucid.ops.dispatch.step_scope first")
    return step.run(spec, step)


def call_one(spec: OpSpec) -> Any:
    """`call` for ops with one output."""
    return call(spec)[0]
