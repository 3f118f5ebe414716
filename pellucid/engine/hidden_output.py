"""The hidden states and activations of one choice while it runs, and what of them is handed out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pellucid.api.hidden_states import HiddenStatesParams, WantedRows, resolve
from pellucid.config import MAX_SPECULATIVE_TOKENS
from pellucid.contract.plan import CapturedRows

F32 = npt.NDArray[np.float32]


class HiddenStatesOfChoice:
    """Rows by position. One that comes again, computed anew after a preemption, takes the place of its equal."""

    def __init__(self, params: HiddenStatesParams, num_prompt_tokens: int, hidden_size: int) -> None:
        self.params, self._num_prompt_tokens, self._hidden_size = params, num_prompt_tokens, hidden_size
        self._wanted = WantedRows(params, num_prompt_tokens)
        self._rows: dict[int, F32] = {}  # [layers, D]
        self._passing: deque[int] = deque()  # positions that are among the last for a while
        self._num_sent = 0  # generated tokens whose rows went out with a chunk

    def add(self, positions: Sequence[int], rows: F32) -> None:
        """Takes in rows [n, layers, D] of ascending positions; forgets those that can no longer be handed out.

        A single row is a part of what the step kept for all requests. It is copied where it stays, so that it does not hold the rest.
        """
        if not positions:
            return
        known, wanted, is_single = self._rows, self._wanted, len(positions) == 1
        for position, row in zip(positions, rows, strict=True):
            is_passing = wanted.is_passing(position)
            if is_passing and position not in known:
                self._passing.append(position)
            known[position] = row.copy() if is_single and not is_passing else row
        # A text may end before the newest row: at most by the drafts that were accepted with it.
        last = positions[-1] - MAX_SPECULATIVE_TOKENS - wanted.num_last
        while self._passing and self._passing[0] <= last:
            del known[self._passing.popleft()]

    def result(self, num_tokens: int) -> tuple[F32 | None, list[int] | None]:
        """The states of a choice that ended with `num_tokens` generated ones, and their positions where those were asked for:
        [D], or [rows, D], or [rows, layers, D]. Without a row that is [0, …], and None in place of [D]."""
        num_rows = self._num_prompt_tokens + num_tokens - 1 if num_tokens else 0
        positions = [position for position in resolve(self.params, num_rows) if position in self._rows]
        none_NLD = np.zeros((0, len(self.params.wanted_layers), self._hidden_size), np.float32)
        states = np.stack([self._rows[position] for position in positions]) if positions else none_NLD
        if self.params.is_flat:
            return (states[0, 0] if positions else None), None
        return states if self.params.layers is not None else states[:, 0], positions

    def take_streamed(self, num_tokens: int) -> F32 | None:
        """Rows of the generated tokens up to `num_tokens` that no chunk has carried: [n, D] or [n, layers, D]."""
        first = self._num_prompt_tokens - 1
        rows = [self._rows[first + index] for index in range(self._num_sent, num_tokens) if first + index in self._rows]
        self._num_sent = num_tokens
        if not rows:
            return None
        states = np.stack(rows)
        return states if self.params.layers is not None else states[:, 0]


class CapturedOfChoice:
    """Activations in the pieces in which they came. What is computed anew takes the place of its equal."""

    def __init__(self, names: Sequence[str], num_prompt_tokens: int) -> None:
        self._names, self._num_prompt_tokens = names, num_prompt_tokens
        self._pieces: list[CapturedRows] = []

    def add(self, rows: CapturedRows) -> None:
        """Takes in the rows of a step."""
        self._pieces.append(rows)

    def result(self, num_tokens: int) -> dict[str, F32] | None:
        """[rows, width] by name, of a choice that ended with `num_tokens` generated ones; None when there is no row."""
        num_rows = self._num_prompt_tokens + num_tokens - 1 if num_tokens else 0
        if not num_rows or not self._pieces:
            return None
        found = {}
        for name in self._names:
            # zeros where a failed step left a gap: what memory holds may be another request's
            values = np.zeros((num_rows, self._pieces[0].values[name].shape[1]), np.float32)
            for start, piece in self._pieces:
                some = piece[name][: max(0, num_rows - start)]
                values[start : start + len(some)] = some
            found[name] = values
        return found
