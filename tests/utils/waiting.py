"""Waiting for something that another thread or process does, with an end."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 120.0  # seconds; the machine may stand still for a while


def until(is_so: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Returns when `is_so()` holds; the test fails when that does not come. `what` says what was waited for."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s"
        time.sleep(0.01)
