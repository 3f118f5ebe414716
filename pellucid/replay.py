"""Running a trace again, and comparing what comes with what came.

Under the settings of the recording every step must be the same: plan, tokens, checksums of logits. Under settings that change
plans, such as another number of tokens a step, each request's tokens and checksums must be; the arithmetic of a request does
not depend on how it is scheduled.
"""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pellucid.api.hidden_states import CaptureParams, SteeringParams
from pellucid.api.request_options import RequestOptions
from pellucid.api.sampling_params import SamplingParams
from pellucid.config import EngineConfig
from pellucid.contract.facts import ModelFacts
from pellucid.engine.engine import LLMEngine
from pellucid.errors import ConfigError, InvalidRequestError, TraceError, about
from pellucid.executor.registry import make_executor
from pellucid.text.tokenizer import Tokenizer
from pellucid.trace.lines import (
    CancelLine,
    Ending,
    EndLine,
    Header,
    Line,
    ResetLine,
    StepLine,
    SubmitLine,
)
from pellucid.trace.reader import TraceReader
from pellucid.trace.timeline import choice_ids

# What of a contract must be as it was recorded.
_CONTRACT = ("recipe", "weights", "formats", "rotary", "tokenizer", "adapter")
# Settings that change no plan: with any of them changed, steps are still compared one by one.
_NEUTRAL = {
    *(
        "model",
        "tokenizer",
        "dtype",
        "quantization",
        "kv_cache_dtype",
        "isa",
        "device",
        "distributed_executor_backend",
        "num_threads",
        "enforce_eager",
    ),
    *(
        "verify",
        "program_cache_max_mb",
        "seed",
        "hidden_states",
        "hidden_states_max_mb",
        "trace_path",
        "trace_max_mb",
        "trace_logits",
    ),
}
# What of a step is its plan, in the order in which it is compared; a difference in what a step found comes out in these first.
_PLAN = ("step", "preempted", "entries", "waiting", "head_reason", "kind", "tkv")
_QUEUES = ("running", "n_reserved_blocks", "n_used_blocks", "n_free_blocks", "n_prefix_hits")


@dataclass(frozen=True)
class Difference:
    """The first thing that came otherwise."""

    place: str  # in the trace
    step: int
    request_id: str | None
    what: str
    expected: Any
    found: Any

    def __str__(self) -> str:
        request = "" if self.request_id is None else f", request {self.request_id}"
        return (
            f"step {self.step:,}{request}: {self.what}: the trace has {_shown(self.expected)}, the replay {_shown(self.found)} "
            f"({self.place})"
        )


@dataclass
class ReplayReport:
    """What was compared, and the first difference, if any. `cut_off` says where a trace without an end stops."""

    compares_plans: bool
    compares_logits: bool
    num_requests: int = 0
    num_cancelled: int = 0
    num_preempted: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    num_logits: int = 0
    cut_off: str = ""
    difference: Difference | None = None
    recorded_by: str = ""  # version of Pellucid

    @property
    def is_equal(self) -> bool:
        """True when nothing came otherwise."""
        return self.difference is None


class _FoundDifferenceError(Exception):
    def __init__(self, difference: Difference) -> None:
        super().__init__(str(difference))
        self.difference = difference


def replay(
    path: str,
    *,
    model: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **overrides: Any,
) -> ReplayReport:
    """Runs a trace again and gives what was compared.

    Args:
        model: where the model lies now; by default where it lay.
        progress: as of `load_engine`.
        overrides: fields of `EngineConfig` that differ from the recording's.

    Raises:
        TraceError: the trace is damaged, or is of another model.
        ConfigError, ModelNotFoundError: what cannot be loaded, and why.
    """
    trace = TraceReader(path)
    with about(os.path.basename(path)):
        return _replay(trace, model, progress, overrides)


