"""The hidden states and activations that the requests of a step want, out of the buffers that the step leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pellucid.api.hidden_states import FINAL_LAYER, layer_name
from pellucid.contract.executor import F32, Executable
from pellucid.contract.plan import CapturedRows, PlanEntry
from pellucid.executor.batch import RunnerRequest
from pellucid.executor.blame import Errors, note


@dataclass(frozen=True)
class _Part:
    """One request's rows: position + `offset` is a row of the batch."""

    entry: PlanEntry
    request: RunnerRequest
    offset: int

    @property
    def end(self) -> int:
        return self.entry.start + self.entry.num_tokens


class HiddenRows:
    """What a step has to keep, found before it runs; what it kept, copied once, behind sampling. What cannot be gathered of one
    request stands in `errors`."""

    def __init__(
        self, entries: Sequence[PlanEntry], requests: Sequence[RunnerRequest], query_start: npt.NDArray[np.int32]
    ) -> None:
        self._hidden: list[tuple[_Part, list[int]]] = []
        self._captured: list[_Part] = []
        self.steering: dict[str, list[tuple[int, int, F32]]] = {}
        for i, (entry, request) in enumerate(zip(entries, requests, strict=True)):
            part = _Part(entry, request, int(query_start[i]) - entry.start)
            positions = [] if request.hidden is None else request.hidden.rows.among(entry.start, part.end)
            if positions:
                self._hidden.append((part, positions))
            if request.capture:
                self._captured.append(part)
            if request.steering is not None:
                for name, vector in request.steering.vectors.items():
                    span = (entry.start + part.offset, part.end + part.offset, vector)
                    self.steering.setdefault(name, []).append(span)

    @property
    def _layers(self) -> set[int]:
        return {layer for part, _ in self._hidden for layer in _layers(part)}

    @property
    def activations(self) -> set[str]:
        """Those that the program has to keep for it."""
        layers = self._layers - {FINAL_LAYER}
        return {*map(layer_name, layers), *(name for part in self._captured for name in part.request.capture)}

    def gather_hidden(
        self, executable: Executable, accepted_drafts: Mapping[str, Sized], errors: Errors
    ) -> tuple[dict[str, F32], dict[str, list[int]]]:
        """Rows [n, layers, D] and their positions, by request id. Single rows of the same layers are parts of one array."""
        layers: dict[int, F32] = {}
        states: dict[str, F32] = {}
        positions: dict[str, list[int]] = {}
        singles: dict[tuple[int, ...], dict[str, int]] = {}
        for part, wanted in self._hidden:
            end = _end_of_text(part, accepted_drafts)
            kept = wanted if wanted[-1] < end else [position for position in wanted if position < end]
            name, wanted_layers = part.entry.request_id, _layers(part)
            try:
                layers |= {layer: _layer(executable, layer) for layer in wanted_layers if layer not in layers}
                if len(kept) == 1:
                    singles.setdefault(wanted_layers, {})[name] = kept[0] + part.offset
                else:
                    states[name] = _taken([position + part.offset for position in kept], wanted_layers, layers)
                positions[name] = kept
            except Exception as error:
                note(errors, name, error)
        for wanted_layers, rows in singles.items():
            found_NLD = _taken(list(rows.values()), wanted_layers, layers)
            states |= {name: found_NLD[index : index + 1] for index, name in enumerate(rows)}
        return states, positions

    def gather_captured(
        self, executable: Executable, accepted_drafts: Mapping[str, Sized], errors: Errors
    ) -> dict[str, CapturedRows]:
        """All rows that are part of a text, by request id."""
        found = {}
        for part in self._captured:
            start, end = part.entry.start, _end_of_text(part, accepted_drafts)
            try:
                values = {
                    name: executable.activation(name)[start + part.offset : end + part.offset].copy()
                    for name in part.request.capture
                }
                found[part.entry.request_id] = CapturedRows(start, values)
            except Exception as error:
                note(errors, part.entry.request_id, error)
        return found


def _taken(rows: list[int], wanted_layers: tuple[int, ...], layers: Mapping[int, F32]) -> F32:
    rows_N = np.array(rows, np.int64)
    found_NLD = np.empty((len(rows), len(wanted_layers), layers[wanted_layers[0]].shape[1]), np.float32)
    for index, layer in enumerate(wanted_layers):
        np.take(layers[layer], rows_N, axis=0, out=found_NLD[:, index], mode="clip")  # "raise" would copy twice
    return found_NLD


def _end_of_text(part: _Part, accepted_drafts: Mapping[str, Sized]) -> int:
    """Rows of drafts that were refused are no part of a text."""
    entry = part.entry
    return part.end - len(entry.draft_token_ids) + len(accepted_drafts.get(entry.request_id, ()))


def _layers(part: _Part) -> tuple[int, ...]:
    return () if part.request.hidden is None else part.request.hidden.layers


def _layer(executable: Executable, layer: int) -> F32:
    return executable.hidden() if layer == FINAL_LAYER else executable.activation(layer_name(layer))
