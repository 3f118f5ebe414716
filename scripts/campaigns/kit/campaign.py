"""The frame of a campaign: its options, its cases one by one within a budget, what it says at the end.

A script describes itself with `Campaign` and calls `run`. Its cases run in a child process that a supervisor watches, so that
a crash or a hang is a finding like any other; with `--inline` they run in this process.

Exit status: 0 nothing was found, 1 something was, 2 the options are wrong, 3 a planted fault was not found.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kit.findings import Findings, signature_of

CLEAN, FOUND, PLANT_NOT_FOUND = 0, 1, 3
Report = Callable[[str, str], None]  # (signature, detail)
Emit = Callable[[dict[str, Any]], None]


class Runner(Protocol):
    """What runs the cases of a campaign."""

    def run(self, case: int, report: Report) -> int:
        """Runs case `case`, which depends on its number and the seed alone; gives how many requests it made."""

    def figures(self) -> Mapping[str, int]:
        """What the summary tells beside the number of requests."""

    def close(self) -> None:
        """Frees what the cases shared; what is wrong then may raise."""


@dataclass(frozen=True)
class Plant:
    """A fault that can be planted: what is made wrong, and the pattern of the signature by which it must be found."""

    what: str
    found_as: str


# Faults of the process itself, for every campaign: the supervisor must find them.
COMMON_PLANTS = {
    "crash": Plant("the process aborts in its first case", "the process died of SIGABRT"),
    "hang": Plant("its first case never ends", "hang"),
}


@dataclass(frozen=True)
class Campaign:
    """A script's word about itself. `plants`: by name, beside the common ones."""

    script: str
    purpose: str
    start: Callable[[argparse.Namespace], Runner]
    count: int
    plants: Mapping[str, Plant] = field(default_factory=dict)
    unit: str = "requests"
    case_seconds: float = 120.0  # a case that takes longer hangs
    reach: Sequence[str] = ()  # files of the package, as patterns, of whose lines `--lines` tells which ran
    add_options: Callable[[argparse._ArgumentGroup], None] | None = None

    def parser(self) -> argparse.ArgumentParser:
        """The options that all campaigns have, and this one's own."""
        parser = argparse.ArgumentParser(prog=self.script, description=self.purpose)
        parser.add_argument("--seed", type=int, default=1, help="from which all cases follow (default: %(default)s)")
        parser.add_argument("--seconds", type=float, default=0.0, help="stop after this time (default: no limit)")
        parser.add_argument(
            "--count", type=int, default=self.count, help=f"stop after so many {self.unit} (default: %(default)s)"
        )
        parser.add_argument("--first", type=int, default=0, help="number of the first case (default: %(default)s)")
        parser.add_argument("--only", type=int, metavar="CASE", help="run this case alone: a reproduction")
        parser.add_argument("--keep-going", action="store_true", help="go on behind findings and list them by kind")
        plants = {**self.plants, **COMMON_PLANTS}
        told = "; ".join(f"{name}: {plant.what}" for name, plant in plants.items())
        parser.add_argument("--plant", choices=plants, metavar="FAULT", help=f"a fault that must be found. {told}")
        parser.add_argument("--inline", action="store_true", help="no child process: for debuggers, tests and --lines")
        parser.add_argument(
            "--case-seconds", type=float, default=self.case_seconds, help="a case that takes longer hangs"
        )
        if self.reach:
            told = f"tell which lines of {', '.join(self.reach)} ran; needs --inline"
            parser.add_argument("--lines", action="store_true", help=told)
        parser.add_argument("--worker", type=int, metavar="FD", help=argparse.SUPPRESS)
        if self.add_options is not None:
            self.add_options(parser.add_argument_group("what the cases are made of"))
        return parser


@dataclass
class Tally:
    """What a run has done."""

    cases: int = 0
    made: int = 0
    figures: dict[str, int] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)
    last_case: int = -1  # that was begun

    def take(self, news: dict[str, Any]) -> None:
        """Books one message of a worker."""
        if "begin" in news:
            self.last_case = news["begin"]
        if "made" in news:
            self.cases += 1
            self.made += news["made"]
        if "signature" in news:
            self.findings.add(news["signature"], news["detail"], self.last_case)
        for name, value in news.get("figures", {}).items():
            self.figures[name] = self.figures.get(name, 0) + value


def run(campaign: Campaign, arguments: Sequence[str] | None = None) -> int:
    """Runs a campaign as its options say; gives the exit status."""
    parser = campaign.parser()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        return _serve(campaign, options)
    tells_lines = getattr(options, "lines", False)
    if tells_lines and not options.inline:
        parser.error("--lines needs --inline")
    began = time.monotonic()
    tally = Tally()
    try:
        if tells_lines:
            _work_traced(campaign, options, tally.take)
        elif options.inline:
            _work(campaign, options, tally.take)
        else:
            from kit.supervisor import supervise

            supervise(campaign, options, arguments, tally)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    _tell(campaign, parser, options, tally, time.monotonic() - began)
    return _status(campaign, options, tally)


def _status(campaign: Campaign, options: argparse.Namespace, tally: Tally) -> int:
    if options.plant is not None:
        return FOUND if is_plant_found(campaign, options, tally) else PLANT_NOT_FOUND
    return FOUND if tally.findings else CLEAN


