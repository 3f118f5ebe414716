"""Numbers on their way to the core, which computes in float32: all of them are checked here, as given and as it will read them.

A number that is well in its range as Python's double may be zero or infinite as a float32, and what is computed with it is then
something else than what was checked.
"""

from __future__ import annotations

from ctypes import c_double, c_float
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

CoreType = type[c_float] | type[c_double]


class Range(NamedTuple):
    """What a number must satisfy; `text` completes the sentence "it must be …"."""

    low: float
    high: float
    text: str
    above_low: bool = False  # the low end itself is refused
    core: CoreType = c_float  # what the core reads it as

    def holds(self, value: float) -> bool:
        """Whether the number is in the range, both as it is given and as the core reads it. False for NaN."""
        low, high = self.core(self.low).value, self.core(self.high).value
        if not _lies_in(value, min(low, self.low), max(high, self.high), self.above_low):
            return False  # integers too large for a float compare exactly
        return _lies_in(self.core(float(value)).value, low, high, self.above_low)


def _lies_in(value: float, low: float, high: float, above_low: bool) -> bool:
    return (low < value if above_low else low <= value) and value <= high


POSITIVE = Range(0.0, float(np.finfo(np.float32).max), "finite and positive in float32", above_low=True)
FINITE = Range(-POSITIVE.high, POSITIVE.high, "finite in float32")


def problem_of(value: float) -> str | None:
    """Why a factor or limit of a model cannot be used: it is not finite in float32, or vanishes there and was not 0."""
    if not FINITE.holds(value):
        return f"it must be {FINITE.text}"
    return "it is 0 in float32" if value != 0.0 and c_float(value).value == 0.0 else None


def first_not_finite(values: npt.NDArray[Any]) -> int | None:
    """The place of the first of float32 values that is NaN or infinite."""
    wrong = np.flatnonzero(~np.isfinite(values))
    return int(wrong[0]) if wrong.size else None


def as_float32(values: Any) -> npt.NDArray[np.float32]:
    """A copy as float32; what is too great becomes infinite.

    Raises:
        TypeError, ValueError, OverflowError: they are no numbers.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array(values, np.float32)
