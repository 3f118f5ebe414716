"""Which requests of a step an error is about."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from pellucid.api.hidden_states import FINAL_LAYER, layer_name
from pellucid.contract.batch import BatchInput
from pellucid.contract.plan import PlanEntry
from pellucid.errors import ActivationsError, NativeError, RowError, reason_of
from pellucid.executor.batch import RunnerRequest

_log = logging.getLogger(__name__)

Errors = dict[str, str]  # request id -> why it ends


def note(errors: Errors, request_id: str, error: Exception) -> None:
    """Writes down that a request ends alone because of `error`, here and in the log."""
    _log.warning("request %r ends with an error; the others of its step go on", request_id, exc_info=error)
    errors.setdefault(request_id, reason_of(error))


def blamed(
    error: Exception, entries: Sequence[PlanEntry], requests: Sequence[RunnerRequest], batch: BatchInput
) -> list[str]:
    """The requests without which the forward pass that `error` ended would have been good; none when that cannot be told."""
    if isinstance(error, ActivationsError):
        pairs = zip(entries, requests, strict=True)
        return [entry.request_id for entry, request in pairs if error.names & _asked_for(request)]
    place = _sequence(error, batch)
    return [entries[place].request_id] if 0 <= place < len(entries) else []


def _asked_for(request: RunnerRequest) -> set[str]:
    """Names of the activations that a request wants to be kept, or adds to."""
    layers = () if request.hidden is None else request.hidden.layers
    steered: Any = () if request.steering is None else request.steering.vectors
    return {*request.capture, *steered, *(layer_name(layer) for layer in layers if layer != FINAL_LAYER)}


def _sequence(error: Exception, batch: BatchInput) -> int:
    """The sequence of the batch that an error is about; -1: none."""
    if isinstance(error, RowError):
        return _sequence_of_row(error.row, batch)
    if not isinstance(error, NativeError):
        return -1
    if error.item == "sequence":
        return error.index
    return _sequence_of_row(error.index, batch) if error.item == "token" else -1


def _sequence_of_row(row: int, batch: BatchInput) -> int:
    if not 0 <= row < batch.num_tokens:
        return -1
    return int(np.searchsorted(batch.query_start, row, side="right")) - 1
