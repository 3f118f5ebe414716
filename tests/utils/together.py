"""Calls on threads of their own that begin together. Threads that hang fail the test, and do not keep the process alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

Made = TypeVar("Made")
PATIENCE = 60.0  # seconds; other work on the machine may stop a test for a while


def together(calls: Sequence[Callable[[], Made]], seconds: float = PATIENCE) -> list[Made]:
    """What each call makes. Raises the error of the first that failed."""
    start = threading.Barrier(len(calls))
    made: dict[int, Made] = {}
    errors: dict[int, BaseException] = {}

    def one(number: int, call: Callable[[], Made]) -> None:
        try:
            start.wait(PATIENCE)
            made[number] = call()
        except BaseException as error:
            errors[number] = error

    threads = [threading.Thread(target=one, args=pair, daemon=True) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    for number in sorted(errors):
        raise errors[number]
    assert len(made) == len(calls), f"{len(calls) - len(made)} threads did not end in {seconds:g} seconds"
    return [made[number] for number in range(len(calls))]
