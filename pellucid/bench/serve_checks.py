"""The checks of `pellucid check-server`: what people try by hand on an OpenAI-compatible server, each with its own verdict.

They judge the protocol and the arithmetic, not the model's wit (except where `judges_answers`). All ask `/v1/chat/completions`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pellucid.bench.serve_client import CHAT, Answer, OpenAIClient, ServerError, error_text
from pellucid.json_text import encode

_FACT, _QUESTION = "My cat is called Ottilie. Remember that.", "What is my cat called?"
_STORY = "Write a long story about a lighthouse keeper who finds a letter in a bottle."
_TOPICS = ("rivers", "bicycles", "bread", "the moon", "glass", "winter", "maps", "violins")
_HELLO = "Say hello in one short sentence."
_SHOWN_TEXT = 40
_STREAM_TOKENS = 8  # fewer may well come at once

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class CheckOptions:
    """How much is asked. Tokens and numbers of requests; `timeout` and `deadline` in seconds."""

    api_key: str | None
    model: str | None
    timeout: float  # of one request
    deadline: float  # of all checks together
    max_tokens: int
    long_tokens: int
    rapid_requests: int
    concurrency: int
    judges_answers: bool


@dataclass
class CheckResult:
    """What a check found. It has passed when there is no problem."""

    name: str
    answers: list[Answer] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For JSON; times in seconds."""
        return {
            "name": self.name,
            "passed": self.passed,
            "problems": self.problems,
            "seconds": self.seconds,
            "requests": [figures_of(answer) for answer in self.answers],
        }


def figures_of(answer: Answer) -> dict[str, Any]:
    """One request's figures; what the server did not tell is None."""
    made, gaps = answer.tokens("completion_tokens"), answer.itls
    return {
        "status": answer.status,
        "error": answer.error or None,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.tokens("prompt_tokens"),
        "completion_tokens": made,
        "seconds": answer.seconds,
        "ttft": answer.ttft,
        "chunks": len(answer.chunk_times) or None,
        "seconds_per_chunk": sum(gaps) / len(gaps) if gaps else None,
        "tokens_per_second": made / answer.seconds if made and answer.seconds else None,
        "text": answer.text,
    }


class _GaveUpError(Exception):
    """A request failed, and the rest of its check makes no sense."""


