"""`Turns` on an engine that only counts: one thread at a time, everything once, nobody forgotten."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from utils.together import PATIENCE, together

from pellucid.engine.turns import Turns, Waiter
from pellucid.errors import EngineDeadError, WrongThreadError

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def many_switches() -> Iterator[None]:
    """Threads take turns on the interpreter as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Job(Waiter):
    """Ready after some steps."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.num_left = num_steps

    def is_ready(self) -> bool:
        return self.num_left <= 0


class Counter:
    """An engine whose step brings every job one nearer to its end; it notices two threads in it at once."""

    def __init__(self) -> None:
        self.turns = Turns("the counter", self.step)
        self.jobs: list[Job] = []
        self.num_steps = self.num_added = 0
        self.is_inside = False
        self.within: Callable[[], None] | None = None

    def _alone(self, change: Callable[[], None]) -> None:
        assert not self.is_inside
        self.is_inside = True
        if self.within is not None:
            self.within()
        change()
        self.is_inside = False

    def step(self) -> bool:
        self._alone(self._step)
        return True

    def _step(self) -> None:
        self.num_steps += 1
        for job in list(self.jobs):
            job.num_left -= 1
            if job.is_ready():
                self.jobs.remove(job)
                self.turns.ring(job)

    def add(self, job: Job) -> int:
        def change() -> None:
            self.num_added += 1
            self.jobs.append(job)

        self.turns.do(partial(self._alone, change))
        return job.num_left

    def remove(self, job: Job) -> None:
        def change() -> None:
            if job in self.jobs:
                self.jobs.remove(job)

        self.turns.post(partial(self._alone, change))


@pytest.mark.parametrize("seed", range(4))
def test_threads_when_they_add_wait_ask_and_leave_at_random_then_everything_happens_once_and_nobody_is_forgotten(
    seed: int,
) -> None:
    counter, asked = Counter(), list[int]()

    def works(seed: int) -> None:
        random_ = random.Random(seed)
        for _ in range(300):
            job = Job(random_.randrange(1, 12))
            counter.add(job)
            if random_.random() < 0.2:
                counter.remove(job)
            else:
                counter.turns.wait(job)
                assert job.is_ready()
            counter.turns.do(lambda: asked.append(1))

    together([partial(works, 10 * seed + i) for i in range(8)])
    assert counter.num_added == len(asked) == 8 * 300
    assert not counter.jobs
    assert not counter.turns._sleepers
    assert not counter.turns._asked
    assert not counter.turns._lock.locked()


def test_command_when_another_thread_steps_then_it_waits_for_one_step_at_most() -> None:
    counter = Counter()
    counter.within = lambda: time.sleep(0.01)
    job = Job(10_000)
    counter.add(job)

    def waits() -> None:
        with pytest.raises(EngineDeadError, match="enough"):
            counter.turns.wait(job)

    stepping = threading.Thread(daemon=True, target=waits)
    stepping.start()
    while counter.num_steps < 3:
        time.sleep(0.001)
    for _ in range(20):
        before = counter.num_steps
        counter.turns.do(lambda: None)
        assert counter.num_steps - before <= 2
    counter.turns.end(EngineDeadError("enough"))
    stepping.join(PATIENCE)
    assert not stepping.is_alive()


def waiting(counter: Counter, *lengths: int, then: Callable[[], None] | None = None) -> list[threading.Thread]:
    """Threads that wait for jobs of so many steps. The first one is in its first step, which lasts until all others sleep;
    `then` is called in the steps behind it."""
    jobs = [Job(length) for length in lengths]
    for job in jobs:
        counter.add(job)
    inside = threading.Event()

    def until_all_sleep() -> None:
        inside.set()
        end = time.monotonic() + PATIENCE
        while len(counter.turns._sleepers) < len(jobs) - 1 and time.monotonic() < end:
            time.sleep(0.0001)
        time.sleep(0.01)  # the last one stands there, and is about to
        counter.within = then

    counter.within = until_all_sleep
    threads = [threading.Thread(daemon=True, target=counter.turns.wait, args=(job,)) for job in jobs]
    threads[0].start()
    assert inside.wait(PATIENCE)
    for number, thread in enumerate(threads[1:]):
        thread.start()
        while len(counter.turns._sleepers) <= number < len(jobs) - 2:  # they fall asleep in this order
            time.sleep(0.0001)
    return threads


def check_ended(threads: list[threading.Thread], seconds: float = 10) -> None:
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive(), "nobody woke it"


def test_thread_that_steps_when_it_has_what_it_wanted_then_another_goes_on_and_one_step_serves_all() -> None:
    counter = Counter()
    check_ended(waiting(counter, 1, 400, 100, 2000, 20))
    assert counter.num_steps == 2000


def test_thread_that_was_left_the_next_step_when_it_has_no_need_of_it_then_it_wakes_another() -> None:
    for _ in range(20):
        counter = Counter()
        check_ended(waiting(counter, 1, 1, 3))
        assert counter.num_steps == 3


def test_thread_that_sleeps_when_a_step_brings_what_it_waits_for_then_it_is_woken_although_the_other_steps_on() -> None:
    counter, has_ended = Counter(), list[bool]()

    def look() -> None:
        if counter.num_steps == 10:
            threads[1].join(10)
            has_ended.append(not threads[1].is_alive())

    threads = waiting(counter, 1000, 2, then=look)
    check_ended(threads, 30)
    assert has_ended == [True]
    assert counter.num_steps == 1000


def test_command_when_it_comes_as_the_turn_is_let_go_then_whoever_lets_go_does_it() -> None:
    done: list[str] = []

    class LatecomersTurns(Turns):
        def _leave(self) -> None:
            if not latecomers:
                latecomers.append(threading.Thread(daemon=True, target=self.do, args=(lambda: done.append("late"),)))
                latecomers[0].start()
                while not self._asked:
                    time.sleep(0.0001)
                time.sleep(0.05)  # it has tried, and sleeps
            super()._leave()

    latecomers: list[threading.Thread] = []
    turns = LatecomersTurns("the late one", lambda: False)
    turns.do(lambda: done.append("first"))
    check_ended(latecomers)
    assert done == ["first", "late"]


def test_step_when_it_fails_then_its_thread_is_told_and_another_takes_over() -> None:
    counter, errors, ended = Counter(), list[BaseException](), list[int]()

    def fails_once() -> None:
        if counter.num_steps == 50:
            counter.num_steps += 1
            counter.is_inside = False
            raise ZeroDivisionError

    def waits() -> None:
        job = Job(200)
        counter.add(job)
        try:
            counter.turns.wait(job)
            ended.append(1)
        except ZeroDivisionError as error:
            errors.append(error)

    counter.within = fails_once
    together([waits] * 4)
    assert (len(errors), len(ended)) == (1, 3)


def test_command_when_it_raises_then_the_error_is_for_the_thread_that_asked() -> None:
    counter, ended = Counter(), list[int]()

    def waits() -> None:
        job = Job(500)
        counter.add(job)
        counter.turns.wait(job)
        ended.append(1)

    def asks() -> None:
        for _ in range(100):
            with pytest.raises(ZeroDivisionError):
                counter.turns.do(lambda: 1 // 0)

    together([waits, asks, waits, asks])
    assert len(ended) == 2


def test_end_when_a_step_takes_long_then_those_who_sleep_are_told_before_it_ends() -> None:
    counter, may_end, inside = Counter(), threading.Event(), threading.Event()

    def blocks() -> None:
        inside.set()
        assert may_end.wait(PATIENCE)

    def waits() -> None:
        with pytest.raises(EngineDeadError, match="it is over"):
            counter.turns.wait(Job(9))

    counter.within = blocks
    threads = [threading.Thread(daemon=True, target=waits) for _ in range(3)]
    threads[0].start()
    assert inside.wait(PATIENCE)
    for thread in threads[1:]:
        thread.start()
    while len(counter.turns._sleepers) < 2:
        time.sleep(0.001)
    counter.turns.end(EngineDeadError("it is over"))
    for thread in threads[1:]:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert threads[0].is_alive(), "it is in the step"
    may_end.set()
    threads[0].join(PATIENCE)
    with pytest.raises(EngineDeadError, match="it is over"):
        counter.turns.wait(Job(1))
    counter.turns.wait(Job(0))  # what is there can be had


def test_call_when_it_comes_from_within_a_step_then_what_waits_is_refused_and_what_does_not_is_done_behind() -> None:
    counter, told, done = Counter(), list[str](), list[str]()

    def calls() -> None:
        counter.within = None
        for call in (lambda: counter.turns.do(lambda: None), lambda: counter.turns.wait(Job(1))):
            with pytest.raises(
                WrongThreadError, match="the counter was called by thread 'MainThread' from within"
            ) as caught:
                call()
            told.append(str(caught.value))
        assert counter.turns.run("nested", lambda: 7) == 7  # the engine's own calls of its methods
        counter.turns.post(lambda: done.append("behind"))
        assert not done

    counter.within = calls
    counter.turns.wait(Job(0))
    job = Job(2)
    counter.jobs.append(job)
    counter.turns.wait(job)
    assert (len(told), done) == (2, ["behind"])


def test_engine_when_it_has_nothing_to_do_though_a_thread_waits_then_it_says_so() -> None:
    turns = Turns("the idle one", lambda: False)
    with pytest.raises(EngineDeadError, match="the idle one has nothing to do"):
        turns.wait(Job(1))
