"""What the engine asks of an executor, and what an executor asks of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pellucid.api.hidden_states import NO_STEERING, Steering
from pellucid.contract.batch import BatchInput
from pellucid.contract.facts import ModelFacts
from pellucid.contract.plan import ModelRunnerOutput, StepPlan
from pellucid.errors import PellucidError

F32 = npt.NDArray[np.float32]


class Executable(Protocol):
    """A loaded model that runs batches: a native program, or a module run eagerly."""

    def run(self, batch: BatchInput, keep: Iterable[str] = (), steering: Steering = NO_STEERING) -> F32:
        """Forward for all T tokens; logits [L, V] of `batch.logit_rows`, valid until the next call. Activations named in `keep`
        can be read afterwards; `steering` is added to activations.

        Raises:
            RowError, ActivationsError: what the batch could be computed without.
            NativeError: the core refused it; the error names the token or the sequence where it is about one.
        """

    def logits_of(self, rows: npt.NDArray[np.int32]) -> F32:
        """Logits [L, V] of rows of the last batch."""

    def activation(self, name: str) -> F32:
        """An activation [T, any] of the last batch that `run` was told to keep."""

    def hidden(self) -> F32:
        """Hidden states [T, D] of the last batch: the exact input of the language-model head."""

    def close(self) -> None:
        """Frees the cache and the buffers."""


@dataclass(frozen=True)
class KVCacheSize:
    """How the cache was laid out, and what a token and all of it cost in bytes."""

    num_blocks: int
    block_size: int
    bytes_per_token: int
    total_bytes: int


class Verification(Protocol):
    """The packed model is read against its checksums while the engine runs."""

    is_verified: bool  # all of it was read, and is as it was written

    def stop(self) -> None:
        """Ends it, if it has not ended; harmless when called again."""


class Executor(Protocol):
    """Runs the model for an engine, in this process or in others. Made by `Class(config, progress)`, as the table of executors in
    `pellucid/config.py` says."""

    facts: ModelFacts
    kv_cache: KVCacheSize

    def execute(self, plan: StepPlan) -> ModelRunnerOutput:
        """Computes a plan's tokens and samples where it says so.

        What is wrong with one request stands in `errors` and ends that request alone: the results of the others are those that
        they have without it. An error that is raised ends all requests of the plan.
        """

    def verify(self, on_damage: Callable[[PellucidError], None]) -> Verification | None:
        """Begins to read the packed model against its checksums at idle priority; None where nothing is packed. `on_damage` is
        called once, on another thread, when a block is not as it was written."""

    def close(self) -> None:
        """Frees everything."""
