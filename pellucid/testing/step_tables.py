"""Steps as tables: a scenario in words, who comes when, and what the engine's state is after how many steps. For any policy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from pellucid.api.outputs import RequestOutput
from pellucid.api.request_options import RequestOptions
from pellucid.api.sampling_params import SamplingParams
from pellucid.engine.engine import LLMEngine
from pellucid.errors import ConfigError, InvalidRequestError
from pellucid.trace.records import StepRecord

_COLUMNS = frozenset(entry.name for entry in fields(StepRecord)) - {"step"}
_BEFORE = StepRecord(step=-1, kind="none")


@dataclass(frozen=True)
class TableRequest:
    """One request of a scenario: greedy, end tokens ignored, unless `params` say otherwise.

    `prompt`: token ids, or a length, for tokens that no other request of the table begins with. `at`, `cancel_at`: after how many
    steps it is submitted and cancelled. `refused`: what the refusal must say, where it is refused.
    """

    request_id: str
    prompt: int | Sequence[int]
    max_tokens: int
    at: int = 0
    cancel_at: int | None = None
    priority: int = 0
    refused: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    def sampling_params(self) -> SamplingParams:
        """Of this request."""
        given = {"temperature": 0.0, "ignore_eos": True, "max_tokens": self.max_tokens, **self.params}
        return SamplingParams(**given)


class TableRow(NamedTuple):
    """After `after` steps, and with what is submitted and cancelled then: values by the names of `StepRecord`.

    `waiting` and `running` are the queues as they stand; all others are of the step before. What is not named is not compared.
    """

    after: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class StepTable:
    """A scenario and its rows, by ascending `after`. A step that has no row looks as the row before it says, with `tkv` one higher
    for each step.

    `engine`: settings of `EngineConfig` that the scenario stands on.

    Raises:
        ValueError: a column is no field of `StepRecord`, or the rows are not in order.
    """

    name: str
    scenario: str
    requests: Sequence[TableRequest]
    rows: Sequence[TableRow]
    engine: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = {name for row in self.rows for name in row.values} - _COLUMNS
        if unknown:
            raise ValueError(
                f"table {self.name!r} has the column {min(unknown)!r}; known: {', '.join(sorted(_COLUMNS))}"
            )
        steps = [row.after for row in self.rows]
        if not steps or steps != sorted(set(steps)) or steps[0] < 0:
            raise ValueError(f"table {self.name!r} has rows after {steps} steps; they must ascend from 0 or more")

    def expected(self, after: int) -> dict[str, Any]:
        """What must hold after so many steps; nothing before the first row."""
        row = max((row for row in self.rows if row.after <= after), key=lambda row: row.after, default=None)
        if row is None:
            return {}
        values = dict(row.values)
        if values.get("tkv"):
            values["tkv"] += after - row.after
        return values


def load_step_table(path: str | Path) -> StepTable:
    """A table from JSON: `name`, `scenario`, `engine`, `requests` (objects with the fields of `TableRequest`), `columns` (`after`
    first) and `rows` (lists, in the order of the columns).

    Raises:
        ConfigError: the file cannot be read, or is no such table.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [TableRow(after, dict(zip(data["columns"][1:], values, strict=True))) for after, *values in data["rows"]]
        requests = [TableRequest(**request) for request in data["requests"]]
        return StepTable(data["name"], data["scenario"], requests, rows, data.get("engine", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is no step table: {type(error).__name__}: {error}") from error


def check_step_table(engine: LLMEngine, table: StepTable) -> dict[str, RequestOutput]:
    """Runs a scenario on an idle engine, step by step up to its last row, and gives the outputs of those that were not refused.

    Raises:
        AssertionError: naming the step, the column, what is expected and what is there; also when something is left to do behind
            the last row, or a request was not refused as it should be.
    """
    if engine.has_unfinished:
        raise ValueError("the engine has unfinished requests; a table begins with an idle one")
    run = _Run(engine, table)
    for after in range(table.rows[-1].after + 1):
        run.arrivals(after)
        run.compare(after)
        if after < table.rows[-1].after:
            run.step()
    run.check_end()
    return run.outputs


class _Run:
    """A scenario on its way."""

    def __init__(self, engine: LLMEngine, table: StepTable) -> None:
        self._engine, self._table = engine, table
        self._record = _BEFORE
        self.outputs: dict[str, RequestOutput] = {}

    def arrivals(self, after: int) -> None:
        for index, request in enumerate(self._table.requests):
            if request.at == after:
                self._submit(index, request)
        for request in self._table.requests:
            if request.cancel_at == after and not self._engine.cancel(request.request_id):
                self._fail(after, f"{request.request_id!r} cannot be cancelled: it is unknown or has ended")

    def _submit(self, index: int, request: TableRequest) -> None:
        prompt = self._prompt(index, request.prompt) if isinstance(request.prompt, int) else list(request.prompt)
        try:
            self._engine.add_request(
                prompt,
                request.sampling_params(),
                request_id=request.request_id,
                options=RequestOptions(priority=request.priority),
            )
        except InvalidRequestError as error:
            if request.refused is None or request.refused not in str(error):
                self._fail(request.at, f"{request.request_id!r} was refused: {error}; expected: {request.refused}")
            return
        if request.refused is not None:
            self._fail(request.at, f"{request.request_id!r} was taken; it should be refused: {request.refused}")

    def _prompt(self, index: int, length: int) -> list[int]:
        """The first token is the request's own, so that no beginning is shared."""
        return [(index + 7 * position) % self._engine.vocab_size for position in range(length)]

    def step(self) -> None:
        before = self._engine.trace.last
        for output in self._engine.step().finished:
            self.outputs[output.request_id] = output
        last = self._engine.trace.last
        self._record = _BEFORE if last is None or last is before else last

    def compare(self, after: int) -> None:
        for name, value in self._table.expected(after).items():
            found = self._found(name)
            if found != value:
                self._fail(after, f"{name} is {found!r}; expected {value!r}", f"the last step was {self._record}")

    def _found(self, name: str) -> Any:
        scheduler = self._engine.scheduler
        if name == "waiting":
            return list(scheduler.waiting_ids)
        if name == "running":
            return [request.request_id for request in scheduler.running]
        found = getattr(self._record, name)
        return dict(found) if isinstance(found, Mapping) else found

    def check_end(self) -> None:
        after = self._table.rows[-1].after
        if self._engine.has_unfinished:
            self._fail(after, "the table ends, but the engine has more to do")
        missing = [
            one.request_id for one in self._table.requests if not (one.refused or one.request_id in self.outputs)
        ]
        if missing:
            self._fail(after, f"{missing} did not end")

    def _fail(self, after: int, *problems: str) -> None:
        raise AssertionError(
            "\n".join([f"table {self._table.name!r}, after {after} steps: {problems[0]}", *problems[1:]])
        )
