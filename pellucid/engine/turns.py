"""`Turns`: how the threads of a process share an engine. One at a time has the turn, and takes the steps of all.

Nobody waits for the turn. A thread says what it wants done and tries to take the turn; if another has it, that one does it
between two steps. A thread that waits for outputs takes the turn and steps until it has its own; the others sleep. Each is woken
by what comes for it, and when the one that steps has what it wanted, it wakes another to go on. So every step carries the
requests of all threads, a command waits for one step at most, and no order of locks can be wrong: the one lock is only ever tried.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from threading import Lock, current_thread, get_ident
from typing import Any, Generic, TypeVar

from pellucid.errors import EngineDeadError, WrongThreadError
from pellucid.owners import Home, uninterrupted

Made = TypeVar("Made")


class Waiter:
    """A thread that waits for something that steps bring. Compared by identity."""

    def __init__(self) -> None:
        # Putting may be done anywhere, also in a signal handler or a finaliser that runs inside another put or get.
        self._bell: SimpleQueue[None] = SimpleQueue()

    def is_ready(self) -> bool:
        """True when there is nothing to wait for."""
        raise NotImplementedError

    def wake(self) -> None:
        """Has the thread look again."""
        self._bell.put(None)

    def sleep(self) -> None:
        """Until it is woken."""
        self._bell.get()


class _Asked(Generic[Made]):
    """Something that a thread wants done, and what came of it."""

    def __init__(self, call: Callable[[], Made]) -> None:
        self._call = call
        self._made: list[Made] = []
        self._error: BaseException | None = None
        self._is_done: SimpleQueue[None] = SimpleQueue()

    def carry_out(self) -> None:
        """Errors are for the thread that asked. What is not an `Exception` is for the thread that it hit, too."""
        try:
            self._made.append(self._call())
        except Exception as error:
            self._error = error
        except BaseException as error:
            self._error = EngineDeadError(f"interrupted by {type(error).__name__}")
            raise
        finally:
            self._is_done.put(None)

    def result(self) -> Made:
        """Waits for it. Raises what it raised."""
        self._is_done.get()
        if self._error is not None:
            raise self._error
        return self._made[0]


class Turns:
    """Has commands carried out and steps taken, by whichever thread has the turn. `step` is False when there was nothing to do.

    `error` is why nobody need wait any longer: the engine was closed, or has failed.
    """

    def __init__(self, what: str, step: Callable[[], bool]) -> None:
        self._home, self._what, self._step = Home(what), what, step
        self._lock = Lock()  # tried, never waited for
        self._ident: int | None = None  # of the thread that has the turn
        self._asked: deque[_Asked[Any]] = deque()
        self._sleepers: dict[Waiter, None] = {}  # in the order in which they came
        self._rung: list[Waiter] = []  # something came for them in the step that runs
        self.error: EngineDeadError | None = None

    @property
    def is_mine(self) -> bool:
        """True on the thread that has the turn: in a step, in a command, or in what the interpreter runs in their middle."""
        return self._ident == get_ident()

    @property
    def is_left(self) -> bool:
        """True in a process that was forked from the one of these threads."""
        return self._home.is_left

    # ---- for any thread -------------------------------------------------------------------------------------------

    def run(self, name: str, call: Callable[[], Made]) -> Made:
        """As an `Owner`: at once on the thread that has the turn, else as `do`."""
        return call() if self.is_mine and not self.is_left else self.do(call)

    def do(self, call: Callable[[], Made]) -> Made:
        """Has it done between two steps, and waits for that.

        Raises:
            WrongThreadError: called from within a step or a command, which it would wait for.
            ForkedError: this process was forked from the one of these threads.
        """
        self.check()
        asked = _Asked(call)
        with uninterrupted():
            self._asked.append(asked)
            self._look()
            return asked.result()

    def post(self, call: Callable[[], object]) -> None:
        """Has it done soon, and does not wait: for finalisers and signal handlers, which may run in the middle of anything."""
        if not self.is_left:
            with uninterrupted():
                self._asked.append(_Asked(call))
                self._look()

    def wait(self, waiter: Waiter) -> None:
        """Returns when the waiter is ready: takes steps, or sleeps while another thread does.

        Raises:
            EngineDeadError: it will never be.
            WrongThreadError, ForkedError: as `do`.
        """
        while not waiter.is_ready():
            self.check()
            self.refuse_when_over()
            with uninterrupted(waiter.wake) as shield:
                self._wait(waiter, shield)

    def ring(self, waiter: Waiter) -> None:
        """Something came for this one: said on the thread that has the turn, which wakes it behind the step."""
        self._rung.append(waiter)

    def end(self, error: EngineDeadError) -> None:
        """Nobody need wait any longer; the first reason counts. Does not wait for the step that runs."""
        if self.error is None:
            self.error = error
        for waiter in list(self._sleepers):
            waiter.wake()

    def refuse_when_over(self) -> None:
        """Raises `EngineDeadError` when there is nothing more to wait for."""
        if self.error is not None:
            raise EngineDeadError(str(self.error)) from self.error.__cause__

    def check(self) -> None:
        """Raises `WrongThreadError` or `ForkedError` where this thread must not wait."""
        self._home.check()
        if self.is_mine:
            raise WrongThreadError(
                f"{self._what} was called by thread {current_thread().name!r} from within its own step, for which it would "
                "wait: from a signal handler, a log handler or a callback"
            )

    # ---- the turn -------------------------------------------------------------------------------------------------

    def _wait(self, waiter: Waiter, shield: uninterrupted) -> None:
        try:
            while True:
                # It stands here before it looks and tries: who brings something, or lets go, looks here behind that.
                self._sleepers[waiter] = None
                if self._is_over(waiter, shield):
                    return
                if not self._take():
                    waiter.sleep()
                    continue
                try:
                    del self._sleepers[waiter]
                    self._lead(waiter, shield)
                finally:
                    self._leave()
        finally:
            self._sleepers.pop(waiter, None)
            self._look()  # the next step was perhaps left to this one

    def _is_over(self, waiter: Waiter, shield: uninterrupted) -> bool:
        return waiter.is_ready() or self.error is not None or shield.is_interrupted

    def _lead(self, waiter: Waiter, shield: uninterrupted) -> None:
        self._carry_out()
        while not self._is_over(waiter, shield):
            if not self._step():
                raise EngineDeadError(f"{self._what} has nothing to do, although a thread waits for its outputs")
            self._carry_out()

    def _look(self) -> None:
        """Does what was asked for while nobody had the turn, and sees that somebody steps for those who sleep."""
        try:
            while self._asked and self._take():
                try:
                    self._carry_out()
                finally:
                    self._leave()
        except BaseException:
            self._look()
            raise
        if not self._lock.locked():
            for waiter in list(self._sleepers)[:1]:
                waiter.wake()

    def _take(self) -> bool:
        is_taken = self._lock.acquire(blocking=False)
        if is_taken:
            self._ident = get_ident()
        return is_taken

    def _leave(self) -> None:
        self._wake_rung()
        self._ident = None
        self._lock.release()

    def _carry_out(self) -> None:
        self._wake_rung()
        while self._asked:
            self._asked.popleft().carry_out()
        self._wake_rung()

    def _wake_rung(self) -> None:
        while self._rung:
            waiter = self._rung.pop()
            if waiter in self._sleepers:
                waiter.wake()
