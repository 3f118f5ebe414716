#!/usr/bin/env python3
"""The same bits in any company: random requests on engines of every setting, each compared bit for bit with its lone run.

    python scripts/campaigns/soak.py --count 100000 --keep-going
    python scripts/campaigns/soak.py --model smollm2 --count 1000

A request is run alone once for each (request, precision, instruction set): on one thread, without prefix cache, chunks, plans
ahead or drafts. Then it is asked for again and again among others, and its tokens, log-probabilities, hidden states, activations,
text and ending must be equal to that run's in every bit.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kit.bits import OutputBits, begins_like, difference
from kit.campaign import Campaign, Plant, Report, run
from kit.scratch import Scratch
from kit.soak_cases import PRECISIONS, ROOM, STORED, Asked, Group, Model, Pool, Round, Rounds

from pellucid.config import DEFAULT_MODEL

ISAS = ("avx512", "avx2", "portable")
SMOLLM2 = "smollm2"
_STATES_MB = 1024  # a capture of a long context of a real model has more than the default allows
_LONE: dict[str, Any] = {
    "num_threads": 1,
    "max_num_seqs": 1,
    "enable_prefix_caching": False,
    "max_num_batched_tokens": 8192,
    "block_size": 16,
}
PLANTS = {
    "row": Plant("a log-probability of a step with a long neighbour is off by its last bit", "logprobs differ"),
    "chain": Plant("cached blocks are shared whatever steers their request", "differ"),
    "hidden": Plant("hidden states are off by their last bits", "hidden_states differ"),
}


class Soak:
    """Rounds of requests on engines that are made for each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._scratch = Scratch("soak", has_cache=options.model is None)
        self._plant = options.plant
        self._lone_runs: dict[tuple[Group, int], OutputBits] = {}
        self._lone_engines: dict[Group, Any] = {}
        self._figures: Counter[str] = Counter()
        is_smollm2 = options.model == SMOLLM2
        self._path = DEFAULT_MODEL if is_smollm2 else options.model or str(self._scratch.tiny_model())
        model = self._model(options.longest or (2060 if is_smollm2 else 8000))
        self._max_model_len = model.far + ROOM
        groups = [Group(name, isa) for name in self._precisions(options) for isa in _isas(options)]
        self._pool = Pool(options.seed, model, options.pool or (40 if is_smollm2 else 250))
        self._rounds = Rounds(self._pool, options.seed, groups, options.threads, options.round)

    def _model(self, far: int) -> Model:
        with self._open({"num_threads": 1, "max_model_len": 64, "num_blocks": 64}) as llm:
            config, tokenizer = llm.engine.executor.model.config, llm.get_tokenizer()
            vocab_size = min(config.vocab_size, tokenizer.vocab_size)
            return Model(vocab_size, config.hidden_size, config.num_hidden_layers, far)

    def _precisions(self, options: argparse.Namespace) -> list[str]:
        return list(options.precision or (PRECISIONS if options.model is None else STORED))

    def _open(self, settings: Mapping[str, Any]) -> Any:
        from pellucid import LLM

        return LLM(self._path, hidden_states_max_mb=_STATES_MB, **settings)

    # ---- lone runs ------------------------------------------------------------------------------------------------------

    def _lone(self, group: Group, asked: Asked) -> OutputBits:
        key = (group, asked.number)
        if key not in self._lone_runs:
            self._figures["lone runs"] += 1
            if group not in self._lone_engines:
                self._lone_engines[group] = self._open_lone(group)
            self._lone_runs[key] = _alone(self._lone_engines[group], asked)
        return self._lone_runs[key]

    def _open_lone(self, group: Group) -> Any:
        blocks = self._max_model_len // _LONE["block_size"] + 1
        settings = {**_LONE, "num_blocks": blocks, "max_model_len": self._max_model_len, **group.settings}
        return self._open(settings)

    def _check_lone(self, group: Group, asked: Asked, report: Report) -> None:
        """A lone run on an engine that never ran anything else must be the one that is kept."""
        llm = self._open_lone(group)
        try:
            told = difference(_alone(llm, asked), self._lone(group, asked))
        finally:
            llm.close()
        if told is not None:
            report(f"two lone runs: {told[0]}", f"{told[1]}\n{group}\n{asked}")

    # ---- a round --------------------------------------------------------------------------------------------------------

    def run(self, case: int, report: Report) -> int:
        """One engine and its requests."""
        planned = self._rounds.get(case)
        self._check_lone(planned.group, planned.asked[0], report)
        llm = self._open({"max_model_len": self._max_model_len, **planned.group.settings, **planned.settings})
        try:
            _plant(self._plant, llm)
            company = _Company(llm, planned)
            company.run()
            self._compare(company, planned, report)
            self._check_empty(llm, planned, report)
            self._book(llm, planned)
        finally:
            llm.close()
        return len(planned.asked)

    def _compare(self, company: _Company, planned: Round, report: Report) -> None:
        threads = "one thread" if planned.settings["num_threads"] == 1 else "several threads"
        for index, asked in enumerate(planned.asked):
            expected = self._lone(planned.group, asked)
            output = company.outputs[index]
            if output is None:
                report(f"no output, {threads}", f"request {index} never ended\n{planned}\n{asked}")
                continue
            found = OutputBits.of(output)
            compare = begins_like if company.was_cancelled(index) else difference
            told = compare(found, expected) or company.streamed_otherwise(index)
            if told is not None:
                report(f"{told[0]}, {threads}", f"request {index}: {told[1]}\n{planned}\n{asked}")

    @staticmethod
    def _check_empty(llm: Any, planned: Round, report: Report) -> None:
        llm.engine.scheduler.check_invariants()
        used = llm.kv_cache_stats()["used_blocks"]
        if used or llm.client.has_unfinished or not llm.reset_prefix_cache():
            report("something is left behind a round", f"{used} blocks used\n{planned}")

    def _book(self, llm: Any, planned: Round) -> None:
        stats, figures = llm.engine.stats(), self._figures
        figures["with several threads"] += len(planned.asked) * (planned.settings["num_threads"] > 1)
        figures["beyond 1,024 positions"] += sum(len(asked.prompt) > 1024 for asked in planned.asked)
        figures["preempted"] += stats.num_preemptions
        figures["cached tokens"] += stats.prefix_hits
        figures["drafts accepted"] += sum(record.n_accepted_tokens for record in llm.engine.trace.records)
        figures["cancelled"] += stats.finished.get("abort", 0)
        figures["steps"] += stats.num_steps

    def figures(self) -> Mapping[str, int]:
        """Of what took part."""
        return self._figures

    def close(self) -> None:
        """Frees the lone engines and the scratch folder."""
        for llm in self._lone_engines.values():
            llm.close()
        self._scratch.close()


