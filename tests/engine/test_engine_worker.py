"""The thread that executes plans: in order, errors to whoever asks, and no thread left behind."""

from __future__ import annotations

import gc
import threading

import pytest

from pellucid.executor.worker import PlanWorker


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "pellucid-executor"]


def test_things_put_when_one_fails_then_its_error_is_its_own_and_the_others_are_made_in_order() -> None:
    made: list[int] = []

    def execute(asked: int) -> int:
        made.append(asked)
        return 10 // asked

    worker: PlanWorker[int, int] = PlanWorker(execute)
    tasks = [worker.put(asked) for asked in (5, 0, 2)]
    assert tasks[2].result() == 5
    assert tasks[0].result() == 2
    with pytest.raises(ZeroDivisionError):
        tasks[1].result()
    assert made == [5, 0, 2]
    worker.close()


def test_put_when_the_one_before_still_runs_then_it_returns_at_once() -> None:
    may_end = threading.Event()
    worker: PlanWorker[bool, bool] = PlanWorker(lambda waits: may_end.wait(60) if waits else True)
    first, second = worker.put(True), worker.put(False)
    may_end.set()
    assert first.result()
    assert second.result()
    worker.close()


def test_worker_when_closed_twice_or_dropped_then_its_thread_ends() -> None:
    before = len(threads())
    worker: PlanWorker[int, int] = PlanWorker(abs)
    task = worker.put(-3)
    worker.close()
    worker.close()
    assert task.result() == 3
    assert len(threads()) == before
    dropped: PlanWorker[int, int] = PlanWorker(abs)
    assert dropped.put(-4).result() == 4
    thread = next(thread for thread in threading.enumerate() if thread.name == "pellucid-executor")
    del dropped
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
