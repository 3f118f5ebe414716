"""The one entry to the tests: picks suites, says what it runs and what it skips, and fails when anything does.

    python scripts/run_tests.py --suite all

Further arguments (and -k) go to pytest.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
SUITES: dict[str, tuple[str, ...]] = {
    "stage0": ("tests/core", "tests/ops"),
    "stage1": ("tests/engine", "tests/offline"),
    "stage2": ("tests/sampling", "tests/online"),
    "parity": ("tests/parity",),
}
REFERENCE_PACKAGES = ("torch", "transformers", "accelerate")
NO_TESTS_RAN = 5  # pytest's exit status
END_SECONDS = 120  # that tests may take to end what they have started


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and what is left for pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument(
        "--model-path",
        help="models for the tests on a real one, separated by commas; default: PELLUCID_TEST_MODELS, else the small one",
    )
    parser.add_argument("--run-parity", choices=["auto", "always", "never"], default="auto")
    parser.add_argument(
        "--run-hf", choices=["auto", "always", "never"], default="auto", help="comparisons that need transformers"
    )
    parser.add_argument("--layout", choices=["all", "slot", "block"], default="all")
    parser.add_argument("--device", choices=["all", "cpu", "cuda"], default="all")
    parser.add_argument("--slow", action="store_true", help="also the tests marked slow, which CI leaves out")
    parser.add_argument(
        "--workers",
        type=int,
        help="processes that share the tests of a suite; default: 2 of 2 or more cores, 1 with -k",
    )
    parser.add_argument("-k", dest="keyword", help="goes to pytest")
    options, rest = parser.parse_known_args(arguments)
    if options.workers is None:
        options.workers = 1 if options.keyword or not has_xdist() else min(2, os.cpu_count() or 1)
    elif options.workers < 1:
        parser.error(f"--workers is {options.workers}; it must be at least 1")
    elif options.workers > 1 and not has_xdist():
        parser.error(f"--workers is {options.workers}; more than 1 needs pytest-xdist, which is not installed")
    return options, rest


def has_xdist() -> bool:
    """Whether pytest can share tests among processes."""
    return importlib.util.find_spec("xdist") is not None


def missing_packages() -> list[str]:
    """Reference packages that are not installed."""
    return [name for name in REFERENCE_PACKAGES if importlib.util.find_spec(name) is None]


def why_skipped(suite: str, options: argparse.Namespace) -> str | None:
    """Why a whole suite is passed over; None when it runs."""
    folders = [folder for folder in SUITES[suite] if (ROOT / folder).is_dir()]
    if not folders:
        return f"{' and '.join(SUITES[suite])} do not exist yet"
    if options.device == "cuda":
        return "this version runs on the CPU alone"
    if suite != "parity":
        return None
    modes = {options.run_parity, options.run_hf}
    if "never" in modes:
        return "--run-parity or --run-hf is never"
    missing = missing_packages()
    if missing and "always" not in modes:
        return f"{', '.join(missing)} not installed"
    return None


def real_model(options: argparse.Namespace) -> str | None:
    """The models for tests on a real one: as given, else the small one when it is pulled."""
    if options.model_path:
        return ",".join(
            str(Path(name).resolve()) if Path(name).exists() else name for name in options.model_path.split(",")
        )
    if os.environ.get("PELLUCID_TEST_MODELS"):
        return os.environ["PELLUCID_TEST_MODELS"]
    from pellucid.config import DEFAULT_MODEL
    from pellucid.weights import hub

    return str(hub.resolve_model(DEFAULT_MODEL)) if hub.is_pulled(DEFAULT_MODEL) else None


def run_suite(suite: str, options: argparse.Namespace, rest: list[str], environment: dict[str, str]) -> int:
    """Runs one suite; gives pytest's exit status."""
    folders = [folder for folder in SUITES[suite] if (ROOT / folder).is_dir()]
    keyword = ["-k", options.keyword] if options.keyword else []
    keyword += ["--kv-layout", options.layout] if options.layout != "all" else []
    keyword += ["--slow"] if options.slow else []
    keyword += ["-n", str(options.workers), "--dist", "worksteal"] if options.workers > 1 else []
    command = [sys.executable, "-m", "pytest", *folders, *keyword, *rest]
    print(f"[run] {suite}: pytest {' '.join([*folders, *keyword, *rest])}", flush=True)
    return status_of(command, environment)


def status_of(command: list[str], environment: dict[str, str]) -> int:
    """Runs pytest. Whoever ends this script ends it too, in order, so that no process of a test stays behind."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment)

    def end(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)
        process.wait(END_SECONDS)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        return process.wait()
    except KeyboardInterrupt:  # pytest had it too
        process.wait(END_SECONDS)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        process.kill()


def main(arguments: list[str]) -> int:
    """Runs what was asked for; 0 when all of it passed and at least one test ran in every suite."""
    options, rest = parse(arguments)
    model = real_model(options)
    environment = dict(os.environ)
    if options.model_path and model:
        environment["PELLUCID_TEST_MODELS"] = model
    print(
        f"[config] python {sys.version.split()[0]}, suite {options.suite}, layout {options.layout}, device {options.device}"
    )
    print(f"[config] real model: {model or 'none (pellucid pull brings the small one)'}", flush=True)
    suites = list(SUITES) if options.suite == "all" else [options.suite]
    results: dict[str, int] = {}
    for suite in suites:
        reason = why_skipped(suite, options)
        if reason is not None:
            print(f"[skip] {suite} because {reason}", flush=True)
            continue
        results[suite] = run_suite(suite, options, rest, environment)
        if results[suite] == NO_TESTS_RAN and options.keyword:
            results[suite] = 0 if options.suite == "all" else NO_TESTS_RAN
        print(f"[{'ok' if results[suite] == 0 else 'fail'}] {suite}", flush=True)
    if not results:
        print("[fail] no suite ran a test")
        return 1
    return 0 if all(status == 0 for status in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