def _replay(
    trace: TraceReader,
    model: str | None,
    progress: Callable[[int, int], None] | None,
    overrides: Mapping[str, Any],
) -> ReplayReport:
    if not trace.is_whole:
        raise TraceError(
            f"the beginning of the trace is gone: part {trace.header.part} is the oldest that was kept; a larger "
            f"trace_max_mb (it was {trace.header.config.get('trace_max_mb')}) keeps more"
        )
    config = _config_of(trace.header, model, overrides)
    lines: deque[StepLine] = deque()

    def sink(line: Line) -> None:
        if isinstance(line, StepLine):
            lines.append(line)

    executor = make_executor(config, progress)
    try:
        tokenizer = Tokenizer.of(executor.facts)
        engine = LLMEngine(config, executor, tokenizer, trace_sink=sink)
    except BaseException:
        executor.close()
        raise
    try:
        _check_contract(trace.header, executor.facts)
        has_logits = bool(trace.header.config.get("trace_logits")) and config.trace_logits
        report = ReplayReport(_keeps_plans(trace.header, config), has_logits, recorded_by=trace.header.pellucid)
        kind = _PlanReplay if report.compares_plans else _TokenReplay
        kind(trace, engine, lines, report).run()
        return report
    finally:
        engine.close()


class _Replay:
    """Gives an engine the commands of a trace. What is done with its steps is for the kinds to say."""

    def __init__(self, trace: TraceReader, engine: LLMEngine, made: deque[StepLine], report: ReplayReport) -> None:
        self.trace, self.engine, self.made, self.report = trace, engine, made, report
        self._known: set[str] = set()
        self._handlers: Mapping[type[Any], Callable[[str, Any], None]] = {
            SubmitLine: self._submit,
            CancelLine: self._cancel,
            ResetLine: self._reset,
            StepLine: self.compare,
            EndLine: self._end,
        }

    def run(self) -> None:
        """All of the trace, or up to the first difference."""
        try:
            for place, line in self.trace.lines():
                self._handlers[type(line)](place, line)
            self.finish()
        except _FoundDifferenceError as found:
            self.report.difference = found.difference
        else:
            self.report.cut_off = self.trace.end

    # ---- what the kinds do ----------------------------------------------------------------------------------------

    def come_to(self, place: str, line: SubmitLine | CancelLine | ResetLine | EndLine) -> None:
        """Steps until the engine stands where it stood when the command came."""
        raise NotImplementedError

    def submitted(self, line: SubmitLine) -> None:
        """A request was queued."""

    def compare(self, place: str, line: StepLine) -> None:
        """Takes in a step of the trace."""
        raise NotImplementedError

    def finish(self) -> None:
        """The trace has no more lines."""

    # ---- commands -------------------------------------------------------------------------------------------------

    def _submit(self, place: str, line: SubmitLine) -> None:
        self.come_to(place, line)
        self.report.num_requests += 1
        try:
            self.engine.add_request(
                line.prompt_token_ids,
                SamplingParams.from_dict(line.params),
                request_id=line.request_id,
                options=RequestOptions(
                    line.priority,
                    line.cache_salt,
                    line.hidden_states,
                    CaptureParams(line.capture) if line.capture else None,
                    SteeringParams.from_request(line.steering),
                ),
                stream=False,
            )
        except (InvalidRequestError, TypeError) as error:
            raise TraceError(f"{place}: the request cannot be queued: {error}") from None
        self._known.add(line.request_id)
        self.submitted(line)

    def _cancel(self, place: str, line: CancelLine) -> None:
        self.come_to(place, line)
        if line.request_id not in self._known:
            raise TraceError(f"{place}: it cancels {line.request_id!r}, which was never submitted")
        self.report.num_cancelled += 1
        was_there = self.engine.cancel(line.request_id)
        self.engine.take_ended()
        if not was_there and self.report.compares_plans:
            self.fail(place, line.step, line.request_id, "what a cancel met", "a request", "one that has ended")

    def _reset(self, place: str, line: ResetLine) -> None:
        self.come_to(place, line)
        if not self.engine.reset_prefix_cache() and self.report.compares_plans:
            self.fail(place, line.step, None, "reset of the prefix cache", "possible", "refused: blocks are held")

    def _end(self, place: str, line: EndLine) -> None:
        self.come_to(place, line)

    # ---- parts ----------------------------------------------------------------------------------------------------

    def fail(self, place: str, step: int, request_id: str | None, what: str, expected: object, found: object) -> None:
        """The replay ends here."""
        raise _FoundDifferenceError(Difference(place, step, request_id, what, expected, found))


