"""`pellucid check-server` against a server that keeps the protocol, and against one for each way to break it."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from utils.children import finished
from utils.scripted_server import Script, ScriptedServer

from pellucid.bench.serve_checks import CHECKS, CheckOptions, CheckResult, run_checks
from pellucid.commands.check_server import api_url

OPTIONS = CheckOptions(
    api_key=None,
    model=None,
    timeout=30.0,
    deadline=300.0,
    max_tokens=8,
    long_tokens=10,
    rapid_requests=4,
    concurrency=3,
    judges_answers=False,
)


def check(script: Script, only: tuple[str, ...] = tuple(CHECKS), **options: Any) -> dict[str, CheckResult]:
    with ScriptedServer(script) as server:
        _, results = asyncio.run(run_checks(server.url, replace(OPTIONS, **options), only))
    return {result.name: result for result in results}


def failed(results: dict[str, CheckResult]) -> set[str]:
    return {name for name, result in results.items() if not result.passed}


def is_stream(request: dict[str, Any]) -> bool:
    return bool(request.get("stream"))


def is_whole(request: dict[str, Any]) -> bool:
    return not is_stream(request)


def says(text: str) -> Callable[[dict[str, Any]], bool]:
    return lambda request: text in json.dumps(request["messages"])


def again(text: str) -> Callable[[dict[str, Any]], bool]:
    """Requests that say `text` and came before: those of a check that asks alone and then together."""
    seen: set[str] = set()

    def concerns(request: dict[str, Any]) -> bool:
        messages = json.dumps(request["messages"])
        is_known = messages in seen
        seen.add(messages)
        return is_known and text in messages

    return concerns


def test_checks_when_the_server_keeps_the_protocol_then_all_pass_with_their_figures() -> None:
    results = check(Script(first_delay=0.02, gap=0.005, tokens=9))
    assert failed(results) == set()
    assert list(results) == ["models", *CHECKS]
    (answer,) = results["streaming"].answers
    assert answer.finish_reason == "length"  # 8 of 9 tokens
    assert (answer.tokens("prompt_tokens"), answer.tokens("completion_tokens")) == (15, 8)
    assert len(answer.chunk_times) == 8
    assert answer.ttft is not None
    assert answer.ttft >= 0.02
    assert answer.seconds >= 0.02 + 7 * 0.005
    assert results["long-answer"].answers[0].finish_reason == "stop"
    assert len(results["rapid-fire"].answers) == 4


def test_checks_when_tcp_cuts_characters_apart_then_texts_are_whole() -> None:
    results = check(Script(fault="split-utf8"), only=("streaming", "streaming-equals-non-streaming"))
    assert failed(results) == set()
    assert any(ord(letter) > 127 for letter in results["streaming"].answers[0].text)


def test_concurrent_isolation_when_run_then_streams_are_open_at_once() -> None:
    with ScriptedServer(Script(first_delay=0.3)) as server:
        _, results = asyncio.run(run_checks(server.url, OPTIONS, ["concurrent-isolation"]))
    assert all(result.passed for result in results)
    assert server.most_open == 3


@pytest.mark.parametrize("url", ["http://host:1", "http://host:1/", "http://host:1/v1", "http://host:1/v1/"])
def test_api_url_when_given_with_or_without_version_then_is_the_same(url: str) -> None:
    assert api_url(url) == "http://host:1"


# fault: what the check "streaming" says of it
STREAM_FAULTS = {
    "no-role": "the first event does not have the role",
    "missing-done": "the stream ends without [DONE]",
    "after-done": "something follows [DONE]",
    "duplicate-finish": "there is not one finish reason but ['length', 'length']",
    "no-finish": "there is not one finish reason but []",
    "two-ids": "the stream has not one id but",
    "text-after-finish": "text follows the finish reason",
    "no-usage": "no event has the usage that was asked for",
    "error-event": "the stream tells an error: the engine died",
    "not-json": "an event is not JSON: '{nonsense'",
    "one-chunk": "8 tokens came in 1 chunk",
    "not-utf8": "the stream is not UTF-8",
    "huge-line": "a line of the stream is longer than 1,048,576 bytes",
    "wrong-content-type": "content-type of the stream is 'application/json'",
    "disconnect": "the connection broke off",
    "not-http": "the connection broke off or is no HTTP",
    "status-429": "status 429 (Retry-After: 7): queue full",
    "status-500": "status 500: broken",
}


@pytest.mark.parametrize(("fault", "problem"), STREAM_FAULTS.items(), ids=list(STREAM_FAULTS))
def test_streaming_when_the_stream_is_broken_then_that_check_fails_and_says_how(fault: str, problem: str) -> None:
    script = Script(fault=fault, tokens=9, concerns=is_stream)
    results = check(script, only=("non-streaming", "streaming"))
    assert failed(results) == {"streaming"}
    assert any(problem in said for said in results["streaming"].problems), results["streaming"].problems


# fault, which requests it concerns, the one check that fails
NAMED_FAULTS = [
    ("status-500", is_whole, {"non-streaming", "streaming-equals-non-streaming", "rapid-fire"}),
    ("other-text", says("lighthouse"), {"streaming-equals-non-streaming"}),
    ("status-500", says("called?"), {"multi-turn"}),
    ("status-500", lambda request: request["temperature"] == 0.5, {"temperature-0.5"}),
    ("status-500", lambda request: request["temperature"] == 1.0, {"temperature-1.0"}),
    ("status-500", lambda request: request["max_tokens"] == 10, {"long-answer"}),
    ("status-429", says("Say the number 3"), {"rapid-fire"}),
    ("status-500", lambda request: request["messages"][0]["role"] == "system", {"system-message"}),
    ("any-model", is_stream, {"error-handling"}),
    ("plain-errors", is_stream, {"error-handling"}),
    ("dies-of-malformed", is_stream, {"error-handling"}),
    ("other-text", again("Write about"), {"concurrent-isolation"}),
    ("same-id", says("number"), {"concurrent-isolation"}),
]


@pytest.mark.parametrize(("fault", "concerns", "names"), NAMED_FAULTS)
def test_checks_when_one_thing_is_broken_then_the_check_for_it_fails_and_no_other(
    fault: str, concerns: Callable[[dict[str, Any]], bool], names: set[str]
) -> None:
    assert failed(check(Script(fault=fault, concerns=concerns))) == names


def test_checks_when_a_key_is_needed_then_it_is_sent_and_a_wrong_one_is_tried() -> None:
    keyed = Script(api_key="secret")
    assert failed(check(keyed, api_key="secret")) == set()
    without = check(keyed)
    assert not any(result.passed for result in without.values())
    assert "status 401: no such key" in without["models"].problems[0]
    open_to_all = check(Script(), api_key="secret", only=("error-handling",))
    assert "a wrong key: status 200, not 401" in open_to_all["error-handling"].problems[0]


@pytest.mark.parametrize("fault", ["never-answers", "endless"])
def test_checks_when_the_server_does_not_end_then_the_timeout_ends_each_request(fault: str) -> None:
    began = time.monotonic()
    results = check(Script(fault=fault), only=("non-streaming", "streaming"), timeout=0.5)
    assert time.monotonic() - began >= 0.5
    assert any(
        problem.startswith("no ") and problem.endswith("within 0.5 s") for problem in results["streaming"].problems
    )


def test_checks_when_the_deadline_passes_then_the_rest_fails_at_once() -> None:
    results = check(Script(fault="never-answers"), deadline=1.0)
    assert failed(results) >= set(CHECKS)
    assert results["concurrent-isolation"].problems == ["the deadline of 1 s for all checks has passed"]
    assert results["concurrent-isolation"].answers == []


def test_checks_when_nothing_listens_then_all_fail_and_say_so() -> None:
    _, results = asyncio.run(run_checks("http://127.0.0.1:9", OPTIONS, ["streaming"]))
    assert all("no connection to 127.0.0.1:9" in result.problems[0] for result in results)


def test_multi_turn_when_the_model_is_judged_then_a_forgotten_fact_fails() -> None:
    assert failed(check(Script(), only=("multi-turn",))) == set()
    assert failed(check(Script(), only=("multi-turn",), judges_answers=True)) == {"multi-turn"}


def command(*arguments: str) -> CompletedProcess[str]:
    line = [sys.executable, "-m", "pellucid.cli", "check-server", *arguments]
    return finished(line)


def test_command_when_a_check_fails_then_status_one_and_table_problems_and_json_tell_it(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    with ScriptedServer(Script(fault="missing-done")) as server:
        done = command(f"{server.url}/v1", "--only", "streaming", "--only", "non-streaming", "--json", str(target))
    assert done.returncode == 1, done.stderr
    assert "streaming failed:\n  the stream ends without [DONE]" in done.stdout
    assert "2 passed, 1 failed" in done.stdout
    assert "[3/3] streaming: FAILED" in done.stderr
    report = json.loads(target.read_text())
    assert [one["passed"] for one in report["checks"]] == [True, True, False]
    assert report["checks"][2]["requests"][0]["completion_tokens"] == 12


def test_command_when_all_pass_then_status_zero_and_every_figure_is_in_the_table() -> None:
    with ScriptedServer() as server:
        done = command(server.url, "--only", "streaming")
    assert done.returncode == 0, done.stderr
    head = done.stdout.splitlines()[2].split("  ")
    assert [word.strip() for word in head if word] == [
        *("check", "result", "finish", "prompt", "output", "s", "TTFT ms", "chunks", "ms/chunk", "tokens/s")
    ]


def test_command_when_a_check_is_unknown_then_one_line_and_status_two() -> None:
    done = command("http://127.0.0.1:9", "--only", "telepathy")
    assert done.returncode == 2
    assert "there is no check 'telepathy'" in done.stderr
