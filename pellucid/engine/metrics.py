"""What an engine counts and times while it runs, under the names that vLLM's metrics have (without the prefix)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from pellucid.api.outputs import RequestOutput

_LATENCIES = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
_COUNTS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
# metric name: upper ends of its buckets, in seconds or in tokens
HISTOGRAMS: dict[str, tuple[float, ...]] = {
    "time_to_first_token_seconds": (
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
        *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
    ),
    "inter_token_latency_seconds": (
        *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
        *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    ),
    "e2e_request_latency_seconds": _LATENCIES,
    "request_queue_time_seconds": _LATENCIES,
    "request_prefill_time_seconds": _LATENCIES,
    "request_decode_time_seconds": _LATENCIES,
    "request_prompt_tokens": _COUNTS,
    "request_generation_tokens": _COUNTS,
    "iteration_tokens_total": (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0),
}


@dataclass(frozen=True)
class HistogramStats:
    """Observations by bucket: `counts[i]` lie above `bounds[i - 1]` and at most at `bounds[i]`; the last have no upper end."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float  # sum of all observations


@dataclass(frozen=True)
class EngineStats:
    """The state of an engine at one moment, and its counters since the start.

    `waiting_by_reason`: label of a reason -> requests. `kv_cache`: as `BlockManager.stats`. `finished`: finish reason ->
    choices. `histograms`: the keys of `HISTOGRAMS`. Requests of n choices count n times, except in `request_*` and times.
    """

    num_running: int = 0
    num_waiting: int = 0
    waiting_by_reason: dict[str, int] = field(default_factory=dict)
    kv_cache: dict[str, int | float] = field(default_factory=dict)
    num_preemptions: int = 0
    prompt_tokens: int = 0  # of admitted requests
    generation_tokens: int = 0
    prefix_queries: int = 0  # prompt tokens that were looked up in the prefix cache
    prefix_hits: int = 0  # those that were found
    finished: dict[str, int] = field(default_factory=dict)
    num_steps: int = 0
    num_cached_blocks: int = 0  # free blocks that the prefix cache can still give away
    trace_has_failed: bool = False  # it could not be written any more, and was given up
    histograms: dict[str, HistogramStats] = field(default_factory=dict)


class Histogram:
    """Counts observations by bucket."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Counts one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def stats(self) -> HistogramStats:
        """As it stands."""
        return HistogramStats(self.bounds, tuple(self.counts), self.total)


class EngineMetrics:
    """Counters and histograms of one engine. A token costs one observation; everything else happens once a request or step."""

    def __init__(self) -> None:
        self.num_preemptions = self.prompt_tokens = self.generation_tokens = 0
        self.prefix_queries = self.prefix_hits = self.num_steps = 0
        self.finished: Counter[str] = Counter()
        self.histograms = {name: Histogram(bounds) for name, bounds in HISTOGRAMS.items()}
        self.observe_gap = self.histograms["inter_token_latency_seconds"].observe
        self._observe_step = self.histograms["iteration_tokens_total"].observe

    def count_admission(self, num_prompt_tokens: int, num_cached_tokens: int, caching: bool) -> None:
        """A request was given blocks for the first time."""
        self.prompt_tokens += num_prompt_tokens
        if caching:
            self.prefix_queries += num_prompt_tokens
            self.prefix_hits += num_cached_tokens

    def count_step(self, num_tokens: int, num_generated: int) -> None:
        """A step computed `num_tokens` and brought `num_generated` new ones."""
        self.num_steps += 1
        self.generation_tokens += num_generated
        self._observe_step(num_tokens)

    def count_finished(self, output: RequestOutput) -> None:
        """All choices of a request have ended."""
        for choice in output.outputs:
            self.finished[choice.finish_reason or "error"] += 1
        metrics = output.metrics
        if metrics is None:
            return
        observed = {
            "time_to_first_token_seconds": metrics.time_to_first_token,
            "e2e_request_latency_seconds": metrics.e2e_time,
            "request_queue_time_seconds": metrics.queue_time,
            "request_prefill_time_seconds": metrics.prefill_time,
            "request_decode_time_seconds": metrics.decode_time,
            "request_prompt_tokens": len(output.prompt_token_ids),
            "request_generation_tokens": output.usage["completion_tokens"],
        }
        for name, value in observed.items():
            if value is not None:
                self.histograms[name].observe(value)
