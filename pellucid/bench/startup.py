"""From the start of a process to its first token, cold imports included, in child processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from pellucid.bench.offline import Report, positive
from pellucid.bench.workload import spread_of
from pellucid.errors import EngineDeadError

PROMPT = "The capital of France is"
_CHILD = "pellucid.bench.startup_child"
# part of a start: what it lies between
_PARTS = {
    "interpreter": ("started", "began"),
    "imports": ("began", "imported"),
    "load": ("imported", "loaded"),
    "first_token": ("loaded", "first_token"),
    "total": ("started", "first_token"),
}


def one_start(model: str, engine: Mapping[str, Any], timeout: float = 600) -> dict[str, Any]:
    """One child: seconds of each part, whether the packed program was there, and the peak of its memory.

    Raises:
        EngineDeadError: the child failed or took longer than `timeout` seconds.
    """
    asked = json.dumps({"model": model, "engine": dict(engine), "prompt": PROMPT})
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", _CHILD, asked], capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise EngineDeadError(f"a start took more than {timeout:.0f} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise EngineDeadError(f"a start failed: {lines[-1]}")
    found = {"started": started, **json.loads(done.stdout.splitlines()[-1])}
    seconds = {name: found[end] - found[begin] for name, (begin, end) in _PARTS.items()}
    return {"seconds": seconds, "from_cache": found["from_cache"], "peak_bytes": found["peak_bytes"]}


def startup(
    model: str,
    engine: Mapping[str, Any],
    *,
    num_iters: int = 5,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """One start that packs the weights if they were not yet and brings the files into memory, then `num_iters` that count.

    Raises:
        InvalidRequestError: `num_iters` is below 1.
        EngineDeadError: a start failed.
    """
    positive("num_iters", num_iters)
    first = one_start(model, engine)
    progress(f"first start: {first['seconds']['total']:.3f} s{'' if first['from_cache'] else ', weights packed'}")
    runs = []
    for turn in range(num_iters):
        runs.append(one_start(model, engine))
        progress(f"start {turn + 1} of {num_iters}: {runs[-1]['seconds']['total']:.3f} s")
    return {
        "kind": "startup",
        "first_start": first,
        "seconds": {name: spread_of([one["seconds"][name] for one in runs]) for name in _PARTS},
        "peak_bytes": max(one["peak_bytes"] for one in runs),
    }
