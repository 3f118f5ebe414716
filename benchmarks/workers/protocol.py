"""What every worker speaks: one JSON object a line on standard input and output. Standard library alone."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Prompts = list[list[int]]
# Given prompts and the number of tokens wanted of each, (output tokens counted, seconds).
Measure = tuple[int, float]


def peak_bytes() -> int:
    """The most memory that this process has held, its children not counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _run(engine: Any, command: dict[str, Any]) -> dict[str, Any]:
    measure = getattr(engine, command["kind"], None)
    if measure is None:
        return {"error": f"the engine has no {command['kind']}"}
    try:
        tokens, seconds = measure(command["prompts"], command["outputs"])
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return {"tokens": tokens, "seconds": seconds, "peak_bytes": peak_bytes()}


def serve(load: Callable[[dict[str, Any]], Any], versions: Callable[[], dict[str, str]]) -> None:
    """Answers `load`, `run` and `quit`. The engine has methods decode, prefill, single and mixed, less those that it cannot do.

    An error in a run is answered as one; an error while loading ends the process.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    engine: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "quit":
            break
        if command["do"] == "load":
            engine = load(command)
            reply: dict[str, Any] = {"versions": versions()}
        else:
            reply = _run(engine, command)
        replies.write(json.dumps(reply) + "\n")
