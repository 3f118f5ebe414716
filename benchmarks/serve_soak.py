"""The highest request rate at which the 99th percentile of the time to the first token stays under a limit, then that rate for ten minutes.

    python benchmarks/serve_soak.py [--seconds 600] [--limit-ms 2000] [--json F] [-- further options of `pellucid serve`]

Rates are tried for --probe-seconds each: doubled until the limit is passed, then halved towards it. The long run takes the highest that
held, and one step less whenever that does not hold for the whole time. The server's resident memory is read every ten seconds: "flat" is
the mean of the last third over that of the middle third.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
from serve_compare import FIRST_TOKENS, LENGTHS, Place, Running, Server, free_port, own_environment, running

from pellucid.bench.serve_bench import run_bench
from pellucid.bench.serve_options import ServeOptions

STEPS = 4  # of halving
_MOST_PROBES = 12
KEYS = (
    "completed",
    "failed",
    "request_throughput",
    "output_throughput",
    "mean_ttft_ms",
    "p50_ttft_ms",
    "p99_ttft_ms",
    "p99_itl_ms",
)


def play(url: str, rate: float, seconds: float, seed: int) -> dict[str, Any]:
    """The figures of one load."""
    options = ServeOptions(
        base_url=url,
        ignore_eos=True,
        random_vocab_size=FIRST_TOKENS,
        metric_percentiles="50,99",
        request_rate=rate,
        num_prompts=max(8, int(rate * seconds)),
        seed=seed,
        **LENGTHS,
    )
    return asyncio.run(run_bench(options)).report


def holds(figures: dict[str, Any], limit_ms: float) -> bool:
    """Whether every request was answered, and in time."""
    return bool(figures["failed"] == 0 and figures["p99_ttft_ms"] <= limit_ms)


def highest(url: str, seconds: float, limit_ms: float) -> float:
    """The highest rate that held in a probe."""
    good, bad, rate = 0.0, 0.0, 1.0
    for step in range(_MOST_PROBES):
        figures = play(url, rate, seconds, step)
        good, bad = (rate, bad) if holds(figures, limit_ms) else (good, rate)
        print(
            json.dumps({"rate": rate, "p99_ttft_ms": round(figures["p99_ttft_ms"]), "holds": good == rate}), flush=True
        )
        if bad and bad - good <= bad / 2**STEPS:
            break
        rate = rate * 2 if not bad else (good + bad) / 2
    return good


class Memory(threading.Thread):
    """Reads a process's resident memory now and then."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process, self._done, self.samples = psutil.Process(pid), threading.Event(), list[int]()

    def run(self) -> None:
        while not self._done.wait(10):
            self.samples.append(self._process.memory_info().rss)

    def stop(self) -> list[int]:
        """The samples, in bytes."""
        self._done.set()
        self.join(60)
        return self.samples


def soak(server: Running, rate: float, seconds: float, limit_ms: float) -> dict[str, Any]:
    """The long run; one step slower as often as it does not hold."""
    while True:
        memory = Memory(server.process.pid)
        memory.start()
        figures = play(server.url, rate, seconds, 100)
        samples = memory.stop()
        third = max(1, len(samples) // 3)
        flat = statistics.mean(samples[-third:]) / statistics.mean(samples[third : 2 * third] or samples)
        found = {"rate": rate, **{key: figures.get(key) for key in KEYS}, "rss_last_over_middle": round(flat, 4),
                 "rss_mb": [round(sample / 1e6) for sample in samples]}  # fmt: skip
        print(json.dumps(found), flush=True)
        if holds(figures, limit_ms) or rate < 0.25:
            return found
        rate *= 1 - 1 / 2**STEPS


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--probe-seconds", type=float, default=30)
    parser.add_argument("--rate", type=float, help="leaves the probes out")
    parser.add_argument("--limit-ms", type=float, default=2000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("serve", nargs="*", help="options of `pellucid serve`, behind --")
    options = parser.parse_args()
    start = [sys.executable, "-m", "pellucid.cli", "serve", options.model, "--no-log-requests", *options.serve]
    server = Server(lambda place: [*start, "--port", str(place.port)], own_environment)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), options.model, free_port(), 2)
        with running(server, place, Path(folder) / "log") as found:
            play(found.url, 4, 2, 99)  # warm
            rate = options.rate or highest(found.url, options.probe_seconds, options.limit_ms)
            result = soak(found, rate, options.seconds, options.limit_ms)
    if options.json:
        options.json.write_text(json.dumps({"options": options.serve, **result}, indent=1))


if __name__ == "__main__":
    main()
