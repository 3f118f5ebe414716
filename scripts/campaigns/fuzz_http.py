#!/usr/bin/env python3
"""Random requests over HTTP, valid and hostile, beside neighbours that stream.

    python scripts/campaigns/fuzz_http.py --count 20000 --keep-going

Every path and field of the server's own OpenAPI gets valid and hostile values, broken JSON and broken HTTP, clients that leave. Whatever
comes: no answer is a 5xx but 503; an error is the error object of its API; the neighbours' text, tokens and log-probabilities are those
of their lone runs; /health answers; at the end no block is used, the log has no traceback, and the server ends as it should.

Kinds of servers: `app` is the application in this process, `serve` is `pellucid serve`; with `-process` the engine has a process of its
own. All traffic goes to 127.0.0.1.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kit.campaign import Campaign, Plant, Report, run
from kit.findings import signature_of
from kit.http_client import Answer, NoAnswerError, call, exchange
from kit.http_judge import events_of, judge
from kit.http_requests import Requests, Wanted
from kit.scratch import Scratch
from kit.serving import Application, Process, Served

KINDS = ("serve", "serve-process", "app", "app-process")
SETTINGS: dict[str, Any] = {
    "max_model_len": 1024,
    "num_blocks": 512,
    "num_threads": 1,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "max_body_bytes": 200_000,
    "max_waiting": 256,
    "capture": True,
    "steering": True,
    "drain_timeout": 5.0,
    "body_timeout": 3.0,
    "header_timeout": 3.0,
    "max_stored_responses": 64,
}
_CALLERS, _NEIGHBOURS = 4, 2
# A server without keys takes any.
_KEY = {"authorization": "Bearer the-key"}
_WRONG_KEYS: tuple[dict[str, str], ...] = (
    {},
    {"authorization": "Bearer wrong"},
    {"authorization": "Basic dGhlOmtleQ=="},
    {"x-api-key": "the-key"},
    {"authorization": "Bearer " + "x" * 5000},
)
PLANTS = {
    "bug": Plant("tokenising a text raises what nobody expects", "status 500"),
    "neighbour": Plant("where three are in a step, one gets a wrong token", "a neighbour was hurt"),
    "leak": Plant("one of twenty requests keeps a block", "blocks are used|cannot be asked|503"),
}


class FuzzHttp:
    """Each case is one server."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._seed: int = options.seed
        self._plant: str | None = options.plant
        self._size: int = options.requests
        self._kinds = ["app"] if options.plant in _PLANTERS else options.kinds  # an engine that can be reached into
        self._scratch = Scratch("fuzz-http")
        self._model = self._scratch.tiny_model(has_beyond=True)
        self._alone: dict[int, Any] = {}
        self._figures: Counter[str] = Counter()

    def run(self, case: int, report: Report) -> int:
        """A server, its requests, and its end."""
        kind, draw = self._kinds[case % len(self._kinds)], Random(f"{self._seed}/{case}")
        settings = {**SETTINGS, **_settings(draw)}
        where = f"{kind}, {settings}"
        server = self._start(kind, settings)
        try:
            company = _Company(server.port, draw, self._size, self._alone, self._figures, report, where)
            asyncio.run(company.run())
        finally:
            for wrong in server.stop():
                report(f"log or end of the server: {_told(wrong)}", f"{wrong[-2500:]}\n{where}")
        self._figures[f"through {kind}"] += self._size
        return self._size

    def _start(self, kind: str, settings: dict[str, Any]) -> Served:
        is_apart = kind.endswith("-process")
        if kind.startswith("serve"):
            return Process(self._model, {**settings, "engine_process": is_apart})
        planter = _PLANTERS.get(self._plant or "")
        return Application(self._model, settings, engine_process=is_apart, prepare=planter)

    def figures(self) -> Mapping[str, int]:
        """Of what took part."""
        return self._figures

    def close(self) -> None:
        """Removes the scratch folder."""
        self._scratch.close()


def _settings(draw: Random) -> dict[str, Any]:
    """What differs from case to case."""
    kind = draw.randrange(5)
    if kind == 0:
        return {"async_scheduling": True, "api_key": "the-key", "admin_key": "the-key"}
    if kind == 4:
        return {"api_key": "the-key", "admin_key": "the-key", "allowed_origins": "http://good.example"}
    if kind == 1:
        return {"speculative_method": "ngram", "prompt_lookup_min": 1}
    if kind == 2:
        return {"num_blocks": 96}  # some are preempted
    return {"kv_layout": "slot", "num_blocks": 8192}


