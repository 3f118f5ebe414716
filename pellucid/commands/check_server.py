"""`pellucid check-server`: runs the checks, tells each as it ends, and shows a table."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pellucid.bench.serve_checks import CHECKS, CheckOptions, CheckResult, figures_of, run_checks
from pellucid.bench.show import table
from pellucid.errors import InvalidRequestError
from pellucid.files import write_whole
from pellucid.json_text import dumps

_HEAD = ("check", "result", "finish", "prompt", "output", "s", "TTFT ms", "chunks", "ms/chunk", "tokens/s")


def api_url(url: str) -> str:
    """What stands before /v1: people give either."""
    return url.rstrip("/").removesuffix("/v1")


def check_server(url: str, options: CheckOptions, only: Sequence[str], json_path: Path | None) -> bool:
    """Whether all checks passed.

    Raises:
        InvalidRequestError: an option is out of range, a check has no such name, or the file cannot be written.
    """
    for name in ("timeout", "deadline", "max_tokens", "long_tokens", "rapid_requests", "concurrency"):
        if not 0 < getattr(options, name) < float("inf"):
            raise InvalidRequestError(name, f"is {getattr(options, name)}", limit="it must be above 0")
    for name in only:
        if name not in CHECKS:
            raise InvalidRequestError("only", (f"there is no check {name!r}",), limit=f"there are {', '.join(CHECKS)}")
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise InvalidRequestError("json", (f"{json_path} cannot be written: its folder does not exist",))
    names = [name for name in CHECKS if name in only or not only]
    model, results = asyncio.run(run_checks(api_url(url), options, names, _Progress(1 + len(names)).tell))
    failed = [result for result in results if not result.passed]
    print(f"{model or 'no model'} at {url}\n")
    print(table([_HEAD, *map(_row, results)]))
    for problems, names_of in _grouped(failed).items():
        print(f"\n{', '.join(names_of)} failed:\n" + "\n".join(f"  {problem}" for problem in problems))
    print(f"\n{len(results) - len(failed)} passed, {len(failed)} failed")
    if json_path is not None:
        report = {
            "url": url,
            "model": model,
            "passed": not failed,
            "checks": [result.as_dict() for result in results],
        }
        write_whole(json_path, dumps(report, indent=1) + "\n")
    return not failed


def _grouped(failed: Sequence[CheckResult]) -> dict[tuple[str, ...], list[str]]:
    """The checks that found the same: a server that is not there is told once."""
    found: dict[tuple[str, ...], list[str]] = {}
    for result in failed:
        found.setdefault(tuple(result.problems), []).append(result.name)
    return found


class _Progress:
    """A line on standard error for each check that has ended."""

    def __init__(self, total: int) -> None:
        self._done, self._total = 0, total

    def tell(self, result: CheckResult) -> None:
        self._done += 1
        word = "ok" if result.passed else "FAILED"
        line = f"[{self._done}/{self._total}] {result.name}: {word} ({result.seconds:.1f} s)"
        print(line, file=sys.stderr, flush=True)


def _row(result: CheckResult) -> tuple[str, ...]:
    """Sums of tokens, seconds and chunks of a check's requests; the mean of what is a rate or a wait."""
    figures = [figures_of(answer) for answer in result.answers]
    made = _sum(figures, "completion_tokens")
    seconds = sum(one["seconds"] for one in figures if one["completion_tokens"])
    return (
        result.name,
        "ok" if result.passed else "FAILED",
        "+".join(sorted({one["finish_reason"] for one in figures if one["finish_reason"]})) or "-",
        _cell(_sum(figures, "prompt_tokens")),
        _cell(made),
        f"{result.seconds:.2f}",
        _cell(_mean(figures, "ttft", 1000), "{:,.1f}"),
        _cell(_sum(figures, "chunks")),
        _cell(_mean(figures, "seconds_per_chunk", 1000), "{:,.1f}"),
        _cell(made / seconds if made and seconds else None, "{:,.1f}"),
    )


def _told(figures: list[dict[str, Any]], name: str) -> list[float]:
    return [one[name] for one in figures if one[name] is not None]


def _sum(figures: list[dict[str, Any]], name: str) -> float | None:
    return sum(_told(figures, name)) if _told(figures, name) else None


def _mean(figures: list[dict[str, Any]], name: str, unit: float) -> float | None:
    told = _told(figures, name)
    return unit * sum(told) / len(told) if told else None


def _cell(value: float | None, form: str = "{:,}") -> str:
    return "-" if value is None else form.format(value)
