"""A load's answers as the figures that `vllm bench serve` reports, under its names. Times in milliseconds where a name ends in _ms."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pellucid.bench.figures import percentile
from pellucid.bench.serve_client import Answer
from pellucid.bench.serve_load import LoadRun
from pellucid.errors import InvalidRequestError

# metric: its heading, and what a line calls it
METRICS = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
_WIDTH = 52


@dataclass(frozen=True)
class Timing:
    """One completed request. Seconds; `tpot` of a single token is None."""

    prompt_tokens: int
    output_tokens: int
    ttft: float
    e2el: float
    itl: list[float]

    @property
    def tpot(self) -> float | None:
        """Mean seconds of a token after the first."""
        return (self.e2el - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None


def timing_of(answer: Answer, prompt_tokens: int | None, count: Callable[[str], int] | None = None) -> Timing:
    """Tokens as the server counted them; else as `count` does the text, else one for each chunk."""
    made = answer.tokens("completion_tokens")
    if made is None:
        made = count(answer.text) if count is not None else len(answer.chunk_times)
    asked = answer.tokens("prompt_tokens")
    ttft = answer.ttft if answer.ttft is not None else answer.seconds
    return Timing(asked if asked is not None else prompt_tokens or 0, made, ttft, answer.latency, answer.itls)


def goodput_limits(pairs: Sequence[str]) -> dict[str, float]:
    """Of KEY:VALUE pairs: the most milliseconds that a good request takes, by metric.

    Raises:
        InvalidRequestError: a pair is not of this form, or its key is none of GOODPUT_METRICS.
    """
    limits = {}
    for pair in " ".join(pairs).replace(",", " ").split():
        key, _, text = pair.partition(":")
        if key not in GOODPUT_METRICS:
            raise InvalidRequestError("goodput", f"has {key!r}", limit=f"it takes {', '.join(GOODPUT_METRICS)}")
        try:
            limits[key] = float(text)
        except ValueError:
            raise InvalidRequestError("goodput", f"has {pair!r}", limit="it takes KEY:MILLISECONDS") from None
        if not limits[key] >= 0:
            raise InvalidRequestError("goodput", f"has {pair!r}", limit="milliseconds are at least 0")
    return limits


def is_good(timing: Timing, limits: Mapping[str, float]) -> bool:
    """Whether a request kept within every limit (milliseconds)."""
    values = {name: getattr(timing, name) or 0.0 for name in limits}
    return all(1000 * values[name] <= limit for name, limit in limits.items())


def most_open(answers: Sequence[Answer]) -> int:
    """The most requests that were open at one moment."""
    changes = sorted((at, step) for a in answers for at, step in ((a.started, 1), (a.started + a.seconds, -1)))
    now = most = 0
    for _, step in changes:
        now += step
        most = max(most, now)
    return most


def most_tokens_in_a_second(run: LoadRun) -> float:
    """Of the seconds since the beginning, the most chunks that came in one."""
    bins = Counter(int(a.started - run.began + at) for a in run.answers.values() for at in a.chunk_times)
    return float(max(bins.values(), default=0))


def metrics(
    run: LoadRun,
    timings: Mapping[int, Timing],
    *,
    percentiles: Sequence[float] = (99.0,),
    selected: Sequence[str] = tuple(METRICS),
    limits: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """All figures. `timings` are those of the requests of `run` that completed, by number."""
    seconds = max(run.seconds, 1e-9)
    done, answers = list(timings.values()), list(run.answers.values())
    read, made = sum(one.prompt_tokens for one in done), sum(one.output_tokens for one in done)
    chunks = sum(len(run.answers[number].chunk_times) for number in timings)
    report: dict[str, Any] = {
        "duration": run.seconds,
        "completed": len(done),
        "failed": len(answers) - len(done),
        "total_input_tokens": read,
        "total_output_tokens": made,
        "request_throughput": len(done) / seconds,
        "request_goodput": sum(is_good(one, limits) for one in done) / seconds if limits else None,
        "output_throughput": made / seconds,
        "total_token_throughput": (read + made) / seconds,
        "max_output_tokens_per_s": most_tokens_in_a_second(run),
        "max_concurrent_requests": most_open(answers),
        "total_chunks": chunks,
        "mean_chunks_per_request": chunks / len(done) if done else 0.0,
        "tokens_per_chunk": made / chunks if chunks else 0.0,
    }
    for name in selected:
        report |= _described(name, _values(name, done), percentiles)
    return report


def _values(name: str, done: Sequence[Timing]) -> list[float]:
    if name == "itl":
        return [gap for one in done for gap in one.itl]
    found = (getattr(one, name) for one in done)
    return [value for value in found if value is not None]


def percentile_name(percent: float) -> str:
    """99.0 -> p99, 99.9 -> p99.9."""
    return f"p{percent:g}"


def _described(name: str, values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    values = [1000 * value for value in values] or [0.0]
    found = {
        f"mean_{name}_ms": statistics.fmean(values),
        f"median_{name}_ms": percentile(values, 50),
        f"std_{name}_ms": statistics.pstdev(values),
    }
    return found | {f"{percentile_name(p)}_{name}_ms": percentile(values, p) for p in percentiles}


_LINES = (
    ("Successful requests", "completed", "{:,}"),
    ("Failed requests", "failed", "{:,}"),
    ("Maximum request concurrency", "max_concurrency", "{:,}"),
    ("Request rate configured (RPS)", "request_rate", "{}"),
    ("Benchmark duration (s)", "duration", "{:,.2f}"),
    ("Total input tokens", "total_input_tokens", "{:,}"),
    ("Total generated tokens", "total_output_tokens", "{:,}"),
    ("Request throughput (req/s)", "request_throughput", "{:,.2f}"),
    ("Request goodput (req/s)", "request_goodput", "{:,.2f}"),
    ("Output token throughput (tok/s)", "output_throughput", "{:,.2f}"),
    ("Peak output chunks in a second", "max_output_tokens_per_s", "{:,.0f}"),
    ("Peak concurrent requests", "max_concurrent_requests", "{:,}"),
    ("Total token throughput (tok/s)", "total_token_throughput", "{:,.2f}"),
    ("Chunks per request (mean)", "mean_chunks_per_request", "{:,.1f}"),
    ("Tokens per chunk (mean)", "tokens_per_chunk", "{:,.2f}"),
)


def text_of(report: Mapping[str, Any]) -> str:
    """The figures for people, in the order in which vLLM prints them; what is None is left out."""
    lines = [" Serving Benchmark Result ".center(_WIDTH, "=")]
    lines += [_line(label, form.format(report[key])) for label, key, form in _LINES if report.get(key) is not None]
    for name, (heading, short) in METRICS.items():
        keys = [key for key in report if key.endswith(f"_{name}_ms")]
        lines += [heading.center(_WIDTH, "-")] if keys else []
        lines += [_line(f"{_statistic(key)} {short} (ms)", f"{report[key]:,.2f}") for key in keys]
    return "\n".join([*lines, "=" * _WIDTH])


def _statistic(key: str) -> str:
    word = key.split("_", 1)[0]
    return word.upper() if word[1:2].isdigit() else word.capitalize()


def _line(label: str, value: str) -> str:
    return f"{label + ':':<40} {value:>11}"
