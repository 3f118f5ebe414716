"""Compiling a grammar once in a process of its own, so that one that explodes takes nothing with it.

Schemas and grammars come from strangers. A few of them make the compiler take minutes, gigabytes, or the whole stack, and
then the process is gone: no exception tells. The trial process has limits on all three and may die; the next trial has another.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from pellucid.api.structured_outputs import StructuredOutputsParams
from pellucid.owners import Home

CPU_SECONDS = 2
MEMORY_BYTES = 2 << 30
STACK_BYTES = 4 << 20  # half of what a thread has who compiles it afterwards
# Limits of llguidance: Earley items a row and a mask (an ambiguous grammar takes some 50 us for each, and all other requests wait for a
# mask), states of the lexer (some 2 KiB each).
LIMITS: dict[str, Any] = {
    "max_items_in_row": 1000,
    "step_max_items": 10_000,
    "max_lexer_states": 25_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}


class GrammarTrial:
    """The trial process, started on first use and again whenever it has died. Safe to share between threads.

    A process that was forked from the one that started it starts its own: the answers in its pipe are not for the child.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._home = Home("this trial of grammars")
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None

    def run(self, spec: StructuredOutputsParams, vocab_size: int, special: Mapping[str, int]) -> str | None:
        """Why this structure cannot be compiled; None when it can. `special` are the tokens that a grammar may name."""
        question = {"spec": asdict(spec), "vocab_size": vocab_size, "special": _named_in(spec, special)}
        if self._home.is_left:
            self._begin()
        with self._lock:
            process = self._process if self._process is not None and self._process.poll() is None else _start()
            self._process = process
            answer = None
            try:
                answer = _ask(process, json.dumps(question))
                if answer is not None:
                    error: str | None = json.loads(answer)["error"]
                    return error
            finally:
                if answer is None:  # it died; or the caller was interrupted, and the next would read the answer to this
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


def _named_in(spec: StructuredOutputsParams, special: Mapping[str, int]) -> dict[str, int]:
    named = spec.grammar or ""
    return {token: token_id for token, token_id in special.items() if token == spec.after or (token and token in named)}


def _start() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", __name__]
    return subprocess.Popen(
        command,
        cwd=Path(__file__).resolve().parents[2],
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


def error_of(spec: StructuredOutputsParams, vocab_size: int, special: Mapping[str, int]) -> str | None:
    """Compiles on a vocabulary of single bytes and `special` and makes the first mask; why that fails, if it does."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    from pellucid.structure.grammar_source import grammar_source

    try:
        source = grammar_source(spec, special)
    except ValueError as error:
        return str(error)
    matcher = LLMatcher(LLTokenizer(_Bytes(vocab_size, special)), source, log_level=0, limits=LLParserLimits(**LIMITS))  # type: ignore[arg-type]
    if not matcher.is_error():
        mask = matcher.compute_bitmask()
        if not matcher.is_error() and any(mask):
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
    """The 256 bytes, an end, the special tokens at their ids, and nothing at the other ids."""

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(self, vocab_size: int, special: Mapping[str, int]) -> None:
        by_id = {token_id: token.encode() for token, token_id in special.items()}
        free = (token_id for token_id in range(vocab_size + 257) if token_id not in by_id)
        own = dict(zip(free, (*(bytes([value]) for value in range(256)), b"<end>"), strict=False))
        self.eos_token_id = max(own)
        self.special_token_ids = (*by_id, self.eos_token_id)
        count = max(vocab_size, *by_id, *own) + 1
        self.tokens = [own.get(token_id, by_id.get(token_id, b"")) for token_id in range(count)]

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
            question = json.loads(line)
            spec = StructuredOutputsParams.of(question["spec"])
            error = error_of(spec, question["vocab_size"], question["special"])
        except Exception as problem:
            error = str(problem)
        print(json.dumps({"error": error}), flush=True)


if __name__ == "__main__":
    _main()
