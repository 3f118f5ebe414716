"""Who may use an object: one thread at a time, or one thread alone, and never a process that was forked from the object's own.

Everything here refuses with a typed error that names the other side. Waiting for a turn is for `engine/turns.py`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial, wraps
from threading import Lock, RLock, Thread, current_thread, get_ident, main_thread
from types import FrameType, TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from pellucid.errors import ForkedError, WrongThreadError

Given = ParamSpec("Given")
Made = TypeVar("Made")
_num_forks = 0  # between the first process and this one, since this module was imported


def _count_fork() -> None:
    global _num_forks
    _num_forks += 1


os.register_at_fork(after_in_child=_count_fork)


class Home:
    """The process in which an object was made. Its threads stay there when it is forked, and a lock may stay locked for ever."""

    __slots__ = ("_num_forks", "_pid", "_what")

    def __init__(self, what: str) -> None:
        self._what, self._pid, self._num_forks = what, os.getpid(), _num_forks

    @property
    def is_left(self) -> bool:
        """True in a process that was forked from that one."""
        return self._num_forks != _num_forks

    def check(self) -> None:
        """Raises `ForkedError` where `is_left`."""
        if self._num_forks != _num_forks:
            raise ForkedError(
                f"{self._what} belongs to process {self._pid}; process {os.getpid()} was forked from it and has none of "
                "its threads. Load the model in this process, or start processes with the method 'spawn'"
            )


class Exclusive:
    """Lets one thread in at a time and refuses all others, who would take its results for theirs.

    Raises:
        WrongThreadError: another thread is inside, by name.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = RLock()  # of the thread inside: it may come in again
        self._inside: Thread | None = None

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            name = self._inside.name if self._inside is not None else ""
            raise WrongThreadError(
                f"{self._what} was called by thread {current_thread().name!r} while thread {name!r} is inside; it is for one "
                "thread at a time"
            )
        self._inside = current_thread()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()


# ---- objects whose methods ask before each call -------------------------------------------------------------------------


class Owner(Protocol):
    """Says whether a call may go on, and makes it."""

    def run(self, name: str, call: Callable[[], Made]) -> Made:
        """Makes a call of the method `name`, or refuses it."""


class SoleOwner:
    """The first thread that calls is the one that may, for as long as it lives."""

    def __init__(self, what: str) -> None:
        self._home = Home(what)
        self._lock = Lock()
        self._ident: int | None = None
        self._thread: Thread | None = None

    def run(self, name: str, call: Callable[[], Made]) -> Made:
        """Makes the call.

        Raises:
            WrongThreadError: another thread is the owner, by name.
            ForkedError: this process was forked from the owner's.
        """
        self._home.check()
        if self._ident != get_ident() or self._thread is not current_thread():
            self._claim(name)
        return call()

    def _claim(self, name: str) -> None:
        with self._lock:
            thread = self._thread
            if thread is not None and thread.is_alive() and thread is not current_thread():
                raise WrongThreadError(
                    f"{name} was called by thread {current_thread().name!r}; thread {thread.name!r} is the owner and alone may "
                    "call it. LLM and AsyncLLMEngine take calls from any thread"
                )
            self._ident, self._thread = get_ident(), current_thread()


class _Owned(Protocol):
    owner: Owner


Self = TypeVar("Self", bound=_Owned)


def owned(method: Callable[Concatenate[Self, Given], Made]) -> Callable[Concatenate[Self, Given], Made]:
    """A method that the object's `owner` is asked about."""

    @wraps(method)
    def call(self: Self, /, *args: Given.args, **kwargs: Given.kwargs) -> Made:
        return self.owner.run(method.__qualname__, partial(method, self, *args, **kwargs))

    return call


# ---- interrupts ---------------------------------------------------------------------------------------------------------

_SIGINT = int(signal.SIGINT)
# What `signal` wraps to turn numbers into enumerations, which takes ten times as long: this is done twice a step.
_signals: Any = sys.modules.get("_signal", signal)


class uninterrupted:  # noqa: N801  (a context manager that reads as a word)
    """Ctrl-C waits for the end of this block, so that it never falls into the middle of a change; a second one does not wait.

    Whatever handler of SIGINT is set is called at the end. On threads other than the main one, where no handler runs, nothing
    happens. `wake` is called when an interrupt has come, for a block that sleeps; `is_interrupted` says so.
    """

    def __init__(self, wake: Callable[[], None] | None = None) -> None:
        self.is_interrupted = False
        self._wake = wake
        self._before: Callable[[int, FrameType | None], Any] | None = None
        self._told: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> uninterrupted:
        if get_ident() == main_thread().ident:
            before = _signals.getsignal(_SIGINT)
            if callable(before):
                self._before = before
                _signals.signal(_SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_interrupted:
            self._restore()
            self._tell()
            handler = _signals.getsignal(_SIGINT)
            if callable(handler):
                handler(number, frame)
            return
        self.is_interrupted, self._told = True, (number, frame)
        if self._wake is not None:
            self._wake()

    def _restore(self) -> None:
        if self._before is not None and _signals.getsignal(_SIGINT) == self._note:
            _signals.signal(_SIGINT, self._before)

    def _tell(self) -> None:
        told, self._told = self._told, None
        if told is not None and self._before is not None:
            self._before(*told)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
        self._tell()
