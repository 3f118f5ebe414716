"""`GET /debug/live`: the engine in one small answer, for a reader who asks four times a second.

`/debug/steps` has everything; here each request id stands once, and a step names it by its place in `ids`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

import msgspec

from pellucid.engine.metrics import EngineStats
from pellucid.server.generate.context import ServerContext
from pellucid.trace.records import StepRecord
from pellucid.version import VERSION

FIRST_STEPS = 240  # that a reader gets who has none yet
MAX_STEPS = 512
MAX_WAITING = 64  # requests of the queue that are told one by one


class LiveModel(msgspec.Struct, frozen=True):
    """What does not change while the server runs."""

    name: str
    version: str
    created: int  # unix seconds; another value: the server was started anew
    max_model_len: int
    max_num_seqs: int
    block_size: int
    num_blocks: int


class LiveStep(msgspec.Struct, frozen=True):
    """One step. Requests are places in `LiveView.ids`."""

    step: int
    kind: str
    requests: list[int]  # in batch order
    tokens: list[int]  # computed for each of them
    sampled: list[int]  # got a token
    waiting: list[int]  # the first MAX_WAITING
    num_waiting: int
    preempted: list[int]
    finished: list[int]
    used_blocks: int
    prefix_hits: int
    schedule_ms: float
    execute_ms: float
    output_ms: float
    idle_ms: float


class LiveWaiting(msgspec.Struct, frozen=True):
    """One request of the queue, and why it waits."""

    id: str
    reason: str


class LiveStats(msgspec.Struct, frozen=True):
    """The state of now, and counters since the start."""

    running: int
    waiting: int
    waiting_by_reason: dict[str, int]
    used_blocks: int
    cached_blocks: int  # free, but the prefix cache can still give them away
    preemptions: int
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int
    prefix_hits: int
    steps: int


class LiveView(msgspec.Struct, frozen=True):
    """The answer. `seconds` is a clock that only goes forward; `next` is the `since` of the next question."""

    seconds: float
    draining: bool
    model: LiveModel
    stats: LiveStats
    ids: list[str]
    steps: list[LiveStep]
    queue: list[LiveWaiting]
    next: int


async def live_view(context: ServerContext, since: int | None) -> LiveView:
    """The engine at this moment, and its steps from number `since` on; without one, the newest."""
    engine = context.engine
    newest = engine.steps(-FIRST_STEPS, FIRST_STEPS) if since is None else engine.steps(since, MAX_STEPS)
    stats, records = await asyncio.gather(engine.stats(), newest)
    ids = _Ids()
    return LiveView(
        seconds=time.monotonic(),
        draining=context.draining,
        model=_model(context),
        stats=_stats(stats),
        steps=[_step(record, ids) for record in records],
        ids=ids.names,
        queue=_queue(stats, records),
        next=records[-1].step + 1 if records else (since or 0),
    )


class _Ids:
    """Gives each name its place."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def places(self, names: Iterable[str]) -> list[int]:
        return [self._places.setdefault(name, len(self._places)) for name in names]


def _model(context: ServerContext) -> LiveModel:
    engine = context.engine
    return LiveModel(
        name=context.names[0],
        version=VERSION,
        created=engine.created,
        max_model_len=engine.model.max_model_len,
        max_num_seqs=engine.config.max_num_seqs,
        block_size=engine.kv_cache.block_size,
        num_blocks=engine.kv_cache.num_blocks,
    )


def _stats(stats: EngineStats) -> LiveStats:
    return LiveStats(
        running=stats.num_running,
        waiting=stats.num_waiting,
        waiting_by_reason=stats.waiting_by_reason,
        used_blocks=int(stats.kv_cache["used_blocks"]),
        cached_blocks=stats.num_cached_blocks,
        preemptions=stats.num_preemptions,
        prompt_tokens=stats.prompt_tokens,
        generation_tokens=stats.generation_tokens,
        prefix_queries=stats.prefix_queries,
        prefix_hits=stats.prefix_hits,
        steps=stats.num_steps,
    )


def _step(record: StepRecord, ids: _Ids) -> LiveStep:
    return LiveStep(
        step=record.step,
        kind=record.kind,
        requests=ids.places(record.tokens),
        tokens=list(record.tokens.values()),
        sampled=ids.places(record.request_outputs),
        waiting=ids.places(record.waiting[:MAX_WAITING]),
        num_waiting=len(record.waiting),
        preempted=ids.places(record.preempted),
        finished=ids.places(record.finished_requests),
        used_blocks=record.n_used_blocks,
        prefix_hits=record.n_prefix_hits,
        schedule_ms=_ms(record.schedule_seconds),
        execute_ms=_ms(record.execute_seconds),
        output_ms=_ms(record.output_seconds),
        idle_ms=_ms(record.idle_seconds),
    )


def _queue(stats: EngineStats, records: Sequence[StepRecord]) -> list[LiveWaiting]:
    """As the newest step saw it; empty when nobody waits any more."""
    if not (stats.num_waiting and records):
        return []
    last = records[-1]
    return [LiveWaiting(name, last.waiting_reasons[name]) for name in last.waiting[:MAX_WAITING]]


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
