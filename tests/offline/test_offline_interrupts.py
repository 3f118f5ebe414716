"""Ctrl-C while threads share an `LLM`: it never falls into the middle of a step, and nobody else notices."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType

import pytest
from utils.lone_runs import JOBS, check_same, lone_runs
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams
from pellucid.api.outputs import RequestOutput
from pellucid.owners import uninterrupted

# Not by a signal: its handler would be run in the place of the one that is tested.
pytestmark = pytest.mark.timeout(180, method="thread")

LONG = SamplingParams(temperature=0, max_tokens=240, ignore_eos=True)
PATIENCE = 60.0


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module", params=[False, True], ids=["in turn", "planned ahead"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    model = build_tiny_checkpoint(tmp_path_factory.mktemp("interrupts"), "llama")
    settings = {"max_model_len": 256, "num_blocks": 400, "block_size": 4, "num_threads": 1, "max_num_seqs": 8}
    with LLM(model, async_scheduling=request.param, **settings) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[RequestOutput]:
    return lone_runs(llm)


def interrupt_after(seconds: float) -> threading.Thread:
    """Sends SIGINT to the main thread, as a terminal does, so long after this has returned: Python's own waiting for the start of
    a thread must not be interrupted."""
    has_returned: list[bool] = []

    def send() -> None:
        while not has_returned:
            time.sleep(0.0005)
        time.sleep(seconds)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(daemon=True, target=send)
    thread.start()
    has_returned.append(True)
    return thread


def check_interrupted(seconds: float, call: Callable[[], object]) -> None:
    """A call that only the interrupt ends is ended by it."""
    senders: list[threading.Thread] = []

    def start_and_call() -> None:
        senders.append(interrupt_after(seconds))  # where the machine is busy, it comes here already
        call()

    with pytest.raises(KeyboardInterrupt):
        start_and_call()
    for sender in senders:
        sender.join(PATIENCE)


def check_rest(llm: LLM) -> None:
    while llm.client.has_unfinished:
        llm.client.step()
    assert llm.kv_cache_stats()["used_blocks"] == 0
    llm.engine.scheduler.check_invariants()


@pytest.mark.parametrize("how", ["generate", "many", "stream", "client"])
def test_main_thread_when_interrupted_at_any_moment_then_the_others_get_what_they_get_alone(
    llm: LLM, alone: list[RequestOutput], how: str
) -> None:
    def generates() -> None:
        while not is_over.is_set():
            index = random.randrange(len(JOBS))
            check_same(JOBS[index].run(llm), alone[index])
            num_done.append(1)

    def run_for_ever() -> None:
        while True:
            calls[how]()

    def steps() -> None:
        request_id = llm.client.submit([5, 6], LONG)
        while not llm.client.is_finished(request_id):
            llm.client.step()
        llm.client.release(request_id)

    def guarded() -> None:
        try:
            generates()
        except BaseException as error:
            errors.append(error)

    calls: dict[str, Callable[[], object]] = {
        "generate": partial(llm.generate, [[5, 6], [7]], LONG, use_tqdm=False),
        "many": partial(llm.generate, [[5, 6]] * 60, LONG, use_tqdm=True),
        "stream": lambda: list(llm.stream([5, 6], LONG)),
        "client": steps,
    }
    is_over, num_done, errors = threading.Event(), list[int](), list[BaseException]()
    threads = [threading.Thread(daemon=True, target=guarded) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for index in range(12):
            check_interrupted(0.003 + 0.007 * index, run_for_ever)
    finally:
        is_over.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert not errors
    assert num_done
    assert not any(thread.is_alive() for thread in threads)
    check_same(JOBS[0].run(llm), alone[0])
    check_rest(llm)


def test_main_thread_when_it_sleeps_while_another_steps_then_an_interrupt_wakes_it(
    llm: LLM, alone: list[RequestOutput]
) -> None:
    stepping = threading.Thread(
        daemon=True, target=lambda: outputs.extend(llm.generate([[5 + i] for i in range(40)], LONG))
    )
    outputs: list[RequestOutput] = []
    turn = llm.engine.turn
    stepping.start()
    while llm.engine.turn < turn + 3:
        time.sleep(0.001)
    began = time.monotonic()
    check_interrupted(0.05, partial(llm.generate, [[9]] * 40, LONG))  # behind the forty
    assert time.monotonic() - began < 20
    stepping.join(PATIENCE)
    assert [len(output["token_ids"]) for output in outputs] == [240] * 40
    check_same(JOBS[0].run(llm), alone[0])
    check_rest(llm)


def test_handler_that_raises_nothing_when_called_behind_a_step_then_the_outputs_come_all_the_same(llm: LLM) -> None:
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(llm.engine.scheduler.num_running))
    sender = interrupt_after(0.03)
    outputs = llm.generate([[5, 6]] * 20, LONG, use_tqdm=False)
    sender.join(PATIENCE)
    assert [len(output["token_ids"]) for output in outputs] == [240] * 20
    assert len(seen) == 1
    check_rest(llm)


# ---- the block that is not interrupted --------------------------------------------------------------------------------


def test_block_when_interrupted_once_then_the_handler_is_called_behind_it_and_wakes_what_sleeps() -> None:
    done, woken = list[str](), list[int]()

    def interrupted() -> None:
        with uninterrupted(lambda: woken.append(1)) as shield:
            assert not shield.is_interrupted
            os.kill(os.getpid(), signal.SIGINT)
            done.append("the rest of the block")
            assert shield.is_interrupted

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (done, woken) == (["the rest of the block"], [1])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_block_when_interrupted_twice_then_it_does_not_wait() -> None:
    done: list[str] = []

    def interrupted() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            done.append("the rest of the block")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_block_when_the_handler_is_that_of_a_terminal_chat_then_it_is_called_and_may_set_another() -> None:
    called: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        called.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    with uninterrupted(), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        assert called == []
    assert called == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_block_when_it_raises_and_is_interrupted_then_both_errors_are_told() -> None:
    def interrupted() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            raise ValueError("its own")

    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted()
    assert isinstance(caught.value.__context__, ValueError)


def test_block_when_signals_are_ignored_or_the_thread_is_another_then_nothing_is_changed() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seen: list[object] = []

    def elsewhere() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(daemon=True, target=elsewhere)
    thread.start()
    thread.join(PATIENCE)
    assert seen == [signal.default_int_handler]
