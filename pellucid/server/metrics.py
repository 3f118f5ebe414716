"""Prometheus metrics, with vLLM's names under the prefix `pellucid:`, in a registry of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pellucid.outputs import RequestOutput
from pellucid.params import SamplingParams

if TYPE_CHECKING:
    from pellucid.engine.async_engine import EngineStats
    from pellucid.server.generation import Job

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "pellucid:"
_SHORT = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_LONG = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_CHOICES = (1, 2, 5, 10, 20, 50, 100)

# name -> (help, buckets)
_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From arrival to the first token.", _SHORT + (20.0, 40.0, 80.0, 160.0)),
    "inter_token_latency_seconds": ("Between tokens of a stream.", _SHORT),
    "request_time_per_output_token_seconds": ("Mean time of a token behind the first, by request.", _SHORT),
    "e2e_request_latency_seconds": ("From arrival to the end.", _LONG),
    "request_queue_time_seconds": ("Waiting before the first step.", _LONG),
    "request_prefill_time_seconds": ("From the first step to the first token.", _LONG),
    "request_decode_time_seconds": ("From the first token to the last.", _LONG),
    "request_prompt_tokens": ("Tokens of prompts.", _COUNTS),
    "request_generation_tokens": ("Tokens made, by choice.", _COUNTS),
    "request_params_max_tokens": ("max_tokens of requests that give it.", _COUNTS),
    "request_params_n": ("n of requests.", _CHOICES),
}
_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "prompt_tokens": ("Tokens of prompts of ended requests.", ()),
    "generation_tokens": ("Tokens made.", ()),
    "request_success": ("Choices that ended, by reason.", ("finished_reason",)),
    "http_requests": ("HTTP answers.", ("method", "path", "status")),
}


class Metrics:
    """What the server counts; the engine's own figures are added when they are read."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._histograms = {
            name: Histogram(_PREFIX + name, text, ["model_name"], buckets=buckets, registry=self.registry)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._observe = {name: histogram.labels(model_name).observe for name, histogram in self._histograms.items()}
        self._counters = {
            name: Counter(_PREFIX + name, text, ["model_name", *labels], registry=self.registry)
            for name, (text, labels) in _COUNTERS.items()
        }
        self._add_prompt = self._counters["prompt_tokens"].labels(model_name).inc
        self._add_generated = self._counters["generation_tokens"].labels(model_name).inc

    def observe_tokens(self, count: int, interval: float | None) -> None:
        """Tokens that a stream just got, `interval` seconds after those before."""
        self._add_generated(count)
        if interval is not None:
            self._observe["inter_token_latency_seconds"](interval / count)

    def observe_outputs(self, job: Job, outputs: Sequence[RequestOutput], num_counted: int) -> None:
        """Requests that ended; `num_counted` of their tokens went through `observe_tokens`."""
        self._observe_params(job.params)
        self._add_generated(sum(output.usage["completion_tokens"] for output in outputs) - num_counted)
        for output in outputs:
            self._add_prompt(len(output.prompt_token_ids))
            self._observe["request_prompt_tokens"](len(output.prompt_token_ids))
            for choice in output.outputs:
                self._observe["request_generation_tokens"](len(choice.token_ids))
                self._counters["request_success"].labels(self._model, choice.finish_reason or "abort").inc()
            self._observe_times(output)

    def observe_abandoned(self, job: Job) -> None:
        """A job whose client left."""
        self._counters["request_success"].labels(self._model, "abort").inc(len(job.prompts) * job.params.n)

    def observe_answer(self, method: str, path: str, status: int) -> None:
        """An HTTP answer; `path` is the route's, so that there are few."""
        self._counters["http_requests"].labels(self._model, method, path, str(status)).inc()

    def render(self, stats: EngineStats | None) -> bytes:
        """All of it in Prometheus' text format; without `stats` (the engine is dead), what the server counted."""
        text: bytes = generate_latest(self.registry)
        if stats is None:
            return text
        engine = CollectorRegistry()
        engine.register(_EngineCollector(stats, self._model))
        return text + generate_latest(engine)

    def _observe_params(self, params: SamplingParams) -> None:
        self._observe["request_params_n"](params.n)
        if params.max_tokens is not None:
            self._observe["request_params_max_tokens"](params.max_tokens)

    def _observe_times(self, output: RequestOutput) -> None:
        times = output.metrics
        if times is None or times.queue_time is None:
            return
        self._observe["request_queue_time_seconds"](times.queue_time)
        if times.time_to_first_token is None or times.e2e_time is None:
            return
        decode = times.e2e_time - times.time_to_first_token
        longest = max(len(choice.token_ids) for choice in output.outputs)
        self._observe["time_to_first_token_seconds"](times.time_to_first_token)
        self._observe["e2e_request_latency_seconds"](times.e2e_time)
        self._observe["request_prefill_time_seconds"](times.time_to_first_token - times.queue_time)
        self._observe["request_decode_time_seconds"](decode)
        if longest > 1:
            self._observe["request_time_per_output_token_seconds"](decode / (longest - 1))


class _EngineCollector(Collector):
    """The engine's figures at one moment."""

    def __init__(self, stats: EngineStats, model_name: str) -> None:
        self._stats, self._model = stats, model_name

    def collect(self) -> Iterator[Metric]:
        stats, kv = self._stats, self._stats.kv_cache
        for name, text, value in (
            ("num_requests_running", "Requests in the batch.", stats.num_running),
            ("num_requests_waiting", "Requests that wait.", stats.num_waiting),
            ("kv_cache_usage_perc", "Blocks in use; 1 is all.", kv["usage"]),
        ):
            yield self._one(GaugeMetricFamily(_PREFIX + name, text, labels=["model_name"]), value)
        for name, text, value in (
            ("num_preemptions", "Requests that had to give their blocks back.", stats.num_preemptions),
            ("prefix_cache_queries", "Requests that looked for their beginning.", kv["prefix_hits"] + kv["prefix_misses"]),
            ("prefix_cache_hits", "Requests that found it.", kv["prefix_hits"]),
            ("prefix_cache_saved_tokens", "Tokens that were not computed again.", kv["prefix_saved_tokens"]),
        ):
            yield self._one(CounterMetricFamily(_PREFIX + name, text, labels=["model_name"]), value)
        waiting = GaugeMetricFamily(
            _PREFIX + "num_requests_waiting_by_reason", "Requests that wait.", labels=["model_name", "reason"]
        )
        for reason, count in stats.waiting_by_reason.items():
            waiting.add_metric([self._model, reason], count)
        yield waiting

    def _one(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric([self._model], value)
        return family