def _alone(llm: Any, asked: Asked) -> OutputBits:
    client = llm.client
    request_id = client.submit(list(asked.prompt), asked.params, options=asked.options, stream=False)
    while not client.is_finished(request_id):
        client.step()
    bits = OutputBits.of(client.collect(request_id))
    client.release(request_id)
    return bits


class _Company:
    """Submits a round's requests in bursts between steps, cancels some, and keeps what comes."""

    def __init__(self, llm: Any, planned: Round) -> None:
        self._client, self._planned = llm.client, planned
        self.outputs: list[Any] = [None] * len(planned.asked)
        self._ids: dict[str, int] = {}
        self._submitted_at: dict[int, int] = {}
        self._steps = 0
        self._chunks: dict[int, list[Any]] = {}

    def run(self) -> None:
        """Until all requests have ended."""
        for burst in self._planned.bursts:
            for _ in range(burst):
                self._submit(len(self._ids))
            self._step()
        while self._client.has_unfinished:
            self._step()

    def _submit(self, index: int) -> None:
        asked, stream = self._planned.asked[index], self._planned.streams[index]
        name = self._client.submit(list(asked.prompt), asked.params, options=asked.options, stream=stream)
        self._ids[name] = index
        self._submitted_at[index] = self._steps

    def _step(self) -> None:
        for index, steps in self._planned.cancel_after.items():
            if self._submitted_at.get(index, self._steps) + steps == self._steps - 1:
                self._cancel(index)
        outputs = self._client.step_outputs()
        self._steps += 1
        for chunk in outputs.chunks:
            self._chunks.setdefault(self._ids[chunk.request_id], []).append(chunk)
        for output in outputs.finished:
            self.outputs[self._ids[output.request_id]] = output
            self._client.release(output.request_id)

    def _cancel(self, index: int) -> None:
        name = next((name for name, one in self._ids.items() if one == index), None)
        if name is not None and self.outputs[index] is None:
            self._client.cancel(name)

    def was_cancelled(self, index: int) -> bool:
        """It was ended before its own end."""
        return any(choice.finish_reason == "abort" for choice in self.outputs[index].outputs)

    def streamed_otherwise(self, index: int) -> tuple[str, str] | None:
        """Whether the chunks of a stream, joined, are another output."""
        if not self._planned.streams[index]:
            return None
        for choice in self.outputs[index].outputs:
            chunks = [chunk for chunk in self._chunks.get(index, []) if chunk.index == choice.index]
            tokens = [token for chunk in chunks for token in chunk.token_ids]
            text = "".join(chunk.text for chunk in chunks)
            if (tokens, text) != (choice.token_ids, choice.text):
                return (
                    "a stream says otherwise",
                    f"streamed {tokens} {text!r}, whole {choice.token_ids} {choice.text!r}",
                )
            if [chunk.finish_reason for chunk in chunks][-1:] != [choice.finish_reason]:
                return "a stream says otherwise", f"its last chunk ends with {chunks[-1:]}"
        return None


