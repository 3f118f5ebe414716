"""`PlanWorker`: one thread that executes plans in order, so that its owner can prepare the next one meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, Thread
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Made = TypeVar("Made")


class Task(Generic[Asked, Made]):
    """One thing that is executed, now or later."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._made: list[Made] = []
        self._error: BaseException | None = None
        self._is_done = Event()

    def run(self, execute: Callable[[Asked], Made]) -> None:
        """Executes it. An error belongs to whoever asks for the result."""
        try:
            self._made.append(execute(self._asked))
        except BaseException as error:
            self._error = error
        self._is_done.set()

    def wait(self) -> None:
        """Returns when it was executed."""
        self._is_done.wait()

    def result(self) -> Made:
        """What was made; waits for it. Raises what the execution raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._made[0]


class PlanWorker(Generic[Asked, Made]):
    """Calls `execute` on each thing that was put, in order, on a thread of its own."""

    def __init__(self, execute: Callable[[Asked], Made]) -> None:
        self._tasks: SimpleQueue[Task[Asked, Made] | None] = SimpleQueue()
        # The thread knows the queue alone, so that a worker that is dropped without `close` ends it too.
        work = (execute, self._tasks)
        self._thread = Thread(target=_work, args=work, name="pellucid-executor", daemon=True)
        self._thread.start()

    def put(self, asked: Asked) -> Task[Asked, Made]:
        """Has it executed after all that was put before; returns at once."""
        task: Task[Asked, Made] = Task(asked)
        self._tasks.put(task)
        return task

    def close(self) -> None:
        """Lets what was put come to its end, then ends the thread. Harmless when called again."""
        self._tasks.put(None)
        self._thread.join()

    def __del__(self) -> None:
        self._tasks.put(None)


def _work(execute: Callable[[Asked], Made], tasks: SimpleQueue[Task[Asked, Made] | None]) -> None:
    while (task := tasks.get()) is not None:
        task.run(execute)
        del task  # nothing is kept alive while the thread waits