def _told(wrong: str) -> str:
    """The kind of a line of the log: the last line of a traceback."""
    lines = [line for line in wrong.strip().splitlines() if line.strip()]
    errors = [line for line in lines if line and not line.startswith(" ") and "Error" in line]
    return signature_of((errors or lines or [""])[-1 if not errors else 0])


# ---- neighbours ---------------------------------------------------------------------------------------------------------


def neighbour(number: int) -> tuple[str, dict[str, Any]]:
    """(path, body) of well-behaved request `number`; all stream."""
    draw = Random(f"http neighbour/{number}")
    shared: dict[str, Any] = {
        "stream": True,
        "ignore_eos": True,
        "max_tokens": draw.randint(5, 60),
        "return_token_ids": True,
    }
    if draw.random() < 0.5:
        shared["temperature"] = 0
    else:
        shared |= {"temperature": 0.9, "seed": draw.randrange(10**9), "top_p": draw.choice((0.7, 1.0))}
    if number % 2:
        content = draw.choice(("hello", "the quick brown fox", "a " * 40, "é😀"))
        asked = {"messages": [{"role": "user", "content": content}], "logprobs": True, "top_logprobs": 2}
        return "/v1/chat/completions", {**shared, **asked}
    return "/v1/completions", {**shared, "prompt": draw.choices(range(5, 300), k=draw.randint(1, 90)), "logprobs": 1}


def heard(answer: Answer) -> Any:
    """What a streamed answer says: text, tokens, log-probabilities as the JSON has them, and its end."""
    text, tokens, rows, ends = "", list[int](), list[Any](), list[str]()
    for event in events_of(answer.body):
        for choice in event.get("choices", ()) if isinstance(event, dict) else ():
            text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            tokens += choice.get("token_ids") or []
            logprobs = choice.get("logprobs") or {}
            rows += logprobs.get("content") or list(
                zip(logprobs.get("token_logprobs") or (), logprobs.get("top_logprobs") or (), strict=False)
            )
            ends += [choice["finish_reason"]] if choice.get("finish_reason") else []
    return {"status": answer.status, "text": text, "tokens": tokens, "logprobs": rows, "ends": ends}


# ---- a case -------------------------------------------------------------------------------------------------------------