class _Check:
    """The requests of one check, collected into its result."""

    def __init__(self, client: OpenAIClient, model: str, options: CheckOptions, result: CheckResult) -> None:
        self.client, self.model, self.options, self.result = client, model, options, result

    def complain(self, problem: str) -> None:
        if problem not in self.result.problems:
            self.result.problems.append(problem)

    def payload(self, messages: Messages, **params: Any) -> dict[str, Any]:
        """A request at temperature 0 unless told otherwise."""
        return {
            "model": self.model,
            "messages": messages,
            "temperature": 0.0,
            "max_tokens": self.options.max_tokens,
            **params,
        }

    async def ask(self, messages: Messages, *, streams: bool = True, **params: Any) -> Answer:
        """One request, its breaches noted. Ends the check when it fails."""
        payload = self.payload(messages, **params)
        answer = await (self.client.stream(CHAT, payload) if streams else self.client.whole(CHAT, payload))
        self.result.answers.append(answer)
        for fault in answer.faults:
            self.complain(fault)
        most, made = payload["max_tokens"], answer.tokens("completion_tokens")
        if made is not None and made > most:
            self.complain(f"{made} tokens were made; max_tokens is {most}")
        if answer.error:
            raise _GaveUpError
        return answer


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _difference(one: str, other: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"from character {at}: {one[at : at + _SHOWN_TEXT]!r} and {other[at : at + _SHOWN_TEXT]!r}"


async def _non_streaming(check: _Check) -> None:
    await check.ask([_user(_HELLO)], streams=False)


async def _streaming(check: _Check) -> None:
    answer = await check.ask([_user(_STORY)])
    made = answer.tokens("completion_tokens") or 0
    if len(answer.chunk_times) < 2 and made >= _STREAM_TOKENS:
        check.complain(f"{made} tokens came in {len(answer.chunk_times)} chunk: that is no stream")


async def _streaming_equals_non_streaming(check: _Check) -> None:
    streamed = await check.ask([_user(_STORY)])
    whole = await check.ask([_user(_STORY)], streams=False)
    if streamed.text != whole.text:
        check.complain(f"the stream's text is not the other's, {_difference(streamed.text, whole.text)}")
    for name in ("prompt_tokens", "completion_tokens"):
        if streamed.tokens(name) != whole.tokens(name):
            check.complain(f"{name} is {streamed.tokens(name)} streamed and {whole.tokens(name)} else")
    if streamed.finish_reason != whole.finish_reason:
        check.complain(f"the finish reason is {streamed.finish_reason} streamed and {whole.finish_reason} else")


async def _multi_turn(check: _Check) -> None:
    messages = [_user(_FACT)]
    first = await check.ask(messages)
    messages += [{"role": "assistant", "content": first.text or "Yes."}, _user(_QUESTION)]
    second = await check.ask(messages)
    _must_grow(check, "the second turn", first, second)
    if check.options.judges_answers and "ottilie" not in second.text.lower():
        check.complain(f"the answer does not have the fact of the first turn: {second.text[:80]!r}")


def _must_grow(check: _Check, what: str, less: Answer, more: Answer) -> None:
    counts = [answer.tokens("prompt_tokens") for answer in (less, more)]
    if None not in counts and counts[1] <= counts[0]:  # type: ignore[operator]
        check.complain(f"{what} did not reach the prompt: prompt_tokens went from {counts[0]} to {counts[1]}")


def _at_temperature(temperature: float) -> Callable[[_Check], Awaitable[None]]:
    async def check_it(check: _Check) -> None:
        first = await check.ask([_user(_STORY)], temperature=temperature)
        if temperature:
            return
        second = await check.ask([_user(_STORY)], temperature=temperature)
        if first.text != second.text:
            check.complain(f"two greedy answers differ {_difference(first.text, second.text)}")

    return check_it


async def _long_answer(check: _Check) -> None:
    answer = await check.ask([_user(_STORY)], max_tokens=check.options.long_tokens)
    made = answer.tokens("completion_tokens")
    if answer.finish_reason == "length" and made is not None and made < check.options.long_tokens:
        check.complain(f"the finish reason is length after {made} of {check.options.long_tokens} tokens")


async def _rapid_fire(check: _Check) -> None:
    for number in range(check.options.rapid_requests):
        await check.ask([_user(f"Say the number {number}.")], streams=number % 2 == 0, max_tokens=4)


async def _system_message(check: _Check) -> None:
    short, long = "Answer in English.", "Answer in English, in one short sentence, politely, and without any numbers."
    less = await check.ask([{"role": "system", "content": short}, _user(_HELLO)])
    more = await check.ask([{"role": "system", "content": long}, _user(_HELLO)])
    _must_grow(check, "the system message", less, more)


async def _error_handling(check: _Check) -> None:
    good = check.payload([_user(_HELLO)])
    rows: list[tuple[str, bytes, Sequence[int]]] = [
        ("a temperature that is a word", _json(good | {"temperature": "hot"}), range(400, 500)),
        ("no messages", _json({name: value for name, value in good.items() if name != "messages"}), range(400, 500)),
        ("messages that are a number", _json(good | {"messages": 7}), range(400, 500)),
        ("malformed JSON", b'{"model": ', range(400, 500)),
        ("an unknown model", _json(good | {"model": "no-such-model-here"}), (404,)),
    ]
    for what, body, wanted in rows:
        _judge_refusal(check, what, await check.client.raw("POST", CHAT.path, body), wanted)
    if check.options.api_key:
        wrong = {"authorization": "Bearer wrong-key"}
        answer = await check.client.raw("POST", CHAT.path, _json(good), wrong)
        _judge_refusal(check, "a wrong key", answer, (401,))
    await check.ask([_user(_HELLO)])


def _json(body: dict[str, Any]) -> bytes:
    return encode(body)


def _judge_refusal(check: _Check, what: str, answer: Answer, wanted: Sequence[int]) -> None:
    if answer.error:
        check.complain(f"{what}: {answer.error}")
        return
    if answer.status not in wanted:
        limits = f"{wanted[0]}" if len(wanted) == 1 else "4xx"
        check.complain(f"{what}: status {answer.status}, not {limits}: {error_text(answer.body)}")
        return
    error = answer.body.get("error") if isinstance(answer.body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        check.complain(f"{what}: the body is no error object of OpenAI's: {str(answer.body)[:80]}")


async def _concurrent_isolation(check: _Check) -> None:
    prompts = [
        [_user(f"Write about {_TOPICS[i % len(_TOPICS)]}, number {i + 1}.")] for i in range(check.options.concurrency)
    ]
    alone = [await check.ask(prompt) for prompt in prompts]
    together = await asyncio.gather(*(check.ask(prompt) for prompt in prompts), return_exceptions=True)
    ids: list[str] = []
    for number, (before, now) in enumerate(zip(alone, together, strict=True), 1):
        if isinstance(now, BaseException):
            if not isinstance(now, _GaveUpError):
                raise now
            continue
        ids += now.ids
        if now.text != before.text:
            check.complain(f"stream {number} has another text than alone, {_difference(before.text, now.text)}")
    if len(set(ids)) != len(ids):
        check.complain("two streams have the same id")


CHECKS: dict[str, Callable[[_Check], Awaitable[None]]] = {
    "non-streaming": _non_streaming,
    "streaming": _streaming,
    "streaming-equals-non-streaming": _streaming_equals_non_streaming,
    "multi-turn": _multi_turn,
    "temperature-0.0": _at_temperature(0.0),
    "temperature-0.5": _at_temperature(0.5),
    "temperature-1.0": _at_temperature(1.0),
    "long-answer": _long_answer,
    "rapid-fire": _rapid_fire,
    "system-message": _system_message,
    "error-handling": _error_handling,
    "concurrent-isolation": _concurrent_isolation,
}
MODELS = "models"  # goes before all of them


async def run_checks(
    url: str,
    options: CheckOptions,
    names: Sequence[str] = tuple(CHECKS),
    on_result: Callable[[CheckResult], None] = lambda result: None,
) -> tuple[str, list[CheckResult]]:
    """The model that was asked, and a result for the list of models and for each check. Ends within `options.deadline` seconds."""
    ends = time.monotonic() + options.deadline
    client = OpenAIClient(url, options.api_key, options.timeout)
    results = []
    try:
        listed = CheckResult(MODELS)
        await _run(_list_models, _Check(client, options.model or "", options, listed), ends)
        model = options.model or next(iter(listed.answers[0].ids), "") if listed.answers else ""
        results.append(listed)
        on_result(listed)
        for name in names:
            result = CheckResult(name)
            await _run(CHECKS[name], _Check(client, options.model or model, options, result), ends)
            results.append(result)
            on_result(result)
    finally:
        await client.close()
    return options.model or model, results


async def _list_models(check: _Check) -> None:
    answer = Answer(started=time.perf_counter())
    check.result.answers.append(answer)
    try:
        answer.ids = [entry["id"] for entry in await check.client.models()]
        answer.status = 200
    except ServerError as error:
        check.complain(str(error))
    finally:
        answer.seconds = time.perf_counter() - answer.started
    if check.model and answer.ids and check.model not in answer.ids:
        check.complain(f"model {check.model!r} is not in the list: {', '.join(answer.ids[:8])}")


async def _run(body: Callable[[_Check], Awaitable[None]], check: _Check, ends: float) -> None:
    began = time.monotonic()
    try:
        await asyncio.wait_for(_whole(body, check), max(0.0, ends - began))
    except asyncio.TimeoutError:
        check.complain(f"the deadline of {check.options.deadline:g} s for all checks has passed")
    check.result.seconds = time.monotonic() - began


async def _whole(body: Callable[[_Check], Awaitable[None]], check: _Check) -> None:
    try:
        await body(check)
    except _GaveUpError:
        return
