"""Which lines of some files a campaign runs: how far a fuzzer gets. With the interpreter's own tracing, for these files alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pellucid

PACKAGE = Path(pellucid.__file__).resolve().parent


class Reach:
    """Lines that ran, from `start` to `stop`, on threads that begin in between and on the one that calls."""

    def __init__(self, patterns: Sequence[str]) -> None:
        """`patterns`: of files in the package, such as `server/*.py`."""
        paths = sorted({path for pattern in patterns for path in PACKAGE.glob(pattern)})
        self._hit: dict[str, set[int]] = {str(path): set() for path in paths}

    def start(self) -> None:
        """From here on."""
        threading.settrace(self._enter)
        sys.settrace(self._enter)

    def stop(self) -> None:
        """Until here."""
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        hit = self._hit.get(frame.f_code.co_filename)
        if hit is None:
            return None
        hit.add(frame.f_lineno)

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            hit.add(frame.f_lineno)
            return line

        return line

    def table(self) -> str:
        """File by file: lines inside functions, how many of them ran, and which did not."""
        rows = [f"{'file':<44}{'lines':>7}{'ran':>7}{'%':>6}  not reached"]
        total = ran = 0
        for path, hit in self._hit.items():
            lines = _lines_of_functions(Path(path))
            reached = lines & hit
            total, ran = total + len(lines), ran + len(reached)
            name = str(Path(path).relative_to(PACKAGE.parent))
            rows.append(_row(name, len(lines), len(reached), ", ".join(_ranges(sorted(lines - hit)))))
        return "\n".join([*rows, _row("all", total, ran, "")])


def _row(name: str, total: int, ran: int, missing: str) -> str:
    return f"{name:<44}{total:>7}{ran:>7}{100 * ran / total if total else 100:>6.0f}  {missing}".rstrip()


def _lines_of_functions(path: Path) -> set[int]:
    """What runs when a function does. What runs at import had run before anything was traced."""
    return set(_lines(compile(path.read_text(), str(path), "exec"), is_function=False))


def _lines(code: CodeType, is_function: bool) -> Iterator[int]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _lines(constant, is_function=bool(constant.co_flags & 0x2))  # CO_NEWLOCALS: no class body
    if is_function:
        yield from (line for _, _, line in code.co_lines() if line is not None and line != code.co_firstlineno)


def _ranges(lines: Iterable[int]) -> Iterator[str]:
    """Neighbouring lines as `first-last`."""
    run: list[int] = []
    for line in [*lines, -1]:
        if run and line != run[-1] + 1:
            yield str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
            run = []
        run.append(line)