class _Company:
    """The clients of one server."""

    def __init__(
        self,
        port: int,
        draw: Random,
        size: int,
        alone: dict[int, Any],
        figures: Counter[str],
        report: Report,
        where: str,
    ) -> None:
        self._port, self._draw, self._size, self._alone = port, draw, size, alone
        self._figures, self._report, self._where = figures, report, where

    async def _call(self, method: str, path: str, body: Any = None) -> Answer:
        return await call(self._port, method, path, body, _KEY)

    async def run(self) -> None:
        """Lone runs, then everybody at once, then the end."""
        numbers = [self._draw.randrange(40) for _ in range(6)]
        for number in numbers:
            await self._run_alone(number)
        document = (await self._call("GET", "/openapi.json")).json()
        requests = Requests(document)
        is_over = asyncio.Event()
        beside = [
            asyncio.create_task(self._neighbour(Random(self._draw.random()), numbers, is_over))
            for _ in range(_NEIGHBOURS)
        ]
        watch = asyncio.create_task(self._watch_health(is_over))
        shares = [self._size // _CALLERS + (i < self._size % _CALLERS) for i in range(_CALLERS)]
        await asyncio.gather(*[self._caller(requests, Random(self._draw.random()), share) for share in shares])
        is_over.set()
        await asyncio.gather(*beside, watch)
        await self._check_empty()

    async def _run_alone(self, number: int) -> None:
        path, body = neighbour(number)
        found = heard(await self._call("POST", path, body))
        if found["status"] != 200 or found["ends"] != ["length"]:
            self._report("a lone neighbour is refused", f"{found}\n{path} {body}\n{self._where}")
        if number in self._alone and self._alone[number] != found:
            self._report(
                "two lone runs differ", f"{_difference(found, self._alone[number])}\n{path} {body}\n{self._where}"
            )
        self._alone.setdefault(number, found)

    async def _neighbour(self, draw: Random, numbers: list[int], is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            number = draw.choice(numbers)
            path, body = neighbour(number)
            try:
                found = heard(await self._call("POST", path, body))
            except Exception as error:
                self._report(f"a neighbour was hurt: {type(error).__name__}", f"{error}\n{path} {body}\n{self._where}")
                await asyncio.sleep(0.2)
                continue
            self._figures["neighbours"] += 1
            if found != self._alone[number]:
                what, how = _difference(found, self._alone[number])
                self._report(f"a neighbour was hurt: {what} differs", f"{how}\n{path} {body}\n{self._where}")

    async def _watch_health(self, is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            try:
                answer = await self._call("GET", "/health")
                if answer.status != 200:
                    self._report(f"/health: status {answer.status}", f"{answer.body!r}\n{self._where}")
                    return
            except (OSError, NoAnswerError) as error:
                self._report(f"/health: {type(error).__name__}", f"{error}\n{self._where}")
                return
            await asyncio.sleep(0.25)

    async def _caller(self, requests: Requests, draw: Random, count: int) -> None:
        for _ in range(count):
            key = _KEY if draw.random() < 0.97 else draw.choice(_WRONG_KEYS)
            wanted = requests.draw(draw, key)
            try:
                answer = await exchange(
                    self._port, wanted.raw, leave_after=wanted.leave_after, half_close=wanted.half_close
                )
            except NoAnswerError as error:
                self._report(f"{wanted.path}: no end", f"{error}\n{wanted}\n{self._where}")
                continue
            except Exception as error:
                self._report(f"{wanted.path}: {type(error).__name__}", f"{error}\n{wanted}\n{self._where}")
                continue
            self._book(wanted, answer)
            requests.learn(answer.body)

    def _book(self, wanted: Wanted, answer: Answer) -> None:
        kind = "left" if wanted.leave_after is not None else f"{answer.status // 100}xx"
        self._figures[kind] += 1
        told = judge(wanted, answer)
        if told is not None:
            self._report(told[0], f"{told[1]}\n{wanted}\n{self._where}")

    async def _check_empty(self) -> None:
        """Requests of clients that left end by themselves, soon."""
        for _ in range(300):
            answers = [await self._call("GET", path) for path in ("/debug/live", "/debug/kv_cache_stats")]
            if any(answer.status != 200 for answer in answers):
                self._report("the engine cannot be asked behind a case", f"{answers}\n{self._where}")
                return
            view, stats = (answer.json() for answer in answers)
            if not (view["stats"]["running"] or view["stats"]["waiting"] or stats["used_blocks"]):
                return
            await asyncio.sleep(0.05)
        self._report("blocks are used behind a case", f"{view['stats']}\n{stats}\n{self._where}")


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> tuple[str, str]:
    name = next((name for name in found if found[name] != expected[name]), "nothing")
    one, other = found.get(name), expected.get(name)
    if isinstance(one, list) and isinstance(other, list):
        place = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
        if place is not None:
            return name, f"{name}[{place}] is {one[place]!r}, alone {other[place]!r}"
    return name, f"{name} is {one!r:.600}, alone {other!r:.600}"


# ---- planted faults -----------------------------------------------------------------------------------------------------


def _plant_bug(engine: Any) -> None:
    encode = engine.tokenizer.encode

    def wrong(text: str, *rest: Any, **options: Any) -> Any:
        if text == "a":
            raise ZeroDivisionError(text)
        return encode(text, *rest, **options)

    engine.tokenizer.encode = wrong


def _plant_neighbour(engine: Any) -> None:
    owner = engine._transport.owner.engine
    execute = owner.executor.execute

    def wrong(plan: Any) -> Any:
        output = execute(plan)
        if len(plan.entries) > 2:
            for name in list(output.sampled_token_ids)[:1]:
                output.sampled_token_ids[name] = 100
        return output

    owner.executor.execute = wrong


def _plant_leak(engine: Any) -> None:
    manager = engine._transport.owner.engine.block_manager
    free, ended = manager.free, itertools.count(1)

    def wrong(request: Any, *rest: Any) -> None:
        free(request, *rest)
        if next(ended) % 20 == 0:
            manager._take_free()

    manager.free = wrong


_PLANTERS = {"bug": _plant_bug, "neighbour": _plant_neighbour, "leak": _plant_leak}


def _add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of servers, by turns (default: all)"
    )
    group.add_argument("--requests", type=int, default=300, help="of a case (default: %(default)s)")


CAMPAIGN = Campaign(
    "fuzz_http.py",
    "Random requests over HTTP, valid and hostile, beside neighbours that stream.",
    FuzzHttp,
    count=20_000,
    plants=PLANTS,
    case_seconds=400.0,
    reach=(
        "engine/admission.py",
        "api/sampling_params.py",
        "api/request_options.py",
        "api/hidden_states.py",
        "api/structured_outputs.py",
        "server/*.py",
    ),
    add_options=_add_options,
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the campaign; see `kit.campaign` for the exit status."""
    return run(CAMPAIGN, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
