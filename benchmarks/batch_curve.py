"""Draws what `pellucid bench batch-curve --output-json F` measured: `python benchmarks/batch_curve.py F ... --png F`. A line a file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLOURS = ("#2a6f97", "#c9a227", "#588157", "#9c6644")


def label_of(report: dict[str, Any]) -> str:
    """The model and how its weights are kept."""
    conditions = report["conditions"]
    engine = conditions["engine"]
    return f"{Path(conditions['model']).name}, {engine.get('quantization') or engine.get('dtype') or 'as stored'}"


def draw(reports: list[dict[str, Any]], png: Path) -> None:
    """Tokens a second and milliseconds a step over the number of sequences; dashed: what the machine allows at best."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (rate, step) = plt.subplots(1, 2, figsize=(9, 3.8))
    for colour, report in zip(COLOURS, reports, strict=False):
        points = report["points"]
        sizes = [point["batch_size"] for point in points]
        rate.plot(
            sizes, [p["tokens_per_second"] for p in points], color=colour, marker="o", ms=3, label=label_of(report)
        )
        step.plot(sizes, [1000 * p["step_seconds"]["median"] for p in points], color=colour, marker="o", ms=3)
        if all(p["limit_seconds"] is not None for p in points):
            dashed = {"color": colour, "linestyle": "--", "linewidth": 1}
            rate.plot(sizes, [p["limit_tokens_per_second"] for p in points], **dashed)
            step.plot(sizes, [1000 * p["limit_seconds"] for p in points], **dashed)
    for axis, title in ((rate, "tokens/s"), (step, "milliseconds a step")):
        axis.set_xlabel("sequences")
        axis.set_title(title, fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else "")
        axis.spines[["top", "right"]].set_visible(False)
    conditions = reports[0]["conditions"]
    where = f"{conditions['processor']}, {conditions['num_threads']} threads, {conditions['date']}"
    figure.suptitle(f"Decode steps by batch; dashed: the limit of the machine ({where})", fontsize=9)
    figure.legend(loc="lower center", ncol=len(reports), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=130)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", nargs="+", type=Path, help=f"at most {len(COLOURS)} files")
    parser.add_argument("--png", type=Path, required=True)
    options = parser.parse_args()
    if len(options.json) > len(COLOURS):
        parser.error(f"{len(options.json)} files were given; a picture shows at most {len(COLOURS)}")
    draw([json.loads(path.read_text()) for path in options.json], options.png)


if __name__ == "__main__":
    main()
