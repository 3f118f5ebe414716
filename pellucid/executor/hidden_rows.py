"""The hidden states that the requests of a step want, out of the buffers that the step leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pellucid.executor.base import F32, Executable
from pellucid.executor.batch import RunnerRequest
from pellucid.hidden import FINAL_LAYER
from pellucid.layers.observe import layer_name
from pellucid.plan import PlanEntry


@dataclass(frozen=True)
class _Part:
    """One request's rows: position + `offset` is a row of the batch."""

    entry: PlanEntry
    layers: tuple[int, ...]
    positions: list[int]
    offset: int


class HiddenRows:
    """What a step has to keep, found before it runs; what it kept, copied once, behind sampling."""

    def __init__(
        self, entries: Sequence[PlanEntry], requests: Sequence[RunnerRequest], query_start: npt.NDArray[np.int32]
    ) -> None:
        self._parts: list[_Part] = []
        for i, (entry, request) in enumerate(zip(entries, requests, strict=True)):
            if request.hidden is None:
                continue
            positions = request.hidden.rows.among(entry.start, entry.start + entry.num_tokens)
            if positions:
                offset = int(query_start[i]) - entry.start
                self._parts.append(_Part(entry, request.hidden.layers, positions, offset))

    @property
    def activations(self) -> set[str]:
        """Those that the program has to keep for it."""
        return {layer_name(layer) for part in self._parts for layer in part.layers if layer != FINAL_LAYER}

    def gather(
        self, executable: Executable, accepted_drafts: Mapping[str, Sized]
    ) -> tuple[dict[str, F32], dict[str, list[int]]]:
        """Rows [n, layers, D] and their positions, by request id. Rows of drafts that were refused are no part of a text."""
        states: dict[str, F32] = {}
        positions: dict[str, list[int]] = {}
        for part in self._parts:
            entry, kept = part.entry, part.positions
            refused = len(entry.draft_token_ids) - len(accepted_drafts.get(entry.request_id, ()))
            if refused:
                kept = [position for position in kept if position < entry.start + entry.num_tokens - refused]
            rows = np.array(kept, np.int64) + part.offset
            layers = [_layer(executable, layer) for layer in part.layers]
            found = np.empty((len(rows), len(layers), layers[0].shape[1]), np.float32)
            for index, layer_TD in enumerate(layers):
                found[:, index] = layer_TD[rows]
            states[entry.request_id], positions[entry.request_id] = found, kept
        return states, positions


def _layer(executable: Executable, layer: int) -> F32:
    return executable.hidden() if layer == FINAL_LAYER else executable.activation(layer_name(layer))
