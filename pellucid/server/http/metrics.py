"""Prometheus metrics, with vLLM's names under the prefix `pellucid:`, in a registry of their own.

The engine counts for itself (`engine/metrics.py`); its figures are read when Prometheus asks. The server adds what only it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pellucid.api.sampling_params import SamplingParams
from pellucid.engine.metrics import EngineStats, HistogramStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "pellucid:"
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_CHOICES = (1, 2, 5, 10, 20, 50, 100)

# name -> what the engine's histogram of this name tells
_HISTOGRAMS = {
    "time_to_first_token_seconds": "From arrival to the first token.",
    "inter_token_latency_seconds": "From one token of a choice to the next.",
    "e2e_request_latency_seconds": "From arrival to the end.",
    "request_queue_time_seconds": "Waiting before the first step.",
    "request_prefill_time_seconds": "From the first step to the first token.",
    "request_decode_time_seconds": "From the first token to the last.",
    "request_prompt_tokens": "Prompt tokens of a request.",
    "request_generation_tokens": "Tokens made for a request.",
    "iteration_tokens_total": "Tokens computed in a step.",
}
_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("Requests in the batch.", lambda stats: stats.num_running),
    "num_requests_waiting": ("Requests that wait.", lambda stats: stats.num_waiting),
    "trace_failed": ("1 once the file of --trace could not be written any more.", lambda stats: stats.trace_has_failed),
    "kv_cache_usage_perc": ("Blocks in use; 1 is all.", lambda stats: stats.kv_cache.get("usage", 0.0)),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_preemptions": ("Requests that had to give their blocks back.", lambda stats: stats.num_preemptions),
    "prompt_tokens": ("Prompt tokens of admitted requests.", lambda stats: stats.prompt_tokens),
    "generation_tokens": ("Tokens made.", lambda stats: stats.generation_tokens),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", lambda stats: stats.prefix_queries),
    "prefix_cache_hits": ("Those that were found.", lambda stats: stats.prefix_hits),
    "engine_steps": ("Scheduler steps.", lambda stats: stats.num_steps),
}
_BY_REASON = ("num_requests_waiting_by_reason", "Requests that wait, by label `reason`.")
_ENDED = ("request_success", "Choices that ended, by label `finished_reason`.")
_ANSWERS = ("http_requests", "HTTP answers, by labels `method`, `path` and `status`.")
_N = ("request_params_n", "n of requests.")
_MAX_TOKENS = ("request_params_max_tokens", "max_tokens of requests.")

# (name, kind, meaning) of all, for the docs
METRICS = sorted(
    [
        *((f"`{_PREFIX}{name}`", "gauge", text) for name, (text, _) in _GAUGES.items()),
        *((f"`{_PREFIX}{name}_total`", "counter", text) for name, (text, _) in _COUNTERS.items()),
        *((f"`{_PREFIX}{name}`", "histogram", text) for name, text in _HISTOGRAMS.items()),
        *((f"`{_PREFIX}{name}`", "histogram", text) for name, text in (_N, _MAX_TOKENS)),
        *((f"`{_PREFIX}{name}_total`", "counter", text) for name, text in (_ENDED, _ANSWERS)),
        (f"`{_PREFIX}{_BY_REASON[0]}`", "gauge", _BY_REASON[1]),
    ]
)


class Metrics:
    """What one server can be watched by."""

    def __init__(self, model_name: str) -> None:
        self._model, self._registry = model_name, CollectorRegistry()
        self._answers = Counter(
            _PREFIX + _ANSWERS[0], _ANSWERS[1], ["model_name", "method", "path", "status"], registry=self._registry
        )
        self._observe_n = self._histogram(*_N, _CHOICES)
        self._observe_max_tokens = self._histogram(*_MAX_TOKENS, _COUNTS)

    def observe_params(self, params: SamplingParams) -> None:
        """A request that was queued."""
        self._observe_n.observe(params.n)
        if params.max_tokens is not None:
            self._observe_max_tokens.observe(params.max_tokens)

    def observe_answer(self, method: str, path: str, status: int) -> None:
        """An HTTP answer; `path` is the route's, so that there are few."""
        self._answers.labels(self._model, method, path, str(status)).inc()

    def render(self, stats: EngineStats | None) -> bytes:
        """All of it in Prometheus' text format; without `stats` (the engine is dead), what the server counted."""
        text: bytes = generate_latest(self._registry)
        if stats is None:
            return text
        engine = CollectorRegistry()
        engine.register(_EngineCollector(stats, self._model))
        return text + generate_latest(engine)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        made = Histogram(_PREFIX + name, text, ["model_name"], buckets=bounds, registry=self._registry)
        return made.labels(self._model)


class _EngineCollector(Collector):
    """The engine's figures at one moment."""

    def __init__(self, stats: EngineStats, model_name: str) -> None:
        self._stats, self._model = stats, model_name

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        for name, text in _HISTOGRAMS.items():
            if name in self._stats.histograms:
                yield self._histogram(name, text, self._stats.histograms[name])

    def _gauges(self) -> Iterator[Metric]:
        for name, (text, read) in _GAUGES.items():
            family = GaugeMetricFamily(_PREFIX + name, text, labels=["model_name"])
            yield self._labelled(family, {"": read(self._stats)})
        name, text = _BY_REASON
        reasons = GaugeMetricFamily(_PREFIX + name, text, labels=["model_name", "reason"])
        yield self._labelled(reasons, self._stats.waiting_by_reason)

    def _counters(self) -> Iterator[Metric]:
        for name, (text, read) in _COUNTERS.items():
            family = CounterMetricFamily(_PREFIX + name, text, labels=["model_name"])
            yield self._labelled(family, {"": read(self._stats)})
        name, text = _ENDED
        ended = CounterMetricFamily(_PREFIX + name, text, labels=["model_name", "finished_reason"])
        yield self._labelled(ended, self._stats.finished)

    def _histogram(self, name: str, text: str, found: HistogramStats) -> Metric:
        family = HistogramMetricFamily(_PREFIX + name, text, labels=["model_name"])
        ends = [*(f"{bound:g}" for bound in found.bounds), "+Inf"]
        family.add_metric([self._model], list(zip(ends, accumulate(found.counts), strict=True)), found.total)
        return family

    def _labelled(self, family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, float]) -> Metric:
        for label, value in values.items():
            family.add_metric([self._model, label] if label else [self._model], value)
        return family
