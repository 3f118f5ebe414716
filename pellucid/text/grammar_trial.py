"""Compiling a grammar once in a process of its own, so that one that explodes takes nothing with it.

Schemas and grammars come from strangers. A few of them make the compiler take minutes, gigabytes, or the whole stack, and
then the process is gone: no exception tells. The trial process has limits on all three and may die; the next trial has another.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from pellucid.structured import StructuredOutputsParams

CPU_SECONDS = 2
MEMORY_BYTES = 2 << 30
STACK_BYTES = 4 << 20  # half of what a thread has who compiles it afterwards
# Limits of llguidance: Earley items a row, states of the lexer (some 2 KiB each).
LIMITS: dict[str, Any] = {
    "max_items_in_row": 1000,
    "max_lexer_states": 25_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}


class GrammarTrial:
    """The trial process, started on first use and again whenever it has died. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None

    def run(self, spec: StructuredOutputsParams) -> str | None:
        """Why this structure cannot be compiled; None when it can.

        Raises:
            OSError: the process cannot be started.
        """
        with self._lock:
            process = self._process if self._process is not None and self._process.poll() is None else _start()
            self._process = process
            answer = _ask(process, json.dumps(asdict(spec)))
            if answer is not None:
                error: str | None = json.loads(answer)["error"]
                return error
            process.kill()
            process.wait()
            self._process = None
        return f"it takes more than {CPU_SECONDS} s, {MEMORY_BYTES >> 20:,} MiB or {STACK_BYTES >> 20} MiB of stack to compile"

    def close(self) -> None:
        """Ends the process; harmless when called again."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.communicate()
                self._process = None


def _start() -> subprocess.Popen[str]:
    import pellucid

    command = [sys.executable, "-m", __name__]
    return subprocess.Popen(
        command,
        cwd=Path(pellucid.__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        start_new_session=True,
    )


def _ask(process: subprocess.Popen[str], line: str) -> str | None:
    """The answer, or None when the process died."""
    if process.stdin is None or process.stdout is None:
        return None
    with contextlib.suppress(OSError):
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return process.stdout.readline() or None
    return None


def error_of(spec: StructuredOutputsParams) -> str | None:
    """Compiles on a vocabulary of single bytes and makes the first mask; why that fails, if it does."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    from pellucid.text.grammar_source import grammar_source

    try:
        source = grammar_source(spec)
    except ValueError as error:
        return str(error)
    matcher = LLMatcher(LLTokenizer(_Bytes()), source, log_level=0, limits=LLParserLimits(**LIMITS))  # type: ignore[arg-type]
    if not matcher.is_error():
        mask = matcher.compute_bitmask()
        if not matcher.is_error() and (any(mask[:32]) or matcher.is_accepting()):
            return None
    return first_line(matcher.get_error())


def first_line(error: str) -> str:
    """What llguidance says, without the grammar and the state that it prints behind."""
    lines = [line.strip() for line in error.split("<non-verbose/>")[0].splitlines() if line.strip()]
    text = next(iter(lines), "")
    if not text or text in ("NoExtension", "NoExtensionBias"):
        return "no text satisfies it"
    detail = next((line for line in lines if line.startswith("error:")), "")
    return f"{text} {detail}".strip()[:300]


class _Bytes:
    """The 256 bytes and an end."""

    tokens = (*(bytes([value]) for value in range(256)), b"<end>")
    special_token_ids = (256,)
    eos_token_id = 256
    bos_token_id = None
    is_tokenizer_wrapper = True

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def _main() -> None:
    import resource
    import time

    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import llguidance  # noqa: F401  # its import is not the first structure's to pay

    for line in sys.stdin:
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + CPU_SECONDS, hard))
        try:
            error = error_of(StructuredOutputsParams.of(json.loads(line)))
        except Exception as problem:
            error = str(problem)
        print(json.dumps({"error": error}), flush=True)


if __name__ == "__main__":
    _main()
