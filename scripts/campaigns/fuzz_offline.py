#!/usr/bin/env python3
"""Random requests through Python, valid and hostile, beside well-behaved neighbours.

    python scripts/campaigns/fuzz_offline.py --count 100000 --keep-going

`LLM` (alone and from several threads) and `AsyncLLMEngine` (on a thread and in a process) get every field of the parameters, options
and keywords with valid, boundary and hostile values. Whatever they get: nothing crashes or hangs; an error is typed and names a field;
the neighbours' bits are those of their lone runs; and at the end of a case no block is used, no request is left, the books are right.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kit.calls import MAX_MODEL_LEN, Call, Calls, options_of, params_of
from kit.campaign import Campaign, Plant, Report, run
from kit.judge import judge_error, judge_output
from kit.neighbours import Neighbour, make_neighbours
from kit.scratch import Scratch

from pellucid import LLM
from pellucid.api.outputs import RequestOutput
from pellucid.config import EngineConfig
from pellucid.service.async_engine import AsyncLLMEngine

KINDS = ("llm", "threads", "thread", "process")
_CALLS = {"llm": 120, "threads": 60, "thread": 150, "process": 250}  # of a case
_NUM_THREADS, _NUM_CALLERS, _NUM_LIVING = 3, 4, 3
_PATIENCE = 60.0  # seconds that one call may take
_ODD_IDS: tuple[Any, ...] = ("", "unknown", "x" * 600, "\ud800", "a\0b", None, 5, b"id")
PLANTS = {
    "neighbour": Plant("a neighbour's penalty changes log-probabilities by their last bit", "hurt: logprobs differ"),
    "untyped": Plant(
        "the check of a request fails with a KeyError for some top_k", "untyped error: (Key|Pellucid)Error"
    ),
    "unnamed": Plant("an error about temperature names no field", "names no field: .*something is wrong"),
    "leak": Plant("a request that is cancelled keeps a block", "left behind|InvariantError|block N counts|are held"),
}


class FuzzOffline:
    """Cases go round the kinds of engines."""

    def __init__(self, options: argparse.Namespace) -> None:
        logging.getLogger("pellucid").setLevel(logging.CRITICAL)
        self._seed, self._plant = options.seed, options.plant
        can_plant = [kind for kind in options.kinds if kind != "process"]  # engines that can be reached into
        self._kinds = can_plant if options.plant in _PLANTERS and can_plant else options.kinds
        self._calls = {kind: options.calls or count for kind, count in _CALLS.items()}
        self._scratch = Scratch("fuzz-offline")
        odd, bare = self._scratch.tiny_model("odd", has_beyond=True), self._scratch.tiny_model("bare")
        (bare / "tokenizer.json").unlink()
        self._models = [
            (path, make_neighbours(path, 24, vocab_size=300, longest=MAX_MODEL_LEN)) for path in (odd, bare)
        ]
        self._figures: Counter[str] = Counter()

    def run(self, case: int, report: Report) -> int:
        """One engine and its calls."""
        kind, draw = self._kinds[case % len(self._kinds)], Random(f"{self._seed}/{case}")
        settings = {**_settings(draw), "max_model_len": MAX_MODEL_LEN, "num_threads": 1}
        model, neighbours = self._models[draw.random() < 0.1]  # one of them has no tokenizer
        if not settings["hidden_states"]:
            neighbours = [one for one in neighbours if one.options.hidden_states is None]
        told, count = _Told(report, self._figures, f"{kind}, {model.name}, {settings}"), self._calls[kind]
        if kind in ("llm", "threads"):
            with LLM(model, **settings) as llm:
                _plant(self._plant, llm.engine)
                play = _play_llm if kind == "llm" else _play_threads
                play(llm, draw, neighbours, told, count)
                _check_llm(llm, told)
        else:
            config = EngineConfig.from_kwargs(model, settings)
            engine = AsyncLLMEngine.start(config, engine_process=kind == "process")
            try:
                if kind == "thread":
                    _plant(self._plant, engine._transport.owner.engine)  # type: ignore[attr-defined]
                asyncio.run(_play_async(engine, draw, neighbours, told, count))
            finally:
                engine.close()
        self._figures[f"through {kind}"] += count
        return count

    def figures(self) -> Mapping[str, int]:
        """Of what took part."""
        return self._figures

    def close(self) -> None:
        """Removes the scratch folder."""
        self._scratch.close()


def _settings(draw: Random) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "max_num_seqs": draw.choice((2, 8, 16)),
        "max_num_batched_tokens": draw.choice((16, 64, 512)),
        "enable_prefix_caching": draw.random() < 0.6,
        "num_blocks": draw.choice((16, 64, 256)),
        "block_size": 8,
        "hidden_states": draw.random() < 0.95,
    }
    kind = draw.randrange(6)
    if kind == 0:
        settings |= {"kv_layout": "slot", "num_blocks": draw.choice((128, 1024))}
        del settings["block_size"]
    elif kind == 1:
        settings["async_scheduling"] = True
    elif kind == 2:
        settings |= {"speculative_method": "ngram", "prompt_lookup_min": 1, "async_scheduling": draw.random() < 0.5}
    elif kind == 3:
        settings |= {"policy": "prefill_first", "max_num_batched_tokens": 512}  # it computes whole prompts
    elif kind == 4:
        settings |= {"policy": "padded", "max_num_batched_tokens": 512, "block_size": 64}
    return settings


class _Told:
    """Where findings of a case go, with what they have in common."""

    def __init__(self, report: Report, figures: Counter[str], where: str) -> None:
        self.report, self.figures, self.where = report, figures, where

    def error(self, call: Call, error: Exception) -> None:
        """An error that a call brought."""
        self.figures["refused"] += 1
        signature = judge_error(call, error)
        if signature is not None:
            self.report(signature, f"{type(error).__name__}: {str(error)[:500]}\n{call}\n{self.where}")

    def outputs(self, call: Call, params: Any, outputs: list[RequestOutput]) -> None:
        """What an accepted call brought."""
        self.figures["accepted"] += 1
        for output in outputs:
            told = judge_output(call, params, output)
            if told is not None:
                self.report(told[0], f"{told[1][:800]}\n{call}\n{self.where}")


# ---- LLM ----------------------------------------------------------------------------------------------------------------

_LLM_METHODS: dict[str, Callable[..., Any]] = {
    "generate": LLM.generate,
    "generate_many": LLM.generate,
    "chat": LLM.chat,
    "stream": LLM.stream,
    "score": LLM.score,
    "encode": LLM.encode,
}


def _call_llm(llm: LLM, call: Call, told: _Told, leave_after: int) -> None:
    try:
        if call.method == "score":
            llm.score(call.prompt[0], call.prompt[1], **call.options)
            return
        if call.method == "encode":
            llm.encode(call.prompt)
            return
        params = params_of(call)
        if call.method == "stream":
            chunks = llm.stream(call.prompt, params, **call.options)
            for number, _ in enumerate(chunks):
                if number == leave_after:
                    break
            chunks.close()  # type: ignore[attr-defined]
            return
        if call.method == "chat":
            outputs = llm.chat(call.prompt, params, **call.options)
        else:
            inputs = call.prompt if call.method == "generate_many" or isinstance(call.prompt, str) else [call.prompt]
            outputs = llm.generate(inputs, params, **call.options)
        told.outputs(call, params, outputs)
    except Exception as error:
        told.error(call, error)


class _Beside:
    """Neighbours in flight on the engine of an `LLM`: every call steps them along."""

    def __init__(self, llm: LLM, draw: Random, neighbours: list[Neighbour], told: _Told) -> None:
        self._client, self._draw, self._neighbours, self._told = llm.client, draw, neighbours, told
        self._living: dict[str, Neighbour] = {}

    def tend(self) -> None:
        """Judges those that have ended, and submits others."""
        self._settle()
        while len(self._living) < _NUM_LIVING:
            one = self._draw.choice(self._neighbours)
            self._living[self._client.submit(one.prompt, one.params, options=one.options, stream=False)] = one

    def finish(self) -> None:
        """Lets all come to their end."""
        while self._client.has_unfinished:
            self._client.step()
        self._settle()
        if self._living:
            self._told.report("a neighbour never ended", f"{list(self._living)}\n{self._told.where}")

    def _settle(self) -> None:
        for name in [name for name in self._living if self._client.is_finished(name)]:
            self._told.figures["neighbours"] += 1
            self._living.pop(name).judge(self._client.collect(name), self._told.report, self._told.where)
            self._client.release(name)


def _play_llm(llm: LLM, draw: Random, neighbours: list[Neighbour], told: _Told, count: int) -> None:
    calls, beside = Calls(_LLM_METHODS), _Beside(llm, draw, neighbours, told)
    for _ in range(count):
        beside.tend()
        for _ in range(draw.choice((0, 1, 2))):
            llm.client.step()
        _call_llm(llm, calls.draw(draw), told, draw.randrange(4))
    beside.finish()


def _play_threads(llm: LLM, draw: Random, neighbours: list[Neighbour], told: _Told, count: int) -> None:
    """Each thread asks for what is well-behaved and what is not, by turns."""

    def work(draw: Random) -> None:
        calls = Calls({"generate": LLM.generate, "chat": LLM.chat, "stream": LLM.stream})
        for _ in range(count // _NUM_THREADS):
            one = draw.choice([one for one in neighbours if one.options.hidden_states is None])
            try:
                output = llm.generate([one.prompt], one.params, use_tqdm=False)[0]
                told.figures["neighbours"] += 1
                one.judge(output, lambda what, how: told.report(f"{what}, several threads", how), told.where)
            except Exception as error:
                told.report(
                    f"a neighbour was refused, several threads: {type(error).__name__}", f"{error}\n{told.where}"
                )
            _call_llm(llm, calls.draw(draw), told, draw.randrange(4))

    threads = [threading.Thread(target=work, args=(Random(draw.random()),)) for _ in range(_NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _check_llm(llm: LLM, told: _Told) -> None:
    engine = llm.engine
    while llm.client.has_unfinished:
        llm.client.step()
    engine.scheduler.check_invariants()
    left = [request.request_id for request in engine.scheduler] + list(engine.output.requests)
    used = llm.kv_cache_stats()["used_blocks"]
    if left or used or not llm.reset_prefix_cache():
        told.report("something is left behind a case", f"requests {left}, {used} blocks\n{told.where}")


# ---- AsyncLLMEngine -----------------------------------------------------------------------------------------------------

_ASYNC_METHODS: dict[str, Callable[..., Any]] = {
    "generate": AsyncLLMEngine.generate,
    "stream": AsyncLLMEngine.stream,
    "submit": AsyncLLMEngine.submit,
}


async def _play_async(
    engine: AsyncLLMEngine, draw: Random, neighbours: list[Neighbour], told: _Told, count: int
) -> None:
    is_over = asyncio.Event()
    beside = [
        asyncio.create_task(_neighbour(engine, Random(draw.random()), neighbours, told, is_over)) for _ in range(3)
    ]
    shares = [count // _NUM_CALLERS + (i < count % _NUM_CALLERS) for i in range(_NUM_CALLERS)]
    callers = [_caller(engine, Random(draw.random()), share, told) for share in shares]
    await asyncio.gather(*callers)
    is_over.set()
    await asyncio.gather(*beside)
    await _check_async(engine, told)


async def _neighbour(
    engine: AsyncLLMEngine, draw: Random, neighbours: list[Neighbour], told: _Told, is_over: asyncio.Event
) -> None:
    while not is_over.is_set():
        one = draw.choice(neighbours)
        try:
            output = await asyncio.wait_for(engine.generate(one.prompt, one.params, options=one.options), _PATIENCE)
        except Exception as error:
            told.report(f"a neighbour was refused: {type(error).__name__}", f"{error}\n{told.where}")
            return
        told.figures["neighbours"] += 1
        one.judge(output, told.report, told.where)


async def _caller(engine: AsyncLLMEngine, draw: Random, count: int, told: _Told) -> None:
    calls = Calls(_ASYNC_METHODS)
    for _ in range(count):
        call = calls.draw(draw)
        try:
            await asyncio.wait_for(_call_async(engine, call, draw, told), _PATIENCE)
        except asyncio.TimeoutError:
            told.report("a call never ends", f"{call}\n{told.where}")
        except Exception as error:
            told.error(call, error)
        if draw.random() < 0.1:
            await _odd_id(engine, draw, told)


async def _call_async(engine: AsyncLLMEngine, call: Call, draw: Random, told: _Told) -> None:
    params, keywords = params_of(call), options_of(call.options)
    if call.method == "generate":
        told.outputs(call, params, [await engine.generate(call.prompt, params, **keywords)])
    elif call.method == "stream":
        leave_after, number = draw.choice((0, 1, 3, 1000)), 0
        chunks = engine.stream(call.prompt, params, **keywords)
        async for _ in chunks:
            number += 1
            if number > leave_after:
                break
        await chunks.aclose()  # type: ignore[attr-defined]
        told.figures["accepted"] += 1
    else:
        name = await engine.submit(call.prompt, params, **keywords)
        try:
            if draw.random() < 0.3:
                await engine.cancel(name)
            output = await engine.wait(name)
        finally:
            await engine.cancel(name)
            await engine.release(name)
        if all(choice.finish_reason != "abort" for choice in output.outputs):
            told.outputs(call, params, [output])


async def _odd_id(engine: AsyncLLMEngine, draw: Random, told: _Told) -> None:
    """Ids that name nothing: an answer that says so, or a KeyError."""
    name = draw.choice(_ODD_IDS)
    asked = draw.choice(("cancel", "collect", "wait", "status", "is_finished", "release", "steps"))
    call = Call(asked, name, options={"since": 0, "limit": 1, "request_id": name})
    try:
        if asked == "steps":
            await engine.steps(draw.choice((0, -1, 10**30, -(2**63), "a", None)), draw.choice((1, 0, 5000, -1, 1.5)))
        else:
            await getattr(engine, asked)(name)
    except KeyError:
        pass
    except Exception as error:
        told.error(call, error)


async def _check_async(engine: AsyncLLMEngine, told: _Told) -> None:
    for _ in range(200):
        stats = await engine.stats()
        if not (stats.num_running or stats.num_waiting or stats.kv_cache["used_blocks"]):
            break
        await asyncio.sleep(0.02)
    else:
        told.report("something is left behind a case", f"{stats}\n{told.where}")
    if not await engine.reset_prefix_cache():
        told.report("blocks are held behind a case", f"{stats.kv_cache}\n{told.where}")
    if not engine.is_alive:
        told.report("the engine is dead", f"{engine.error}\n{told.where}")
    left = list(engine._book.streams), list(engine._book.calls)
    if any(left):
        told.report("the book of requests is not empty behind a case", f"{left}\n{told.where}")
    told.figures["checked"] += 1


# ---- planted faults -----------------------------------------------------------------------------------------------------


def _plant(fault: str | None, engine: Any) -> None:
    if fault in _PLANTERS:
        _PLANTERS[fault](engine)


def _plant_neighbour(engine: Any) -> None:
    import dataclasses
    import math

    execute = engine.executor.execute

    def wrong(plan: Any) -> Any:
        output = execute(plan)
        states = {entry.request_id: engine.scheduler.get(entry.request_id) for entry in plan.entries}
        hurts = any(one and one.sampling_params.repetition_penalty == 10.0 for one in states.values())
        for name, row in list(output.logprobs.items()):
            if hurts and states[name] and states[name].sampling_params.repetition_penalty != 10.0:
                output.logprobs[name] = dataclasses.replace(row, logprob=math.nextafter(row.logprob, -math.inf))
        return output

    engine.executor.execute = wrong


def _plant_untyped(engine: Any) -> None:
    checker = engine.checker
    check = checker.check

    def wrong(token_ids: Any, params: Any, *rest: Any) -> Any:
        if getattr(params, "top_k", 0) > 300:
            raise KeyError(params.top_k)
        return check(token_ids, params, *rest)

    object.__setattr__(checker, "check", wrong)


def _plant_unnamed(engine: Any) -> None:
    from pellucid.errors import InvalidRequestError

    checker = engine.checker
    check = checker.check

    def wrong(token_ids: Any, params: Any, *rest: Any) -> Any:
        if getattr(params, "temperature", 0) == 2.5:
            raise InvalidRequestError(None, "something is wrong")
        return check(token_ids, params, *rest)

    object.__setattr__(checker, "check", wrong)


def _plant_leak(engine: Any) -> None:
    manager, scheduler = engine.block_manager, engine.scheduler
    finish = scheduler.finish

    def wrong(request_id: str, *rest: Any) -> bool:
        request = scheduler.get(request_id)
        if request is not None and request.block_table and manager.num_free_blocks:
            manager._take_free()
        return bool(finish(request_id, *rest))

    scheduler.finish = wrong


_PLANTERS: dict[str, Callable[[Any], None]] = {
    "neighbour": _plant_neighbour,
    "untyped": _plant_untyped,
    "unnamed": _plant_unnamed,
    "leak": _plant_leak,
}


def _add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--calls", type=int, help="of a case (default: 60 to 250, by kind)")
    group.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of engines, by turns (default: all)"
    )


CAMPAIGN = Campaign(
    "fuzz_offline.py",
    "Random requests through Python, valid and hostile, beside well-behaved neighbours.",
    FuzzOffline,
    count=100_000,
    plants=PLANTS,
    case_seconds=300.0,
    reach=(
        "engine/admission.py",
        "api/sampling_params.py",
        "api/request_options.py",
        "api/hidden_states.py",
        "api/structured_outputs.py",
    ),
    add_options=_add_options,
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the campaign; see `kit.campaign` for the exit status."""
    return run(CAMPAIGN, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
