"""The process that compiles grammars first: whoever is interrupted or forked, nobody reads an answer to another's question."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from utils.children import forked
from utils.together import together

from pellucid.api.structured_outputs import StructuredOutputsParams
from pellucid.structure import grammar, grammar_trial
from pellucid.structure.grammar_trial import GrammarTrial

pytestmark = pytest.mark.timeout(120)
GOOD, BAD = StructuredOutputsParams(regex="[ab]{2}"), StructuredOutputsParams(regex="(")


@pytest.fixture
def trial() -> Iterator[GrammarTrial]:
    trial = GrammarTrial()
    yield trial
    trial.close()


def test_trial_when_its_caller_is_interrupted_then_the_next_question_gets_its_own_answer(
    trial: GrammarTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = grammar_trial._ask

    def interrupted(process: Any, line: str) -> str | None:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        raise KeyboardInterrupt

    assert trial.run(GOOD, 300, {}) is None
    monkeypatch.setattr(grammar_trial, "_ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trial.run(BAD, 300, {})
    monkeypatch.setattr(grammar_trial, "_ask", ask)
    for _ in range(2):
        assert trial.run(GOOD, 300, {}) is None
        assert trial.run(BAD, 300, {}) is not None


def test_trial_when_threads_ask_at_once_then_each_gets_its_own_answer(trial: GrammarTrial) -> None:
    def ask(number: int) -> bool:
        return trial.run(BAD if number % 3 == 0 else GOOD, 300, {}) is not None

    assert together([partial(ask, number) for number in range(24)]) == [number % 3 == 0 for number in range(24)]


def test_trial_when_its_process_is_forked_then_the_child_has_its_own(trial: GrammarTrial) -> None:
    def ask() -> None:
        assert trial.run(BAD, 300, {}) is not None
        assert trial.run(GOOD, 300, {}) is None
        trial.close()

    assert trial.run(GOOD, 300, {}) is None
    with trial._lock:  # another thread asks
        assert forked(ask) == 0
    assert trial.run(BAD, 300, {}) is not None
    assert trial.run(GOOD, 300, {}) is None


def test_grammars_when_the_process_is_forked_while_one_is_compiled_then_the_child_compiles_its_own() -> None:
    cache = grammar._Cache(4)

    def compile_own() -> None:
        assert not cache.has("key")
        assert cache.get("key", lambda: 7) == 7
        assert cache.has("key")

    assert cache.get("key", lambda: forked(compile_own)) == 0  # the entry's lock is held
    with cache._lock:
        assert forked(compile_own) == 0
