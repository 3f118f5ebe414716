"""The owner alone: what it does with structures that take long to compile."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Event as Flag
from threading import Thread
from typing import Any

import pytest
from utils.async_engines import ENDLESS, PATIENCE, SETTINGS, build_model

from pellucid.api.sampling_params import SamplingParams
from pellucid.config import EngineConfig
from pellucid.engine.admission import RequestChecker
from pellucid.errors import InvalidRequestError
from pellucid.service.messages import (
    AbortAll,
    Cancel,
    Command,
    Done,
    Event,
    Loaded,
    News,
    Refused,
    Shutdown,
    Start,
    Submit,
)
from pellucid.service.owner import EngineOwner

STRUCTURED = SamplingParams(temperature=0, max_tokens=8, structured_outputs={"regex": "[ab]{3}"})


class World:
    """An owner on a thread, whose structures compile when the test says so."""

    def __init__(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_compile, self.compiling = Flag(), Flag()
        self.problem: Exception | None = None
        self._is_compiled = False
        compiled_by = RequestChecker.grammar

        def grammar(checker: RequestChecker, params: SamplingParams) -> Any:
            if params.structured_outputs is None or self._is_compiled:
                return compiled_by(checker, params)
            self.compiling.set()
            assert self.may_compile.wait(PATIENCE)
            if self.problem is not None:
                raise self.problem
            self._is_compiled = True
            return compiled_by(checker, params)

        def has_grammar(_: RequestChecker, params: SamplingParams) -> bool:
            return params.structured_outputs is None or self._is_compiled

        monkeypatch.setattr(RequestChecker, "grammar", grammar)
        monkeypatch.setattr(RequestChecker, "has_grammar", has_grammar)
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.events: SimpleQueue[Sequence[Event]] = SimpleQueue()
        self.seen: list[Event] = []
        self._unread: deque[Event] = deque()
        owner = EngineOwner(Start(EngineConfig.from_kwargs(model, SETTINGS), 100), self.inbox, self.events.put)
        self.thread = Thread(target=owner.run, daemon=True)
        self.thread.start()
        self.until(lambda event: isinstance(event, Loaded))

    def say(self, command: Command) -> None:
        self.inbox.put(command)

    def until(self, is_it: Callable[[Event], bool]) -> Event:
        """The next event that is the one."""
        deadline = time.monotonic() + PATIENCE
        while True:
            while not self._unread:
                self._unread.extend(self.events.get(timeout=deadline - time.monotonic()))
            self.seen.append(self._unread.popleft())
            if is_it(self.seen[-1]):
                return self.seen[-1]

    def answer(self, call: int) -> Event:
        return self.until(lambda event: getattr(event, "call", None) == call)

    def chunk_of(self, request_id: str) -> Event:
        return self.until(
            lambda event: isinstance(event, News) and any(chunk.request_id == request_id for chunk in event.chunks)
        )

    def end_of(self, request_id: str) -> Event:
        return self.until(
            lambda event: isinstance(event, News) and any(out.request_id == request_id for out in event.finished)
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("owner"))


@pytest.fixture
def world(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(model, monkeypatch)
    yield made
    made.may_compile.set()
    made.say(Shutdown())
    made.thread.join(PATIENCE)
    assert not made.thread.is_alive()


def test_structure_when_it_takes_long_then_the_others_go_on_and_it_is_queued_behind(world: World) -> None:
    world.say(Submit(1, "runs", [5, 6], ENDLESS))
    world.say(Submit(2, "waits", [5, 6], STRUCTURED))
    assert world.compiling.wait(PATIENCE)
    for _ in range(5):
        world.chunk_of("runs")
    assert not any(getattr(event, "call", None) == 2 for event in world.seen)
    world.may_compile.set()
    assert world.answer(2) == Done(2)
    world.end_of("waits")


def test_request_when_cancelled_while_its_structure_is_compiled_then_it_never_runs(world: World) -> None:
    world.say(Submit(1, "waits", [5, 6], STRUCTURED))
    assert world.compiling.wait(PATIENCE)
    world.say(Cancel(2, "waits"))
    refused = world.answer(1)
    assert isinstance(refused, Refused)
    assert "before it was queued" in refused.error.text
    assert world.answer(2) == Done(2, 1)
    world.may_compile.set()
    world.say(Submit(3, "waits", [5, 6], STRUCTURED))  # the name is free at once
    assert world.answer(3) == Done(3)
    world.end_of("waits")
    assert sum(isinstance(event, News) and bool(event.finished) for event in world.seen) == 1


def test_all_when_aborted_then_those_that_are_being_compiled_too(world: World) -> None:
    world.say(Submit(1, "waits", [5, 6], STRUCTURED))
    world.say(Submit(2, "runs", [5, 6], ENDLESS))
    world.chunk_of("runs")
    world.say(AbortAll(3))
    assert isinstance(world.answer(1), Refused)
    assert world.answer(3) == Done(3, 2)


def test_structure_when_it_is_refused_then_the_caller_is_told(world: World) -> None:
    world.problem = InvalidRequestError("structured_outputs.regex", ": no text satisfies it")
    world.may_compile.set()
    world.say(Submit(1, "waits", [5, 6], STRUCTURED))
    refused = world.answer(1)
    assert isinstance(refused, Refused)
    assert "no text satisfies it" in refused.error.text
