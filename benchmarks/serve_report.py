"""What `serve_compare.py` found, as tables and charts: medians over rounds, and their spread."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from report import COLOURS

# figure of a round: heading, unit, whether more is better
FIGURES = {
    "output_throughput": ("output tokens/s", True),
    "median_ttft_ms": ("TTFT median, ms", False),
    "p99_ttft_ms": ("TTFT p99, ms", False),
    "median_tpot_ms": ("TPOT median, ms", False),
    "p99_itl_ms": ("ITL p99, ms", False),
    "median_e2el_ms": ("whole request median, ms", False),
}
CHARTED = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_itl_ms")


def values_of(reports: list[dict[str, Any]], figure: str) -> list[float]:
    """A figure in each round."""
    return [float(report[figure]) for report in reports]


def ratio_to_best(figure: str, by_engine: dict[str, list[dict[str, Any]]]) -> tuple[float, str] | None:
    """Pellucid against the best peer, above 1 where it is ahead; None where one of them is missing."""
    medians = {engine: statistics.median(values_of(reports, figure)) for engine, reports in by_engine.items()}
    own = medians.pop("pellucid", None)
    if not own or not medians:
        return None
    is_more = FIGURES[figure][1]
    peer = (max if is_more else min)(medians, key=lambda engine: medians[engine])
    return (own / medians[peer] if is_more else medians[peer] / own), peer


def _cell(values: list[float]) -> str:
    middle, least, most = statistics.median(values), min(values), max(values)
    form = "{:,.0f}" if middle >= 100 else "{:,.1f}"
    return f"{form.format(middle)} ({form.format(least)}–{form.format(most)})"


def markdown(report: dict[str, Any]) -> str:
    """The conditions, and a table for each group and load."""
    c = report["conditions"]
    parts = [
        f"{c['machine']['processor']}, {c['threads']} threads. Median of {c['rounds']} rounds (least–most); each server alone on the "
        "machine with the client.\n"
    ]
    for group, result in report["groups"].items():
        lines = [f"### {group}", ""]
        for load, by_engine in result["figures"].items():
            engines = [engine for engine in result["engines"] if engine in by_engine]
            head = [load, *engines, "ratio to the best peer"]
            lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            for figure, (heading, _) in FIGURES.items():
                cells = [_cell(values_of(by_engine[engine], figure)) for engine in engines]
                ratio = ratio_to_best(figure, by_engine)
                said = f"{ratio[0]:.2f} ({ratio[1]})" if ratio else "–"
                lines.append("| " + " | ".join([heading, *cells, said]) + " |")
            lines.append("")
        for engine, seconds in result["start_seconds"].items():
            peak = max(result["peak_bytes"].get(engine, [0]))
            lines.append(
                f"{engine}: {statistics.median(seconds):.1f} s to a healthy server, {peak / 2**20:,.0f} MiB at most"
            )
        lines += [f"\nfailed: {engine}: {why}" for engine, why in result["failed"].items()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def draw_charts(report: dict[str, Any], folder: Path) -> None:
    """A picture a group: a row a load, a panel a figure, bars of medians with their spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for group, result in report["groups"].items():
        loads = result["figures"]
        if not loads:
            continue
        size = (2.6 * len(CHARTED), 2.6 * len(loads) + 0.8)
        figure, axes = plt.subplots(len(loads), len(CHARTED), figsize=size, squeeze=False)
        for row, (load, by_engine) in zip(axes, loads.items(), strict=True):
            row[0].set_ylabel(load, fontsize=9)
            for axis, name in zip(row, CHARTED, strict=True):
                _draw_panel(axis, name, {e: by_engine[e] for e in result["engines"] if e in by_engine})
        found = {
            label: handle for row in axes for handle, label in zip(*row[0].get_legend_handles_labels(), strict=True)
        }
        figure.legend(found.values(), found.keys(), loc="lower center", ncol=len(found), fontsize=8, frameon=False)
        c = report["conditions"]
        figure.suptitle(f"servers, {group}, {c['threads']} cores, median of {c['rounds']} rounds", fontsize=10)
        figure.tight_layout(rect=(0, 0.05, 1, 1))
        figure.savefig(folder / f"serve-{group.replace('/', '-')}.png", dpi=130)
        plt.close(figure)


def _draw_panel(axis: Any, name: str, by_engine: dict[str, list[dict[str, Any]]]) -> None:
    heading, is_more = FIGURES[name]
    for i, (engine, reports) in enumerate(by_engine.items()):
        values = values_of(reports, name)
        middle = statistics.median(values)
        axis.bar(i, middle, color=COLOURS[engine], label=engine)
        axis.plot([i, i], [min(values), max(values)], color="black", linewidth=1)
        axis.text(
            i, middle, f"{middle:,.0f}" if middle >= 100 else f"{middle:,.1f}", ha="center", va="bottom", fontsize=7
        )
    axis.set_title(f"{heading} ({'more' if is_more else 'less'} is better)", fontsize=8)
    axis.set_xticks([])
    axis.tick_params(labelsize=7)
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
