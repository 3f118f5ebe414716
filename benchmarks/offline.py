"""Pellucid beside llama.cpp and transformers: the same bfloat16 weights, the same prompts, exact lengths, rounds interleaved in one run.

    python benchmarks/offline.py --python llama.cpp=PATH --python transformers=PATH [--rounds 3] [--json F] [--png F] [--markdown F]

Each engine lives in a process of its own, in its own environment (`setup_peers.py` makes them), and speaks JSON lines. In every round
every case runs once on every engine, in an order that rotates. Reported: medians, spread, ratios.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORKERS = {
    "pellucid": "pellucid_worker.py",
    "llama.cpp": "llama_cpp_worker.py",
    "transformers": "transformers_worker.py",
}
TOKEN_RANGE = (100, 40_000)


@dataclass(frozen=True)
class Case:
    """One measurement: what is asked of an engine, and what its tokens are."""

    name: str
    kind: str  # decode, prefill, single or mixed
    prompts: list[int]
    outputs: list[int]
    unit: str = "output tokens/s"


def mixed_lengths() -> tuple[list[int], list[int]]:
    """64 requests: prompts of 32..512 tokens, outputs of 32..256."""
    draw = random.Random(11)
    return [draw.randint(32, 512) for _ in range(64)], [draw.randint(32, 256) for _ in range(64)]


def cases() -> dict[str, Case]:
    """All cases, by name."""
    made = [Case(f"decode {batch}", "decode", [128] * batch, [64] * batch) for batch in (1, 4, 16, 32)]
    made.append(Case("prefill 1024", "prefill", [1024], [1], "prompt tokens/s"))
    made.append(Case("single 128+128", "single", [128], [128]))
    made.append(Case("mixed 64", "mixed", *mixed_lengths()))
    return {case.name: case for case in made}


def prompts_of(case: Case) -> list[list[int]]:
    """Token ids drawn with a fixed seed: the same for every engine and round."""
    draw = random.Random(case.name)
    return [[draw.randrange(*TOKEN_RANGE) for _ in range(length)] for length in case.prompts]


class Worker:
    """An engine in a process of its own."""

    def __init__(self, name: str, python: str, models: dict[str, str], threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [python, str(HERE / "workers" / WORKERS[name])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.name = name
        self.versions: dict[str, str] = self.ask({"do": "load", "models": models, "threads": threads})["versions"]

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """One command, one reply."""
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the worker has no pipes")
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def measure(self, case: Case) -> float:
        """Tokens a second."""
        command = {"do": "run", "kind": case.kind, "prompts": prompts_of(case), "outputs": case.outputs}
        reply = self.ask(command)
        return float(reply["tokens"] / reply["seconds"])

    def close(self) -> None:
        """Ends the process."""
        if self.process.stdin is not None:
            self.process.stdin.write(json.dumps({"do": "quit"}) + "\n")
            self.process.stdin.close()
        self.process.wait(timeout=30)


@dataclass
class Report:
    """Figures by case and engine, and the conditions under which they were measured."""

    conditions: dict[str, Any]
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def median(self, case: str, engine: str) -> float:
        """Of all rounds."""
        return statistics.median(self.figures[case][engine])

    def markdown(self) -> str:
        """A table: medians, spread, and Pellucid as a ratio of each peer."""
        engines = list(self.conditions["versions"])
        peers = [engine for engine in engines if engine != "pellucid"]
        head = ["case", *engines, *[f"ratio to {peer}" for peer in peers]]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for case, by_engine in self.figures.items():
            cells = [
                f"{self.median(case, e):,.0f} ({min(by_engine[e]):,.0f}–{max(by_engine[e]):,.0f})" for e in engines
            ]
            ratios = [f"{self.median(case, 'pellucid') / self.median(case, peer):.2f}" for peer in peers]
            lines.append("| " + " | ".join([case, *cells, *ratios]) + " |")
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return {"conditions": self.conditions, "figures": self.figures}


def machine() -> dict[str, Any]:
    """The processor and the system."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    return {"processor": model, "cores": os.cpu_count(), "system": platform.platform()}


def draw_chart(report: Report, path: Path) -> None:
    """Bars of medians with their spread, a panel a case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    engines = list(report.conditions["versions"])
    colours = ["#2a6f97", "#c9a227", "#9c6644", "#6c757d"]
    figure, axes = plt.subplots(1, len(report.figures), figsize=(2.3 * len(report.figures), 3.6))
    for axis, (case, by_engine) in zip(axes, report.figures.items(), strict=True):
        for i, engine in enumerate(engines):
            values = by_engine[engine]
            middle = statistics.median(values)
            axis.bar(i, middle, color=colours[i % len(colours)], label=engine)
            axis.plot([i, i], [min(values), max(values)], color="black", linewidth=1)
            axis.text(i, middle, f"{middle:,.0f}", ha="center", va="bottom", fontsize=7)
        axis.set_title(case, fontsize=9)
        axis.set_xticks([])
        axis.tick_params(labelsize=7)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("tokens/s", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(engines), fontsize=8, frameon=False)
    title = f"{report.conditions['model']}, {report.conditions['machine']['cores']} cores, median of {report.conditions['rounds']} rounds"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help="interpreter of an engine")
    parser.add_argument("--cases", default=",".join(cases()), help="names, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


def main() -> None:
    """Runs the rounds and writes the report."""
    options = parse()
    pythons = {"pellucid": sys.executable, **dict(entry.split("=", 1) for entry in options.python)}
    made = subprocess.run([sys.executable, str(HERE / "make_models.py")], capture_output=True, text=True, check=True)
    models = json.loads(made.stdout.splitlines()[-1])
    workers = [Worker(name, pythons[name], models, options.threads) for name in WORKERS if name in pythons]
    chosen = [cases()[name] for name in options.cases.split(",")]
    report = Report(
        {
            "date": datetime.date.today().isoformat(),
            "model": "SmolLM2-135M-Instruct, bfloat16",
            "machine": machine(),
            "threads": options.threads,
            "rounds": options.rounds,
            "versions": {worker.name: worker.versions for worker in workers},
        },
        {case.name: {worker.name: [] for worker in workers} for case in chosen},
    )
    for worker in workers:
        worker.measure(cases()["decode 1"])  # first touch of the weights counts for nobody
    for turn in range(options.rounds):
        for case in chosen:
            for worker in workers[turn % len(workers) :] + workers[: turn % len(workers)]:
                figure = worker.measure(case)
                report.figures[case.name][worker.name].append(figure)
                print(f"round {turn + 1}  {case.name:16} {worker.name:14} {figure:10,.1f} {case.unit}", flush=True)
    for worker in workers:
        worker.close()
    print("\n" + report.markdown())
    if options.json:
        options.json.write_text(json.dumps(report.as_json(), indent=1))
    if options.markdown:
        options.markdown.write_text(report.markdown())
    if options.png:
        draw_chart(report, options.png)


if __name__ == "__main__":
    main()
