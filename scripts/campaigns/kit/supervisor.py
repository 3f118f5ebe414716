"""Watches the process in which the cases run. A crash or a hang is a finding; with `--keep-going` the next case follows in a
new process."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from kit.campaign import Campaign, Tally, is_over

_START_SECONDS = 120.0  # beside the time of a case: imports, a model that is packed
_DYING_SECONDS = 10.0
_SHOWN_CHARACTERS = 4000


def supervise(campaign: Campaign, options: argparse.Namespace, arguments: Sequence[str], tally: Tally) -> None:
    """Runs workers until the budget is spent, or something was found. What one leaves in its temporary folder is removed."""
    with tempfile.TemporaryDirectory(prefix="pellucid-campaign-") as folder:
        _supervise(campaign, options, arguments, tally, {**os.environ, "TMPDIR": folder})


def _supervise(
    campaign: Campaign,
    options: argparse.Namespace,
    arguments: Sequence[str],
    tally: Tally,
    environment: dict[str, str],
) -> None:
    began = time.monotonic()
    first = options.first
    while True:
        left = options.seconds - (time.monotonic() - began) if options.seconds else 0.0
        own = [*arguments, "--first", str(first), "--count", str(options.count - tally.made), "--seconds", str(left)]
        has_ended = _Worker(campaign, options, own, environment).watch(tally)
        first = tally.last_case + 1
        is_spent = tally.made >= options.count or (options.seconds and time.monotonic() - began >= options.seconds)
        if has_ended or is_spent or options.only is not None or is_over(campaign, options, tally):
            return


class _Worker:
    """One child. It leads a session of its own, so that what it started can be ended with it."""

    def __init__(
        self, campaign: Campaign, options: argparse.Namespace, arguments: Sequence[str], environment: dict[str, str]
    ) -> None:
        self._case_seconds = options.case_seconds
        script = Path(__file__).resolve().parent.parent / campaign.script
        self._pipe, theirs = os.pipe()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `watch`
        command = [sys.executable, str(script), *arguments, "--worker", str(theirs)]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs], stderr=self._errors, start_new_session=True, env=environment
        )
        os.close(theirs)

    def watch(self, tally: Tally) -> bool:
        """Books the news until the child has ended; True when it ended by itself and well."""
        try:
            with os.fdopen(self._pipe, "rb") as pipe:
                is_hung = self._read(pipe, tally)
            if is_hung:
                self._process.send_signal(signal.SIGABRT)  # its stacks go to its standard error
            status = self._wait()
            if is_hung:
                tally.findings.add("hang", f"no end within {self._case_seconds:g} s\n{self._said()}", tally.last_case)
            elif status:
                tally.findings.add(_death(status), self._said(), tally.last_case)
            return not is_hung and status == 0
        finally:
            self._end()
            self._errors.close()

    def _read(self, pipe: Any, tally: Tally) -> bool:
        """Until the pipe is closed; True when nothing came for too long."""
        patience, pending = self._case_seconds + _START_SECONDS, b""
        while True:
            ready, _, _ = select.select([pipe], [], [], patience)
            if not ready:
                return True
            block = os.read(pipe.fileno(), 1 << 16)
            if not block:
                return False
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                tally.take(json.loads(line))
            patience = self._case_seconds

    def _wait(self) -> int:
        try:
            return self._process.wait(_DYING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-_SHOWN_CHARACTERS:]


def _death(status: int) -> str:
    if status < 0:
        return f"the process died of {signal.Signals(-status).name}"
    return f"the process ended with status {status}"
