"""Processes that tests start. None outlives the test, none is waited for without an end, and all hear interrupts.

Nothing else in the tests starts a process: `tests/core/test_suite_children.py` says so.
"""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import psutil
from utils.waiting import PATIENCE, until

SECONDS = 300.0
Command = Sequence[str | bytes | Path]


@contextlib.contextmanager
def child(
    command: Command, *, seconds: float = SECONDS, ignores_interrupts: bool = False, **options: Any
) -> Iterator[subprocess.Popen[Any]]:
    """A process in a session of its own, ended with all that it started when the block is left, for whatever reason.

    It is ended behind `seconds` too, so that whoever reads from it sees the end. Standard output and error are pipes of text
    unless `options`, which are those of `subprocess.Popen`, say otherwise. A shell that puts a test run into the background
    lets it ignore interrupts, and children would inherit that: they hear them unless told to ignore them.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with _interrupts(ignored=ignores_interrupts):
        process = subprocess.Popen(
            [os.fsdecode(part) for part in command], **{**pipes, **options}, start_new_session=True
        )
    limit = threading.Timer(seconds, _end_session, (process.pid,))
    limit.daemon = True
    limit.start()
    try:
        yield process
    finally:
        limit.cancel()
        _end_session(process.pid)
        process.wait(PATIENCE)
        for pipe in (process.stdin, process.stdout, process.stderr):
            _close(pipe)


def finished(
    command: Command,
    *,
    timeout: float = PATIENCE,
    input: str | bytes | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """Runs a process to its end, as `subprocess.run` does; what it leaves behind is ended. With `check` a status other than 0
    fails the test."""
    stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
    with child(command, seconds=timeout + PATIENCE, **{"stdin": stdin, **options}) as process:
        out, errors = process.communicate(input, timeout=timeout)
    assert not check or process.returncode == 0, f"{command} ended with status {process.returncode}: {errors}"
    return subprocess.CompletedProcess(list(command), process.returncode, out, errors)


def forked(work: Callable[[], object], *, seconds: float = PATIENCE) -> int:
    """Calls `work` in a fork of this process. The status is 0 when it returned, and 1 when it raised, with a traceback.

    The fork ends behind the call: it goes on with no test, and does nothing of what this process does at its end. It is ended
    when that takes longer than `seconds`, and the test fails. What it started ends with it.
    """
    sys.stderr.flush()  # else the fork would write it too
    with _interrupts(ignored=False):
        pid = os.fork()
        if pid == 0:
            _exit_with(work)
    try:
        until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "the end of the fork", seconds)
    finally:
        _end_session(pid)
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


class Terminal:
    """A program whose streams are all one terminal; use it in a `with` statement."""

    def __init__(self, command: Command, environment: dict[str, str]) -> None:
        with _interrupts(ignored=False):
            self.pid, self.file = pty.fork()
            if self.pid == 0:  # still within the block: behind it the fork would ignore what this process ignores
                os.environ.update(environment)
                os.execv(command[0], [os.fsdecode(part) for part in command])

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        _end_session(self.pid)
        with contextlib.suppress(ChildProcessError):  # its status was asked for
            os.waitpid(self.pid, 0)
        os.close(self.file)

    def status(self) -> int:
        """Its exit status. The test fails when it does not end."""
        until(self._has_ended, "the end of the program at the terminal")
        return os.waitstatus_to_exitcode(self._status)

    def _has_ended(self) -> bool:
        pid, self._status = os.waitpid(self.pid, os.WNOHANG)
        return pid == self.pid


def _exit_with(work: Callable[[], object]) -> NoReturn:
    status = 1
    try:
        os.setsid()
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


@contextlib.contextmanager
def _interrupts(*, ignored: bool) -> Iterator[None]:
    """What a process started inside does with interrupts: a signal that is handled here has its default there."""
    before = signal.getsignal(signal.SIGINT)
    wanted = signal.SIG_IGN if ignored else signal.default_int_handler
    if (before is signal.SIG_IGN) == ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, wanted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_session(leader: int) -> None:
    """Kills a session's leader and all that it started, those with sessions of their own among them."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(leader)
        family = [process, *process.children(recursive=True)]
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _close(pipe: IO[Any] | None) -> None:
    if pipe is not None:
        with contextlib.suppress(BrokenPipeError):  # what was not flushed before goes nowhere now
            pipe.close()
