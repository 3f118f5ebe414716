"""Reports as aligned text for people, and the conditions under which they were measured."""

from __future__ import annotations

import datetime
from typing import Any

Rows = list[tuple[str, ...]]
_SPREAD = ("mean", "median", "p90", "p99", "least", "most")


def conditions(model: str, engine: dict[str, Any]) -> dict[str, Any]:
    """The machine, the version and the settings."""
    from pellucid.core import abi
    from pellucid.version import VERSION

    cpu = abi.cpu_info()
    context = abi.Context(engine.get("num_threads", 0), engine.get("isa", "auto"))
    try:
        chosen = {"isa": context.isa, "num_threads": context.num_threads}
    finally:
        context.close()
    return {
        "date": datetime.date.today().isoformat(),
        "pellucid": VERSION,
        "processor": cpu.model_name,
        "cores": cpu.physical_cores,
        **chosen,
        "model": model,
        "engine": engine,
    }


def table(rows: Rows) -> str:
    """Columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _milliseconds(value: float) -> str:
    return f"{1000 * value:,.2f}"


def _spreads(report: dict[str, Any], names: dict[str, str]) -> Rows:
    rows: Rows = [("milliseconds", *_SPREAD)]
    for key, label in names.items():
        spread = report.get(key)
        if spread is not None:
            rows.append((label, *[_milliseconds(spread[name]) for name in _SPREAD]))
    return rows


def _steps(steps: dict[str, float]) -> Rows:
    count, wall = max(1.0, steps["steps"]), steps["wall"]
    rows: Rows = [(f"{steps['steps']:,.0f} steps", "ms a step", "share")]
    for name in ("schedule", "execute", "sample", "output", "other"):
        rows.append((name, _milliseconds(steps[name] / count), f"{100 * steps[name] / wall:.1f} %"))
    return rows


def _latency(report: dict[str, Any]) -> list[str]:
    names = {
        "latency_seconds": "latency",
        "time_to_first_token_seconds": "first token",
        "time_per_output_token_seconds": "per token",
        "step_seconds": "step",
    }
    return [table(_spreads(report, names)), table(_steps(report["steps"])), _rates(report)]


def _rates(report: dict[str, Any]) -> str:
    labels = {
        "requests_per_second": "requests/s",
        "output_tokens_per_second": "output tokens/s",
        "total_tokens_per_second": "tokens/s, prompts included",
    }
    rates = [f"{report[key]:,.1f} {label}" for key, label in labels.items() if key in report]
    return f"{', '.join(rates)}; host's share {100 * report['steps']['host_share']:.1f} %"


def _startup(report: dict[str, Any]) -> list[str]:
    first = report["first_start"]
    packed = "" if first["from_cache"] else ", weights packed"
    rows = _spreads(report["seconds"], {name: name.replace("_", " ") for name in report["seconds"]})
    total = (
        f"first start {first['seconds']['total']:.2f} s{packed}; peak memory {report['peak_bytes'] / 2**20:,.0f} MiB"
    )
    return [table(rows), total]


def _batch_curve(report: dict[str, Any]) -> list[str]:
    rows: Rows = [("sequences", "ms a step", "p90", "tokens/s", "limit, tokens/s", "reached")]
    for point in report["points"]:
        limit = point["limit_tokens_per_second"]
        rows.append(
            (
                str(point["batch_size"]),
                _milliseconds(point["step_seconds"]["median"]),
                _milliseconds(point["step_seconds"]["p90"]),
                f"{point['tokens_per_second']:,.0f}",
                "-" if limit is None else f"{limit:,.0f}",
                "-" if limit is None else f"{100 * point['reached']:.0f} %",
            )
        )
    limits = dict(report["limits"])
    moved = f"memory {limits.pop('bytes_per_second') / 1e9:.1f} GB/s"
    peaks = ", ".join(f"{kind} {value / 1e9:,.0f} Gop/s" for kind, value in limits.items())
    return [table(rows), f"limits of this machine: {moved}; {peaks}"]


_SHOW = {"latency": _latency, "throughput": _latency, "startup": _startup, "batch-curve": _batch_curve}


def text_of(report: dict[str, Any]) -> str:
    """A report for people."""
    return "\n\n".join(_SHOW[report["kind"]](report))
