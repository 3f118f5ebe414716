"""One start in a process of its own: `python -m pellucid.bench.startup_child JSON`. Prints when it got how far, and what it held.

Times are of the system's monotonic clock, so that the parent, which started this process, can subtract.
"""

from __future__ import annotations

import time

_BEGAN = time.monotonic()

import json  # noqa: E402  (the clock stands before everything)
import sys  # noqa: E402


def peak_bytes() -> int:
    """The most memory that this process has held; resident, mapped weights included."""
    import resource

    factor = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor


def main() -> None:
    """Loads, makes one token, reports."""
    asked = json.loads(sys.argv[1])
    from pellucid import LLM, SamplingParams
    from pellucid.executor.uniproc import UniProcExecutor

    imported = time.monotonic()
    with LLM(asked["model"], **asked["engine"]) as llm:
        loaded = time.monotonic()
        prompt = asked["prompt"] if llm.engine.tokenizer is not None else list(range(1, 9))
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=1)
        tokens = sum(len(chunk.token_ids) for chunk in llm.stream(prompt, params))
        done = time.monotonic()
        executor = llm.engine.executor
        from_cache = isinstance(executor, UniProcExecutor) and executor.model.from_cache
    if tokens != 1:
        raise RuntimeError(f"{tokens} tokens were made; 1 was asked for")
    found = {"began": _BEGAN, "imported": imported, "loaded": loaded, "first_token": done}
    print(json.dumps({**found, "from_cache": from_cache, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
