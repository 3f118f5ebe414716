"""Steps as tables: what a scheduler does, row by row."""

from __future__ import annotations

from utils.scheduler_world import World

from pellucid.contract.plan import StepPlan
from pellucid.scheduling.config import SchedulerConfig

# kind, {request: (start, tokens)}, preempted, {waiting request: reason}
Row = tuple[str, dict[str, tuple[int, int]], list[str], dict[str, str]]


def world(
    policy: str = "mixed",
    num_blocks: int = 8,
    block_size: int = 4,
    caching: bool = False,
    max_num_seqs: int = 8,
    budget: int = 16,
    max_model_len: int = 64,
    chunk: int | None = None,
) -> World:
    config = SchedulerConfig(max_num_seqs, budget, max_model_len, policy, chunk)  # type: ignore[arg-type]
    return World(config, num_blocks, block_size, caching)


def prompt_of(start: int, length: int) -> tuple[int, ...]:
    """A prompt that shares its beginning with no other start."""
    return tuple(range(start, start + length))


def row_of(plan: StepPlan) -> Row:
    entries = {entry.request_id: (entry.start, entry.num_tokens) for entry in plan.entries}
    return plan.kind, entries, list(plan.preempted), plan.waiting


def assert_steps(a_world: World, rows: list[Row]) -> None:
    """The next steps are these rows, and then all has ended well."""
    for index, row in enumerate(rows):
        assert row_of(a_world.step()) == row, f"row {index}"
    assert not a_world.scheduler.has_unfinished
    a_world.check_end()