# ---- planted faults -----------------------------------------------------------------------------------------------------


def _plant(fault: str | None, llm: Any) -> None:
    if fault in _PLANTERS:
        _PLANTERS[fault](llm)


def _plant_row(llm: Any) -> None:
    """What a kernel does that writes over another row's memory, as small as it can be."""
    import dataclasses

    import numpy as np

    runner = llm.engine.executor
    execute = runner.execute

    def wrong(plan: Any) -> Any:
        output = execute(plan)
        if len(plan.entries) > 1 and any(entry.start + entry.num_tokens > 1024 for entry in plan.entries):
            for name, row in list(output.logprobs.items())[:1]:
                off = float(np.nextafter(np.float32(row.logprob), np.float32(-1e9)))
                output.logprobs[name] = dataclasses.replace(row, logprob=off)
        return output

    runner.execute = wrong


def _plant_chain(llm: Any) -> None:
    llm.engine.block_manager._chain_root = lambda request: bytes(16)


def _plant_hidden(llm: Any) -> None:
    output = llm.engine.output
    add = output.add_hidden_states

    def wrong(choice_id: str, positions: list[int], rows: Any) -> None:
        add(choice_id, positions, rows + 1e-7)

    output.add_hidden_states = wrong


_PLANTERS: dict[str, Callable[[Any], None]] = {
    "row": _plant_row,
    "chain": _plant_chain,
    "hidden": _plant_hidden,
}


def _isas(options: argparse.Namespace) -> list[str]:
    from pellucid.core import abi

    best = abi.ISA_CODES[abi.cpu_info().best_isa]
    return [isa for isa in options.isa if abi.ISA_CODES[isa] <= best]


def _add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", help="smollm2, or a folder; default: a tiny one, made for the purpose")
    group.add_argument("--threads", type=int, nargs="+", default=[1, 1, 2, 3], help="drawn from (default: 1 1 2 3)")
    group.add_argument("--isa", nargs="+", choices=ISAS, default=list(ISAS), help="drawn from (default: all)")
    group.add_argument(
        "--precision", nargs="+", choices=sorted({*PRECISIONS, *STORED}), help="drawn from (default: all)"
    )
    group.add_argument("--longest", type=int, help="longest context (default: 8,000; smollm2: 2,060)")
    group.add_argument(
        "--pool", type=int, help="requests for a precision and instruction set (default: 250; smollm2: 40)"
    )
    group.add_argument("--round", type=int, default=100, help="requests of a case (default: 100)")


CAMPAIGN = Campaign(
    "soak.py",
    "Random requests in random company, each compared bit for bit with its lone run.",
    Soak,
    count=100_000,
    plants=PLANTS,
    case_seconds=900.0,
    add_options=_add_options,
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the campaign; see `kit.campaign` for the exit status."""
    return run(CAMPAIGN, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
