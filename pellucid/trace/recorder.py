"""`Recorder`: tells a trace what an engine is asked and what it does, as lines that suffice to run it again."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from pellucid.api.request_options import RequestOptions
from pellucid.api.sampling_params import SamplingParams
from pellucid.api.structured_outputs import FIELD, CustomStructure
from pellucid.config import EngineConfig
from pellucid.contract.facts import ModelFacts
from pellucid.contract.plan import ModelRunnerOutput, StepPlan
from pellucid.errors import InvalidRequestError
from pellucid.scheduling.scheduler import TokenEvent
from pellucid.trace.file import TraceFile
from pellucid.trace.lines import (
    FORMAT,
    CancelLine,
    EndLine,
    Header,
    Line,
    ModelIdentity,
    ResetLine,
    Resolved,
    SubmitLine,
    step_line,
)
from pellucid.trace.records import Place, StepRecord
from pellucid.version import VERSION


class Recorder:
    """Makes the lines of one engine and gives them to `sink`; without one, to the file that the config names.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(
        self,
        config: EngineConfig,
        header: Callable[[], Header],
        sink: Callable[[Line], None] | None,
        clock: Callable[[], float],
    ) -> None:
        """`header`: under which conditions the engine runs; asked for where a file is written."""
        self._clock, self._began = clock, clock()
        self._salt_key = secrets.token_bytes(16)  # kept nowhere: a trace names no salt
        self._traces_logits = config.trace_logits
        self._file: TraceFile | None = None
        if sink is None:
            self._file = TraceFile(str(config.trace_path), config.trace_max_mb, header())
            sink = self._file.write
        self._write = sink

    @staticmethod
    def check(params: SamplingParams) -> None:
        """Refuses, before anything is queued, what a line cannot hold.

        Raises:
            InvalidRequestError: naming the field.
        """
        structure = params.structured_outputs
        if isinstance(structure, CustomStructure):
            kind = type(structure).__name__
            raise InvalidRequestError(FIELD, f"is a {kind}, which is code: a trace cannot hold it")

    def submitted(
        self,
        place: Place,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        seed: int,
        options: RequestOptions,
        capture: tuple[str, ...],
    ) -> None:
        """A request was queued."""
        salt, steering = options.cache_salt, options.steering
        values = {**dataclasses.asdict(params), "seed": seed}
        line = SubmitLine(
            **self._located(place),
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=values,
            priority=options.priority,
            cache_salt=None if salt is None else self._hash(salt),
            hidden_states=options.hidden_states,
            capture=capture,
            steering=None if steering is None else {name: v.tolist() for name, v in steering.vectors.items()},
        )
        self._write(line)

    def cancelled(self, place: Place, request_id: str) -> None:
        """A request was ended."""
        self._write(CancelLine(**self._located(place), request_id=request_id))

    def was_reset(self, place: Place) -> None:
        """The prefix cache was emptied."""
        self._write(ResetLine(**self._located(place)))

    def stepped(
        self,
        turn: int,
        record: StepRecord,
        plan: StepPlan,
        output: ModelRunnerOutput,
        events: Sequence[TokenEvent],
    ) -> None:
        """A step was booked."""
        checksums = output.logits_checksums if self._traces_logits else None
        self._write(step_line(record, plan.entries, list(events), checksums, turn, self._at()))

    @property
    def has_failed(self) -> bool:
        """True once the file could not be written any more."""
        return self._file is not None and self._file.has_failed

    def close(self, place: Place) -> None:
        """The engine was closed."""
        self._write(EndLine(**self._located(place)))
        if self._file is not None:
            self._file.close()

    def _located(self, place: Place) -> dict[str, Any]:
        return {**place._asdict(), "at": self._at()}

    def _at(self) -> float:
        return round(self._clock() - self._began, 6)

    def _hash(self, salt: str) -> str:
        return hashlib.blake2b(salt.encode(), key=self._salt_key, digest_size=16).hexdigest()


def header_of(config: EngineConfig, facts: ModelFacts, resolved: Resolved) -> Header:
    """Under which conditions an engine runs."""
    return Header(
        format=FORMAT,
        pellucid=VERSION,
        run=secrets.token_hex(8),
        part=0,
        created=time.time(),
        model=ModelIdentity(facts.name, facts.fingerprint),
        config=dataclasses.asdict(config),
        resolved=resolved,
        contract=facts.contract,
    )