class _PlanReplay(_Replay):
    """Step by step: each line of a step is met by the next that the engine makes."""

    def come_to(self, place: str, line: SubmitLine | CancelLine | ResetLine | EndLine) -> None:
        while self.engine.turn < line.turn and self.engine.can_step and not self.made:
            self.engine.step()
        if self.made:
            self.fail(place, self.made[0].step, None, "the next line", f"a {_tag(line)} at turn {line.turn}", "a step")
        if self.engine.turn != line.turn:
            self.fail(place, line.step, None, f"turns before a {_tag(line)}", line.turn, self.engine.turn)

    def compare(self, place: str, line: StepLine) -> None:
        while not self.made and self.engine.turn < line.turn and self.engine.can_step:
            self.engine.step()
        if not self.made:
            self.fail(place, line.step, None, "the next line", f"step {line.step}", "nothing more to do")
        self._compare(place, line, self.made.popleft())

    def _compare(self, place: str, line: StepLine, made: StepLine) -> None:
        self.report.num_steps += 1
        self.report.num_preempted += len(line.preempted)
        for name in _PLAN:
            if getattr(line, name) != getattr(made, name):
                self._fail_plan(place, line, made, name)
        self._compare_tokens(place, line, made)
        for name in (*_QUEUES, "turn"):
            if getattr(line, name) != getattr(made, name):
                self._fail_plan(place, line, made, name)

    def _compare_tokens(self, place: str, line: StepLine, made: StepLine) -> None:
        pairs = {"tokens": (line.new_token_ids, made.new_token_ids)}
        if line.logits is not None and made.logits is not None:
            pairs = {"checksums of the logits": (line.logits, made.logits), **pairs}
        for what, (expected, found) in pairs.items():
            for entry, some, others in zip(line.entries, expected, found, strict=True):
                if some != others:
                    first = entry.start + entry.num_tokens - len(entry.draft_token_ids)
                    self.fail(place, line.step, entry.request_id, f"{what} from position {first:,} on", some, others)
        self.report.num_tokens += sum(map(len, line.new_token_ids))
        self.report.num_logits += sum(map(len, line.logits or ()))
        for name in {**line.finished, **made.finished}:
            some_end, other_end = _ending(line.finished.get(name)), _ending(made.finished.get(name))
            if some_end != other_end:
                self.fail(place, line.step, name, "its end", some_end, other_end)

    def _fail_plan(self, place: str, line: StepLine, made: StepLine, name: str) -> None:
        expected, found, request_id = getattr(line, name), getattr(made, name), None
        if name == "entries":
            at = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), None)
            at = min(len(expected), len(found)) if at is None else at
            expected, found = _nth(expected, at), _nth(found, at)
            request_id = (expected or found).request_id
        self.fail(place, line.step, request_id, f"the plan's {name}", expected, found)


@dataclass
class _Stream:
    """One choice: what the trace has and the replay has not met yet, and the other way round."""

    expected: deque[tuple[str, int, int, int | None]] = field(default_factory=deque)  # place, step, token, checksum
    found: deque[tuple[int, int | None]] = field(default_factory=deque)
    num_equal: int = 0
    expected_end: tuple[str, int, Any] | None = None  # place, step, ending
    found_end: Any = None