def is_plant_found(campaign: Campaign, options: argparse.Namespace, tally: Tally) -> bool:
    """Whether one of the findings is the planted fault: others do not count for it."""
    plants = {**campaign.plants, **COMMON_PLANTS}
    plant = plants.get(options.plant)
    return plant is not None and any(re.search(plant.found_as, found) for found in tally.findings.kinds)


def is_over(campaign: Campaign, options: argparse.Namespace, tally: Tally) -> bool:
    """Whether what was found ends the run: the planted fault where there is one, else anything, unless it keeps going."""
    if options.plant is not None:
        return is_plant_found(campaign, options, tally)
    return bool(tally.findings) and not options.keep_going


# ---- the worker ---------------------------------------------------------------------------------------------------------


def _serve(campaign: Campaign, options: argparse.Namespace) -> int:
    """The child: news go to the supervisor as lines of JSON."""
    faulthandler.enable()
    with os.fdopen(options.worker, "w", buffering=1) as pipe:
        _work(campaign, options, lambda news: print(json.dumps(news), file=pipe))
    return CLEAN


def _work(campaign: Campaign, options: argparse.Namespace, emit: Emit) -> None:
    """Cases until the budget is spent, or something was found."""
    tally = Tally()

    def tell(news: dict[str, Any]) -> None:
        tally.take(news)
        emit(news)

    def report(signature: str, detail: str) -> None:
        tell({"signature": signature, "detail": detail})

    began = time.monotonic()
    with _reporting(report, "start or close"), closing(campaign.start(options)) as runner:
        for case in _numbers(options):
            tell({"begin": case})
            _plant_in_process(options, case)
            made = 1  # of a case that raises: the count must come to its end
            with _reporting(report, "case"):
                made = runner.run(case, report)
            tell({"made": made})
            is_spent = 0 < options.seconds < time.monotonic() - began
            if is_spent or tally.made >= options.count or is_over(campaign, options, tally):
                break
        tell({"figures": dict(runner.figures())})


def _work_traced(campaign: Campaign, options: argparse.Namespace, emit: Emit) -> None:
    from kit.reach import Reach

    reach = Reach(campaign.reach)
    reach.start()
    try:
        _work(campaign, options, emit)
    finally:
        reach.stop()
        print(reach.table())


def _numbers(options: argparse.Namespace) -> Iterator[int]:
    if options.only is not None:
        yield options.only
        return
    case = options.first
    while True:
        yield case
        case += 1


def _plant_in_process(options: argparse.Namespace, case: int) -> None:
    if case == options.first and options.plant == "crash":
        os.abort()
    if case == options.first and options.plant == "hang":
        time.sleep(1e6)


class _reporting:  # noqa: N801  # reads as a statement
    """Makes an exception that nobody expected a finding."""

    def __init__(self, report: Report, where: str) -> None:
        self._report, self._where = report, where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        told = "".join(traceback.format_exception(kind, error, trace))[-4000:]
        self._report(f"{self._where} raised {type(error).__name__}: {signature_of(str(error))}", told)
        return True


# ---- what is said -------------------------------------------------------------------------------------------------------


def _tell(
    campaign: Campaign, parser: argparse.ArgumentParser, options: argparse.Namespace, tally: Tally, seconds: float
) -> None:
    for number, found in enumerate(tally.findings.kinds.values(), start=1):
        print(f"FOUND [{number}] {found.signature} (times: {found.times:,})")
        print("    " + found.detail.rstrip().replace("\n", "\n    "))
        print(f"    reproduce: {reproduction(campaign, parser, options, found.case)}")
    rate = tally.made / seconds if seconds else 0.0
    figures = "".join(f", {name} {value:,}" for name, value in tally.figures.items())
    print(
        f"{Path(campaign.script).stem}: {tally.made:,} {campaign.unit} in {tally.cases:,} cases, seed {options.seed}, "
        f"{seconds:,.1f} s, {rate:,.1f}/s{figures}: {_verdict(campaign, options, tally)}",
        flush=True,
    )


def _verdict(campaign: Campaign, options: argparse.Namespace, tally: Tally) -> str:
    if options.plant is not None:
        is_found = is_plant_found(campaign, options, tally)
        return f"the planted fault {options.plant!r} was {'found' if is_found else 'NOT FOUND'}"
    kinds = len(tally.findings.kinds)
    return f"FOUND {kinds:,} kinds, {tally.findings.times:,} times" if kinds else "nothing found"


_OF_THE_RUN = (
    "seed",
    "seconds",
    "count",
    "first",
    "only",
    "keep_going",
    "inline",
    "case_seconds",
    "lines",
    "worker",
    "help",
)


def reproduction(campaign: Campaign, parser: argparse.ArgumentParser, options: argparse.Namespace, case: int) -> str:
    """The command that runs one case again: the seed, its number, and all options that shape it."""
    words = ["python", f"scripts/campaigns/{campaign.script}", "--seed", str(options.seed)]
    if options.plant in COMMON_PLANTS:
        words += ["--first", str(max(0, case))]
    else:
        words += ["--only", str(max(0, case))]
    for action in parser._actions:
        value = getattr(options, action.dest, None)
        if action.dest in _OF_THE_RUN or value == action.default:
            continue
        name = action.option_strings[-1]
        if value is True:
            words.append(name)
        else:
            words += [name, *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    return " ".join(words)
