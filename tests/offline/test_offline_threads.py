"""`LLM` called from many threads: everybody gets what they get alone, bit for bit, and nobody waits for ever."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from utils.lone_runs import JOBS, Job, check_chunks, check_same, lone_runs
from utils.tiny_models import build_tiny_checkpoint
from utils.together import PATIENCE, together

from pellucid import LLM, SamplingParams
from pellucid.api.outputs import RequestOutput, StreamChunk
from pellucid.engine import client
from pellucid.engine.factory import load_engine
from pellucid.errors import EngineDeadError, InvalidRequestError, WrongThreadError
from pellucid.replay import replay

pytestmark = pytest.mark.timeout(180)  # a lock that is never free would hang

SETTINGS: dict[str, Any] = {
    "max_model_len": 256,
    "num_blocks": 80,
    "block_size": 4,
    "num_threads": 1,
    "max_num_seqs": 8,
}
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("threads"), "llama")


@pytest.fixture(scope="module", params=[False, True], ids=["in turn", "planned ahead"])
def llm(request: pytest.FixtureRequest, model: Path) -> Iterator[LLM]:
    with LLM(model, async_scheduling=request.param, **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(model: Path) -> list[RequestOutput]:
    with LLM(model, **SETTINGS) as llm:
        return lone_runs(llm)


def check_rest(llm: LLM) -> None:
    """Nothing runs, nothing is kept, no block is held."""
    while llm.client.has_unfinished:
        llm.client.step()
    assert llm.kv_cache_stats()["used_blocks"] == 0
    assert not llm.client._readers
    assert not llm.client._living
    assert not llm.client._turns._sleepers
    llm.engine.scheduler.check_invariants()


# ---- the same bits ------------------------------------------------------------------------------------------------------


class Caller:
    """Does one thing after another, drawn at random, and checks each against what it is alone."""

    def __init__(self, llm: LLM, alone: list[RequestOutput], seed: int, num_things: int) -> None:
        self.llm, self.alone, self.num_things = llm, alone, num_things
        self.random = random.Random(seed)
        self.streamable = [index for index, job in enumerate(JOBS) if not job.options]

    def __call__(self) -> None:
        things = (self.one, self.several, self.stream, self.two_streams, self.leave, self.within, self.by_client,
                  self.cancel, self.score, self.questions)  # fmt: skip
        for _ in range(self.num_things):
            self.random.choice(things)()

    def pick(self) -> tuple[Job, RequestOutput]:
        index = self.random.randrange(len(JOBS))
        return JOBS[index], self.alone[index]

    def pick_stream(self) -> tuple[Job, RequestOutput]:
        index = self.random.choice(self.streamable)
        return JOBS[index], self.alone[index]

    def one(self) -> None:
        job, alone = self.pick()
        check_same(job.run(self.llm), alone)

    def several(self) -> None:
        picked = [self.pick_stream() for _ in range(self.random.randrange(2, 5))]
        picked = [(job, alone) for job, alone in picked if not isinstance(job.prompt, str)]
        prompts: Any = [job.prompt for job, _ in picked]
        for output, (_, alone) in zip(
            self.llm.generate(prompts, [job.params for job, _ in picked], use_tqdm=self.random.random() < 0.2),
            picked,
            strict=True,
        ):
            check_same(output, alone)

    def stream(self) -> None:
        job, alone = self.pick_stream()
        check_chunks(list(self.llm.stream(job.prompt, job.params)), alone)

    def two_streams(self) -> None:
        picked = [self.pick_stream(), self.pick_stream()]
        streams = [self.llm.stream(job.prompt, job.params) for job, _ in picked]
        chunks: list[list[StreamChunk]] = [[], []]
        open_ = [0, 1]
        while open_:
            which = self.random.choice(open_)
            chunk = next(streams[which], None)
            if chunk is None:
                open_.remove(which)
            else:
                chunks[which].append(chunk)
        for own, (_, alone) in zip(chunks, picked, strict=True):
            check_chunks(own, alone)

    def leave(self) -> None:
        """Leaves a stream half-way: by leaving the loop, by closing it, or by dropping it in a cycle."""
        job, _ = self.pick_stream()
        stream = self.llm.stream(job.prompt, job.params)
        for _ in range(self.random.randrange(3)):
            next(stream, None)
        how = self.random.randrange(3)
        if how == 0:
            stream.close()  # type: ignore[attr-defined]
        elif how == 1:
            cycle: list[Any] = [stream]
            cycle.append(cycle)
            del stream, cycle

    def within(self) -> None:
        """Generates inside a loop over a stream."""
        job, alone = self.pick_stream()
        chunks = []
        for chunk in self.llm.stream(job.prompt, job.params):
            chunks.append(chunk)
            if self.random.random() < 0.1:
                self.one()
        check_chunks(chunks, alone)

    def by_client(self) -> None:
        job, alone = self.pick_stream()
        request_id = self.llm.client.submit(job.prompt, job.params)
        while not self.llm.client.is_finished(request_id):
            assert self.llm.client.get_request_status(request_id) in ("waiting", "running", "preempted", alone.status)
            self.llm.client.step()
        output = self.llm.client.collect(request_id)
        assert output is not None
        assert self.llm.client.get_request_history(request_id)[-1] == alone.status
        self.llm.client.release(request_id)
        check_same(output, alone)

    def cancel(self) -> None:
        request_id = self.llm.client.submit([5, 6, 7], LONG)
        assert self.llm.client.cancel(request_id)
        while self.llm.client.collect(request_id) is None:
            self.llm.client.step()
        output = self.llm.client.collect(request_id)
        assert output is not None
        assert output["finish_reason"] == "abort"
        self.llm.client.release(request_id)

    def score(self) -> None:
        alone = self.alone[1].outputs[0]
        (scored,) = self.llm.score([JOBS[1].prompt], [alone.token_ids])
        assert scored == [row[token].logprob for row, token in zip(alone.logprobs or [], alone.token_ids, strict=True)]

    def questions(self) -> None:
        assert self.llm.encode("the quick brown fox") == [self.alone[2].prompt_token_ids]
        stats = self.llm.kv_cache_stats()
        assert stats["used_blocks"] + stats["free_blocks"] == stats["num_blocks"]
        self.llm.reset_prefix_cache()
        self.llm.engine.stats()
        with pytest.raises(InvalidRequestError):
            self.llm.generate([[5], []], SHORT)


@pytest.mark.parametrize("num_threads", [2, 8])
def test_threads_when_they_do_all_kinds_of_things_at_once_then_each_output_is_what_it_is_alone(
    llm: LLM, alone: list[RequestOutput], num_threads: int
) -> None:
    together([Caller(llm, alone, 100 * num_threads + i, 60 // num_threads + 6) for i in range(num_threads)])
    gc.collect()
    check_rest(llm)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_blocks": 30, "max_num_batched_tokens": 16},  # preempts
        {"policy": "prefill_first", "enable_prefix_caching": False},
        {"kv_layout": "slot", "block_size": 1, "num_blocks": 300},
        {"speculative_method": "ngram", "async_scheduling": True},
        {"num_threads": 2, "max_num_seqs": 3},
        {"policy": "padded", "block_size": 64, "num_blocks": 40, "max_model_len": 320, "enable_prefix_caching": False},
        {"enforce_eager": True, "max_num_seqs": 4},
    ],
    ids=lambda settings: "-".join(map(str, next(iter(settings.items())))),
)
def test_threads_when_the_engine_has_other_settings_then_each_output_is_what_it_is_alone(
    model: Path, alone: list[RequestOutput], settings: dict[str, Any]
) -> None:
    with LLM(model, **{**SETTINGS, **settings}) as llm:
        together([Caller(llm, alone, i, 8) for i in range(4)])
        gc.collect()
        check_rest(llm)


@pytest.mark.parametrize("ahead", [False, True])
def test_run_of_threads_when_traced_then_it_can_be_run_again_step_by_step(
    model: Path, alone: list[RequestOutput], tmp_path: Path, ahead: bool
) -> None:
    path = str(tmp_path / "threads.jsonl")
    with LLM(model, trace_path=path, trace_logits=True, async_scheduling=ahead, **SETTINGS) as llm:
        together([Caller(llm, alone, 50 + i, 6) for i in range(4)])
        gc.collect()
    report = replay(path)
    assert report.is_equal, report.difference
    assert report.num_requests > 20
    assert report.num_cancelled > 0


def test_threads_when_each_has_one_request_then_steps_carry_them_together(llm: LLM) -> None:
    before = llm.engine.turn
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    together([partial(llm.generate, [[5 + i, 6]], params) for i in range(4)])
    assert llm.engine.turn - before < 200, "four requests of 100 tokens take 400 steps one after the other"


def test_conversations_when_threads_hold_them_then_each_answer_is_its_own(llm: LLM) -> None:
    def talk(i: int) -> None:
        for _ in range(5):
            (output,) = llm.chat([{"role": "user", "content": f"word {i}"}], SHORT)
            assert output["token_ids"] == expected[i]

    expected = [llm.chat([{"role": "user", "content": f"word {i}"}], SHORT)[0]["token_ids"] for i in range(4)]
    together([partial(talk, i) for i in range(4)])


# ---- chunks are nobody else's -----------------------------------------------------------------------------------------


def test_streams_when_interleaved_with_generate_in_one_thread_then_no_chunk_is_lost(
    llm: LLM, alone: list[RequestOutput]
) -> None:
    streams = {index: llm.stream(JOBS[index].prompt, JOBS[index].params) for index in (0, 2, 3)}
    chunks: dict[int, list[StreamChunk]] = {index: [next(stream)] for index, stream in streams.items()}
    check_same(JOBS[4].run(llm), alone[4])  # its steps carry the three streams
    for index, stream in streams.items():
        check_chunks([*chunks[index], *stream], alone[index])
    check_rest(llm)


def test_requests_of_the_client_when_generate_steps_them_then_the_next_step_tells_all_that_they_brought(
    llm: LLM, alone: list[RequestOutput]
) -> None:
    job = JOBS[1]
    request_id = llm.client.submit(job.prompt, job.params)
    llm.generate([[5, 6]], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    assert llm.client.is_finished(request_id)
    assert llm.client.has_unfinished, "there is something to tell"
    outputs = llm.client.step_outputs()
    check_chunks(outputs.chunks, alone[1])
    assert [output.request_id for output in outputs.finished] == [request_id]
    assert not llm.client.has_unfinished
    assert not llm.client.step()
    llm.client.release(request_id)


def test_engine_when_stepped_past_its_client_then_the_client_still_has_everything(
    llm: LLM, alone: list[RequestOutput]
) -> None:
    stream = llm.stream(JOBS[0].prompt, JOBS[0].params)
    chunks = [next(stream)]
    with ThreadPoolExecutor(1) as pool:
        for _ in range(10):
            pool.submit(llm.engine.step).result(PATIENCE)
    check_chunks([*chunks, *stream], alone[0])


def test_more_prompts_than_outputs_are_kept_for_collecting_when_generated_then_all_are_there(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MAX_UNCOLLECTED", 3)
    assert len(llm.generate([[5 + i] for i in range(10)], SHORT)) == 10
    ids = [llm.client.submit([5, 6], SHORT) for _ in range(5)]
    while llm.client.has_unfinished:
        llm.client.step()
    assert [llm.client.is_finished(request_id) for request_id in ids] == [False, False, True, True, True]
    with pytest.raises(KeyError, match="is unknown"):
        llm.client.collect(ids[0])


# ---- whoever leaves, and however --------------------------------------------------------------------------------------


def test_thread_when_it_raises_while_it_reads_then_the_others_are_not_held_up(
    llm: LLM, alone: list[RequestOutput]
) -> None:
    def reads_and_fails() -> None:
        for _ in llm.stream([5, 6], LONG):
            raise ZeroDivisionError

    def fails() -> None:
        with pytest.raises(ZeroDivisionError):
            reads_and_fails()

    together([fails, *[partial(Caller(llm, alone, i, 5)) for i in range(3)]])
    gc.collect()
    check_rest(llm)


def test_reader_when_it_pauses_then_the_requests_of_others_go_on_and_its_own_too(
    llm: LLM, alone: list[RequestOutput]
) -> None:
    stream = llm.stream(JOBS[0].prompt, JOBS[0].params)
    first = next(stream)
    together([partial(JOBS[3].run, llm), partial(JOBS[4].run, llm)])
    check_chunks([first, *stream], alone[0])


def test_stream_when_dropped_in_the_middle_of_a_step_then_it_is_ended_behind_the_step(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(model, **SETTINGS) as llm:
        dropped: list[Any] = [llm.stream([5, 6], LONG)]
        next(dropped[0])
        execute = llm.engine.executor.execute

        def drop(plan: Any) -> Any:
            dropped.clear()  # as the garbage collector may, on the thread that steps
            return execute(plan)

        monkeypatch.setattr(llm.engine.executor, "execute", drop)
        assert len(llm.generate([[7, 8]], SHORT)[0]["token_ids"]) == 3
        check_rest(llm)


@pytest.mark.parametrize("ahead", [False, True])
def test_llm_when_closed_while_threads_wait_then_each_gets_a_typed_error_at_once(model: Path, ahead: bool) -> None:
    llm = LLM(model, async_scheduling=ahead, **{**SETTINGS, "max_num_seqs": 2})
    errors: list[BaseException] = []

    def wait(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    prompts = [[5, 6, 7]] * 100
    calls: list[Callable[[], object]] = [
        lambda: llm.generate(prompts, LONG),
        lambda: llm.generate(prompts, LONG, use_tqdm=True),
        lambda: list(llm.stream([5, 6], LONG)),
        lambda: llm.score(prompts, [[8]] * 100),
    ]
    threads = [threading.Thread(daemon=True, target=wait, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    while llm.engine.turn < 20:
        time.sleep(0.001)
    began = time.monotonic()
    llm.close()
    for thread in threads:
        thread.join(PATIENCE)
    assert time.monotonic() - began < 10
    assert [(type(error), str(error)) for error in errors] == [(EngineDeadError, "the engine is closed")] * 4
    llm.close()
    for call in (*calls, lambda: llm.client.submit([5], SHORT), llm.client.step):
        with pytest.raises(EngineDeadError, match="the engine is closed"):
            call()


def test_step_when_it_fails_then_all_threads_are_told_and_nobody_gets_a_wrong_answer(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(model, **SETTINGS) as llm:
        streams = [llm.stream([5 + i], LONG) for i in range(3)]
        for stream in streams:
            next(stream)
        apply = llm.engine.scheduler.apply

        def fails(*args: Any) -> Any:
            apply(*args)
            raise RuntimeError("a bug")

        monkeypatch.setattr(llm.engine.scheduler, "apply", fails)
        errors: list[BaseException] = []

        def read(stream: Iterator[StreamChunk]) -> None:
            try:
                list(stream)
            except BaseException as error:
                errors.append(error)

        together([partial(read, stream) for stream in streams])
        assert sorted(map(str, errors)) == ["a bug"] + ["the engine failed: RuntimeError: a bug"] * 2
        with pytest.raises(EngineDeadError, match="the engine failed: RuntimeError: a bug"):
            llm.generate([[5]], SHORT)


# ---- who may call what ------------------------------------------------------------------------------------------------


def test_engine_of_one_thread_when_another_calls_it_then_the_error_names_both(model: Path) -> None:
    from pellucid.config import EngineConfig

    engine = load_engine(EngineConfig.from_kwargs(model, SETTINGS))
    calls: dict[str, Callable[[], object]] = {
        "add_request": lambda: engine.add_request([5, 6], SHORT),
        "step": engine.step,
        "cancel": lambda: engine.cancel("req-0"),
        "take_ended": engine.take_ended,
        "reset_prefix_cache": engine.reset_prefix_cache,
        "stats": engine.stats,
        "close": engine.close,
    }

    def refused() -> None:
        for name, call in calls.items():
            with pytest.raises(WrongThreadError, match=rf"LLMEngine.{name} was called by thread 'b'; thread 'a' is"):
                call()

    def owns() -> None:
        engine.add_request([5, 6], SHORT)
        threads[1].start()
        threads[1].join(PATIENCE)
        outputs = []
        while engine.has_unfinished:
            outputs += engine.step().finished
        lengths.append(len(outputs[0]["token_ids"]))

    lengths: list[int] = []
    threads = [
        threading.Thread(daemon=True, target=owns, name="a"),
        threading.Thread(daemon=True, target=refused, name="b"),
    ]
    threads[0].start()
    threads[0].join(PATIENCE)
    assert lengths == [3]
    engine.add_request([5, 6], SHORT)  # its owner has ended: whoever comes next owns it
    engine.close()


def test_llm_when_called_from_within_its_own_step_then_the_error_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(model, **SETTINGS) as llm:
        record = llm.engine.trace.record
        seen: list[str] = []

        def calls_back(step: Any) -> None:
            record(step)
            for call in (
                partial(llm.generate, [[5]], SHORT),
                llm.kv_cache_stats,
                partial(next, llm.stream([5], SHORT)),
            ):
                with pytest.raises(WrongThreadError, match="from within its own step") as caught:
                    call()
                seen.append(str(caught.value))

        monkeypatch.setattr(llm.engine.trace, "record", calls_back)
        assert len(llm.generate([[5, 6]], SHORT)[0]["token_ids"]) == 3
        assert len(seen) == 9
        check_rest(llm)


def test_executor_when_two_threads_execute_at_once_then_the_second_is_refused_by_name(model: Path) -> None:
    with LLM(model, **SETTINGS) as llm:
        inside, may_go = threading.Event(), threading.Event()
        executor: Any = llm.engine.executor
        execute = executor.runner.execute

        def slow(plan: Any) -> Any:
            inside.set()
            assert may_go.wait(PATIENCE)
            return execute(plan)

        executor.runner.execute = slow
        thread = threading.Thread(daemon=True, target=llm.generate, args=([[5, 6]], SHORT), name="first")
        thread.start()
        assert inside.wait(PATIENCE)
        with pytest.raises(
            WrongThreadError, match="the executor was called by thread .* while thread 'first' is inside"
        ):
            executor.execute(None)
        with pytest.raises(WrongThreadError, match="while thread 'first' is inside"):
            executor.close()
        may_go.set()
        thread.join(PATIENCE)
        check_rest(llm)