class _TokenReplay(_Replay):
    """Request by request: commands come when the replay has made all tokens that the trace had by then."""

    def __init__(self, trace: TraceReader, engine: LLMEngine, made: deque[StepLine], report: ReplayReport) -> None:
        super().__init__(trace, engine, made, report)
        self._streams: dict[str, _Stream] = {}
        self._num_owed = 0  # tokens and ends that the trace has and the replay has not

    def come_to(self, place: str, line: SubmitLine | CancelLine | ResetLine | EndLine) -> None:
        self._catch_up()

    def submitted(self, line: SubmitLine) -> None:
        self._streams.update((name, _Stream()) for name in choice_ids(line))

    def compare(self, place: str, line: StepLine) -> None:
        self.report.num_steps += 1
        self.report.num_preempted += len(line.preempted)
        sums = line.logits or [[] for _ in line.entries]
        for entry, tokens, some in zip(line.entries, line.new_token_ids, sums, strict=True):
            stream = self._streams.get(entry.request_id)
            if stream is None:
                if tokens:
                    raise TraceError(f"{place}: the step has {entry.request_id!r}, which does not run")
                continue  # it ended while this step was in flight
            for index, token in enumerate(tokens):
                stream.expected.append((place, line.step, token, _nth(some, index)))
            self._num_owed += len(tokens)
            self._match(entry.request_id, stream)
        for name, ending in line.finished.items():
            stream = self._streams.get(name)
            if stream is None or stream.expected_end is not None:
                raise TraceError(f"{place}: the step ends {name!r}, which does not run")
            stream.expected_end = (place, line.step, _ending(ending))
            self._num_owed += 1
            self._match(name, stream)

    def _catch_up(self) -> None:
        while self._num_owed > 0 and self.engine.can_step:
            self.engine.step()
            self._take_made()

    def finish(self) -> None:
        self._catch_up()
        for name, stream in self._streams.items():
            if stream.expected:
                place, step, token, _ = stream.expected[0]
                self.fail(place, step, name, f"token {stream.num_equal:,}", token, f"the end: {stream.found_end}")

    def _take_made(self) -> None:
        while self.made:
            line = self.made.popleft()
            sums = line.logits or [[] for _ in line.entries]
            for entry, tokens, some in zip(line.entries, line.new_token_ids, sums, strict=True):
                if tokens:
                    stream = self._streams[entry.request_id]
                    stream.found += [(token, _nth(some, index)) for index, token in enumerate(tokens)]
                    self._match(entry.request_id, stream)
            for name, ending in line.finished.items():
                self._streams[name].found_end = _ending(ending)
                self._match(name, self._streams[name])

    def _match(self, name: str, stream: _Stream) -> None:
        while stream.expected and stream.found:
            (place, step, token, checksum), (other, other_sum) = stream.expected.popleft(), stream.found.popleft()
            self._num_owed -= 1
            if checksum is not None and other_sum is not None:
                self.report.num_logits += 1
                if checksum != other_sum:
                    what = f"checksum of the logits of token {stream.num_equal:,}"
                    self.fail(place, step, name, what, checksum, other_sum)
            if token != other:
                self.fail(place, step, name, f"token {stream.num_equal:,}", token, other)
            stream.num_equal += 1
            self.report.num_tokens += 1
        self._match_ends(name, stream)

    def _match_ends(self, name: str, stream: _Stream) -> None:
        if stream.expected_end is None or stream.expected:
            return
        place, step, ending = stream.expected_end
        if stream.found:
            self.fail(place, step, name, f"token {stream.num_equal:,}", f"the end: {ending}", stream.found[0][0])
        if stream.found_end is not None:
            if stream.found_end != ending:
                self.fail(place, step, name, "its end", ending, stream.found_end)
            del self._streams[name]
            self._num_owed -= 1


def _config_of(header: Header, model: str | None, overrides: Mapping[str, Any]) -> EngineConfig:
    """The recording's settings, with what it took from the machine said, under what is asked for now."""
    recorded = dict(header.config)
    resolved = header.resolved
    values = {
        **recorded,
        "max_model_len": resolved.max_model_len,
        "num_blocks": resolved.num_blocks,
        "isa": resolved.isa,
        **overrides,
        "trace_path": None,  # the trace that is read is not the one to write
    }
    name = model or values.get("model")
    if not isinstance(name, str):
        raise TraceError(f"the settings of the trace have the model {_shown(name)}; it must be a text")
    values.pop("model", None)
    try:
        return EngineConfig.from_kwargs(name, values)
    except (ConfigError, TypeError) as error:
        raise TraceError(f"the settings of the trace cannot be used here: {error}") from None


def _keeps_plans(header: Header, config: EngineConfig) -> bool:
    resolved = {"max_model_len": header.resolved.max_model_len, "num_blocks": header.resolved.num_blocks}
    recorded = {**header.config, **resolved}
    now = dataclasses.asdict(config)
    return all(name in _NEUTRAL or recorded.get(name, value) == value for name, value in now.items())


def _check_contract(header: Header, facts: ModelFacts) -> None:
    """Refuses what cannot give the same bits. Other kernels and another type of cache may be asked for: then the replay says what
    differs."""
    recorded, here = header.contract, facts.contract
    if recorded is None:  # of a version that named none: its recipe was 1
        recorded = msgspec.structs.replace(here, recipe=1)
    for name in _CONTRACT:
        then, now = getattr(recorded, name), getattr(here, name)
        if then != now:
            raise TraceError(
                f"the trace is of model {header.model.name} with {name} {_shown(then)}; {facts.name} with this precision has "
                f"{_shown(now)}"
            )


def _ending(ending: Ending | None) -> tuple[str, int | str | None] | None:
    """What must be equal of an end: the text of an error may name what is by chance."""
    return None if ending is None else (ending.reason, ending.stop_reason)


def _nth(items: Any, index: int) -> Any:
    return items[index] if index < len(items) else None


def _tag(line: Line) -> str:
    return str(line.__struct_config__.tag)


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
