"""`AsyncLLMEngine` as callers use it: with a thread and with a process behind it, the same tests."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from utils.async_engines import (
    ENDLESS,
    KINDS,
    LONG,
    PATIENCE,
    SETTINGS,
    SHORT,
    build_model,
    check_rest,
    joined,
    owner_process,
    start_engine,
    until,
)

from pellucid import LLM
from pellucid.api.hidden_states import HiddenStatesParams, SteeringParams
from pellucid.api.outputs import RequestOutput
from pellucid.api.request_options import RequestOptions
from pellucid.api.sampling_params import SamplingParams
from pellucid.errors import InvalidRequestError, QueueFullError
from pellucid.service import request_book
from pellucid.service.async_engine import AsyncLLMEngine
from pellucid.service.messages import Event, News
from pellucid.service.request_book import RequestBook

pytestmark = pytest.mark.asyncio

PROMPTS: list[tuple[Any, SamplingParams]] = [
    ("hello world", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)),
    ("the quick brown fox", SamplingParams(temperature=0.8, seed=1, max_tokens=60, ignore_eos=True, logprobs=2)),
    ([5, 6, 7, 8, 9], SamplingParams(temperature=1.2, seed=2, max_tokens=30, n=3)),
    ("jumps over", SamplingParams(temperature=0.9, seed=3, max_tokens=80, stop=["a", "th"], ignore_eos=True)),
    (list(range(3, 120)), SamplingParams(temperature=0.7, seed=4, max_tokens=25, prompt_logprobs=1)),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("async"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[RequestOutput]:
    with LLM(model, **SETTINGS) as llm:
        return llm.generate([prompt for prompt, _ in PROMPTS[:2]], [p for _, p in PROMPTS[:2]]) + [
            llm.generate([prompt] if isinstance(prompt, list) else prompt, params)[0] for prompt, params in PROMPTS[2:]
        ]


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, model: Path) -> Iterator[AsyncLLMEngine]:
    engine = start_engine(request.param, model)
    yield engine
    engine.close()


async def first_chunk_of(engine: AsyncLLMEngine, request_id: str) -> None:
    async for _ in engine.watch_stream(request_id):
        return


# ---- outputs ----------------------------------------------------------------------------------------------------------


async def test_request_when_submitted_then_status_collect_wait_and_release_tell_where_it_stands(
    engine: AsyncLLMEngine,
) -> None:
    request_id = await engine.submit("hello world", ENDLESS, request_id="mine")
    assert request_id == "mine"
    assert await engine.status("mine") in ("waiting", "running")
    assert await engine.collect("mine") is None
    assert not await engine.is_finished("mine")
    await first_chunk_of(engine, "mine")
    assert await engine.status("mine") == "running"
    assert await engine.cancel("mine")
    assert await engine.status("mine") == "finished_aborted"
    await engine.submit("hello world", SHORT, request_id="mine")
    output = await engine.wait("mine")
    assert (output.prompt, len(output.outputs[0].token_ids), output["finish_reason"]) == ("hello world", 5, "length")
    assert await engine.collect("mine") == output
    assert await engine.status("mine") == "finished_length"
    assert await engine.is_finished("mine")
    assert await engine.cancel("mine")
    await engine.release("mine")
    assert await engine.status("mine") is None
    for question in (engine.collect, engine.wait):
        with pytest.raises(KeyError, match="'mine' is unknown"):
            await question("mine")
    with pytest.raises(KeyError, match="'mine' is unknown"):
        engine.watch_stream("mine")
    assert not await engine.cancel("mine")
    assert not await engine.is_finished("mine")


async def test_streams_when_they_run_together_then_text_ids_and_logprobs_are_those_of_the_offline_engine(
    engine: AsyncLLMEngine, expected: list[RequestOutput]
) -> None:
    streams = [joined(engine.stream(prompt, params)) for prompt, params in PROMPTS]
    for chunks, output in zip(await asyncio.gather(*streams), expected, strict=True):
        assert chunks == {o.index: (o.text, o.token_ids, o.finish_reason) for o in output.outputs}
    outputs = await asyncio.gather(*[engine.generate(prompt, params) for prompt, params in PROMPTS])
    for output, other in zip(outputs, expected, strict=True):
        assert output.outputs == other.outputs
        assert (output.prompt, output.prompt_token_ids) == (other.prompt, other.prompt_token_ids)
        assert output.prompt_logprobs == other.prompt_logprobs
    assert not engine._book.streams, "streams release their own"
    await check_rest(engine)


async def test_stream_when_it_has_logprobs_then_they_are_joined_too(
    engine: AsyncLLMEngine, expected: list[RequestOutput]
) -> None:
    entries: list[Any] = []
    async for chunk in engine.stream(*PROMPTS[1]):
        assert len(chunk.logprobs or ()) == len(chunk.token_ids)
        entries += chunk.logprobs or ()
    assert entries == expected[1].outputs[0].logprobs


async def test_watcher_when_it_comes_before_or_after_the_end_then_all_is_replayed_and_ends_once(
    engine: AsyncLLMEngine, expected: list[RequestOutput]
) -> None:
    wanted = {o.index: (o.text, o.token_ids, o.finish_reason) for o in expected[2].outputs}
    request_id = await engine.submit(*PROMPTS[2])
    early = asyncio.create_task(joined(engine.watch_stream(request_id)))
    await first_chunk_of(engine, request_id)
    late = asyncio.create_task(joined(engine.watch_stream(request_id)))
    assert await early == wanted
    assert await late == wanted
    chunks = [chunk async for chunk in engine.watch_stream(request_id)]
    assert [chunk.index for chunk in chunks] == [0, 1, 2]
    assert {c.index: (c.text, c.token_ids, c.finish_reason) for c in chunks} == wanted
    await engine.release(request_id)


async def test_request_that_nobody_streams_when_it_is_watched_then_it_comes_whole(
    engine: AsyncLLMEngine, expected: list[RequestOutput]
) -> None:
    request_id = await engine.submit(*PROMPTS[0], stream=False)
    (chunk,) = [chunk async for chunk in engine.watch_stream(request_id)]
    choice = expected[0].outputs[0]
    assert (chunk.text, chunk.token_ids, chunk.finish_reason) == (choice.text, choice.token_ids, "length")
    await engine.release(request_id)


async def test_slow_reader_when_it_sleeps_then_what_piled_up_is_one_chunk(engine: AsyncLLMEngine) -> None:
    request_id = await engine.submit("hello world", ENDLESS)
    watcher = engine.watch_stream(request_id)
    first = await anext(watcher)
    last = (await engine.steps(-1))[0].step
    await until(lambda: _is_beyond(engine, last + 20))
    await engine.cancel(request_id)
    output = await engine.wait(request_id)
    rest = [chunk async for chunk in watcher]
    assert len(rest) == 1
    assert first.token_ids + rest[0].token_ids == output["token_ids"]
    assert first.text + rest[0].text == output["text"]
    assert len(rest[0].token_ids) >= 19
    assert rest[0].finish_reason == "abort"
    assert [len(log) for log in engine._book.streams[request_id]._logs] == [1], "nobody reads: it is kept joined"
    await engine.release(request_id)


async def _is_beyond(engine: AsyncLLMEngine, step: int) -> bool:
    return (await engine.steps(-1))[0].step >= step


async def test_callers_when_they_sit_in_loops_of_their_own_threads_then_all_are_served(engine: AsyncLLMEngine) -> None:
    found: list[Any] = []

    def run() -> None:
        found.append(asyncio.run(joined(engine.stream("hello world", SHORT))))

    threads = [Thread(target=run, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    mine = await joined(engine.stream("hello world", SHORT))
    for thread in threads:
        await asyncio.to_thread(thread.join, PATIENCE)
    assert found == [mine] * 4


# ---- cancelling -------------------------------------------------------------------------------------------------------


async def test_request_when_cancelled_before_its_start_then_it_ends_and_the_others_go_on(
    engine: AsyncLLMEngine,
) -> None:
    running = [await engine.submit("hello world", ENDLESS) for _ in range(SETTINGS["max_num_seqs"])]
    waiting = await engine.submit("the quick", ENDLESS)
    assert await engine.status(waiting) == "waiting"
    assert await engine.cancel(waiting)
    output = await engine.collect(waiting)
    assert output is not None
    assert (output["finish_reason"], output["token_ids"]) == ("abort", [])
    assert (await joined(engine.watch_stream(waiting)))[0] == ("", [], "abort")
    last = (await engine.steps(-1))[0].step
    await until(lambda: _is_beyond(engine, last + 3))
    assert [await engine.status(name) for name in running] == ["running"] * len(running)
    await engine.abort_all()
    await check_rest(engine)
    for name in (*running, waiting):
        await engine.release(name)


async def test_request_when_cancelled_in_its_prompt_then_its_blocks_are_free(engine: AsyncLLMEngine) -> None:
    """16,000 tokens in chunks of 32: five hundred steps."""
    rng = random.Random(1)
    prompt = [rng.randrange(3, 290) for _ in range(16_000)]
    request_id = await engine.submit(prompt, SHORT)
    await until(lambda: _runs(engine))
    assert await engine.cancel(request_id)
    output = await engine.wait(request_id)
    assert (output["finish_reason"], output["token_ids"]) == ("abort", [])
    await check_rest(engine)
    await engine.release(request_id)


@pytest.mark.parametrize("choices", [1, 3])
async def test_request_when_cancelled_between_tokens_then_it_has_those_that_were_made(
    engine: AsyncLLMEngine, choices: int
) -> None:
    params = SamplingParams(temperature=1, seed=5, max_tokens=5_000, ignore_eos=True, n=choices)
    request_id = await engine.submit("hello world", params)
    watcher = asyncio.create_task(joined(engine.watch_stream(request_id)))
    await first_chunk_of(engine, request_id)
    assert await engine.cancel(request_id)
    output = await engine.wait(request_id)
    assert {choice.finish_reason for choice in output.outputs} == {"abort"}
    assert 0 < len(output["token_ids"]) < 5_000
    assert await watcher == {o.index: (o.text, o.token_ids, "abort") for o in output.outputs}
    await check_rest(engine)
    await engine.release(request_id)


async def test_iterator_when_closed_then_its_request_is_cancelled_and_forgotten(engine: AsyncLLMEngine) -> None:
    before = (await engine.stats()).finished.get("abort", 0)
    stream = engine.stream("hello world", ENDLESS, request_id="left")
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    assert await engine.status("left") is None
    await check_rest(engine)
    assert (await engine.stats()).finished["abort"] == before + 1
    assert len((await joined(engine.stream("hello", SHORT, request_id="left")))[0][1]) == 5, "the id is free at once"


@pytest.mark.parametrize("way", ["stream", "generate"])
async def test_caller_when_it_leaves_then_no_answer_is_made_for_nobody(
    engine: AsyncLLMEngine, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole answer may be large, and an engine process would encode all of it while its neighbours wait."""
    events: list[Event] = []
    take = RequestBook._take
    monkeypatch.setattr(
        RequestBook, "_take", lambda book, event, wakes: (events.append(event), take(book, event, wakes))[1]
    )
    asked = (
        engine.generate("hello world", ENDLESS, request_id="gone")
        if way == "generate"
        else joined(engine.stream("hello world", ENDLESS, request_id="gone"))
    )
    task = asyncio.create_task(asked)
    await until(lambda: _runs(engine))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await check_rest(engine)
    assert len((await engine.generate("hello", SHORT, request_id="stays"))["token_ids"]) == 5
    ended = [output.request_id for event in events if isinstance(event, News) for output in event.finished]
    assert ended == ["stays"]


@pytest.mark.parametrize("way", ["stream", "generate"])
async def test_caller_when_its_task_is_cancelled_then_so_is_the_request(engine: AsyncLLMEngine, way: str) -> None:
    asked = (
        engine.generate("hello world", ENDLESS) if way == "generate" else joined(engine.stream("hello world", ENDLESS))
    )
    task = asyncio.create_task(asked)
    await until(lambda: _runs(engine))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not engine._book.streams
    await check_rest(engine)


async def _runs(engine: AsyncLLMEngine) -> bool:
    return (await engine.stats()).num_running > 0


async def test_submit_when_its_task_is_cancelled_at_any_moment_then_nothing_is_left(engine: AsyncLLMEngine) -> None:
    for turns in range(12):
        task = asyncio.create_task(engine.submit("hello world", ENDLESS, request_id="never"))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        done = await asyncio.gather(task, return_exceptions=True)
        if done == ["never"]:
            await engine.cancel("never")
            await engine.release("never")
        assert not engine._book.streams
    await check_rest(engine)


async def test_all_when_aborted_then_each_ends_once(engine: AsyncLLMEngine) -> None:
    names = [await engine.submit("hello world", ENDLESS) for _ in range(12)]
    assert await engine.abort_all() == 12
    outputs = [await engine.collect(name) for name in names]
    assert {output["finish_reason"] for output in outputs if output is not None} == {"abort"}
    assert None not in outputs
    assert await engine.abort_all() == 0
    await check_rest(engine)
    for name in names:
        await engine.release(name)


async def _storm(engine: AsyncLLMEngine, count: int, seed: int) -> None:
    """Requests of several kinds, left or cancelled after 0 to 30 turns of the loop or a few milliseconds."""
    rng, gate = random.Random(seed), asyncio.Semaphore(24)

    async def one(number: int) -> None:
        async with gate:
            prompt = [rng.randrange(3, 290) for _ in range(rng.choice([2, 9, 60, 200]))]
            params = SamplingParams(
                temperature=1, seed=number, max_tokens=100, ignore_eos=True, n=rng.choice([1, 1, 3])
            )
            name = f"storm-{number}"
            way = rng.choice(["leave", "cancel", "drop"])
            if way == "cancel":
                await engine.submit(prompt, params, request_id=name)
                await asyncio.sleep(rng.choice([0, 0.002, 0.01]))
                assert await engine.cancel(name)
                await engine.release(name)
            elif way == "leave":
                stream = engine.stream(prompt, params)
                for _ in range(rng.choice([1, 2, 5])):
                    await anext(stream)
                await stream.aclose()  # type: ignore[attr-defined]
            else:
                task = asyncio.create_task(engine.generate(prompt, params))
                for _ in range(rng.randrange(30)):
                    await asyncio.sleep(0)
                await asyncio.sleep(rng.choice([0, 0.003]))
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    await asyncio.gather(*[one(number) for number in range(count)])


@pytest.mark.parametrize("kind", KINDS)
async def test_storm_of_cancels_when_it_is_over_then_no_block_is_held_and_memory_is_as_before(
    model: Path, kind: str
) -> None:
    """Few blocks, so that the first storm has written to all of them, and requests wait and are preempted."""
    engine = start_engine(kind, model, num_blocks=256)
    try:
        await _storm(engine, 400, seed=1)
        await check_rest(engine)
        before = owner_process(engine).memory_info().rss
        await _storm(engine, 1000, seed=2)
        await check_rest(engine)
        assert owner_process(engine).memory_info().rss <= 1.05 * before
        assert not engine._book.streams
        assert not engine._book.ended_at
        assert await engine.reset_prefix_cache()
    finally:
        engine.close()


# ---- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "empty"),
        ([], {}, "empty"),
        ([300], {}, r"prompt\[0\] is 300"),
        ([1, -1], {}, r"prompt\[1\] is -1"),
        ([True], {}, "token ids are integers"),
        ([1.0], {}, "token ids are integers"),
        ([1] * 16384, {}, "max_model_len is 16,384"),
        ("\ud800", {}, "surrogate"),
        ([1], {"params": SamplingParams(stop_token_ids=[300])}, "vocabulary has 300"),
        ([1], {"params": 3}, "params"),
        ([1], {"options": RequestOptions(2**40)}, "priority"),
        ([1], {"options": RequestOptions("high")}, "priority"),
        ([1], {"options": RequestOptions(cache_salt=5)}, "cache_salt"),
        ([1], {"options": RequestOptions(cache_salt="\ud800")}, "surrogate"),
        ([1], {"options": 3}, "options is a int"),
        ([1], {"request_id": ""}, "request_id"),
        ([1], {"request_id": "x" * 513}, "request_id"),
        ([1], {"request_id": "\ud800"}, "surrogate"),
        (5, {}, "prompt"),
        (None, {}, "prompt"),
        ({"a": 1}, {}, "prompt"),
        (b"abc", {}, "prompt"),
    ],
)
async def test_request_when_refused_then_it_says_why_and_leaves_nothing(
    engine: AsyncLLMEngine, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        await engine.submit(prompt, **options)
    assert not engine._book.streams
    await check_rest(engine)


async def test_id_when_it_is_in_use_then_the_second_request_is_refused_and_the_first_goes_on(
    engine: AsyncLLMEngine,
) -> None:
    await engine.submit("hello world", ENDLESS, request_id="twice")
    with pytest.raises(InvalidRequestError, match="'twice' is in use"):
        await engine.submit("hello world", SHORT, request_id="twice")
    assert await engine.status("twice") in ("waiting", "running")
    assert await engine.cancel("twice")
    await engine.submit("hello world", SHORT, request_id="twice")
    assert len((await engine.wait("twice"))["token_ids"]) == 5, "an ended one makes room"
    await engine.release("twice")


async def test_id_when_its_request_is_left_and_it_is_taken_again_at_once_then_the_next_gets_its_own(
    engine: AsyncLLMEngine,
) -> None:
    expected = (await engine.generate("hello", SHORT))["token_ids"]
    many = dataclasses.replace(LONG, n=3)
    for turn in range(60):
        async with aclosing(engine.stream("world", many, request_id="again")) as chunks:
            for _ in range(turn % 4):
                await anext(chunks)
            task = asyncio.ensure_future(anext(chunks))
            await asyncio.sleep(0.001 * (turn % 7))
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        output = await asyncio.wait_for(engine.generate("hello", SHORT, request_id="again"), PATIENCE)
        assert [choice.token_ids for choice in output.outputs] == [expected]
        await engine.release("again")
    await check_rest(engine)


async def test_id_when_it_is_that_of_another_requests_choice_then_it_is_refused(engine: AsyncLLMEngine) -> None:
    params = SamplingParams(temperature=1, max_tokens=5_000, ignore_eos=True, n=2)
    await engine.submit("hello world", params, request_id="a")
    with pytest.raises(InvalidRequestError, match="in use"):
        await engine.submit("hello world", SHORT, request_id="a/1")
    assert await engine.status("a/1") is None
    assert await engine.cancel("a")
    await engine.release("a")
    await check_rest(engine)


async def test_outputs_that_nobody_collects_when_there_are_many_or_they_are_old_then_the_oldest_are_dropped(
    engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_book, "MAX_UNCOLLECTED", 3)
    names = [await engine.submit("hello", SHORT) for _ in range(5)]
    await check_rest(engine)
    assert [await engine.is_finished(name) for name in names] == [False, False, True, True, True]
    monkeypatch.setattr(request_book, "MAX_UNCOLLECTED_SECONDS", 0.0)
    await engine.generate("hello", SHORT)
    assert [await engine.is_finished(name) for name in names] == [False] * 5


# ---- figures ----------------------------------------------------------------------------------------------------------


async def test_stats_when_requests_ran_then_counters_and_histograms_add_up(engine: AsyncLLMEngine) -> None:
    await engine.reset_prefix_cache()
    before = await engine.stats()
    prompt = list(range(50, 90))
    for _ in range(2):
        await engine.generate(prompt, SHORT)
    after = await engine.stats()
    assert after.prompt_tokens - before.prompt_tokens == 80
    assert after.generation_tokens - before.generation_tokens == 10
    assert after.prefix_queries - before.prefix_queries == 80
    assert after.prefix_hits - before.prefix_hits == 39, "all but the last token, which is always computed"
    assert after.finished["length"] - before.finished.get("length", 0) == 2
    gained = {
        name: sum(histogram.counts) - sum(before.histograms[name].counts)
        for name, histogram in after.histograms.items()
    }
    steps = gained.pop("iteration_tokens_total")
    assert steps == after.num_steps - before.num_steps >= 10
    assert gained.pop("inter_token_latency_seconds") == 8
    assert gained == dict.fromkeys(gained, 2)
    assert all(len(h.counts) == len(h.bounds) + 1 for h in after.histograms.values())


async def test_output_when_it_ended_then_its_times_add_up(engine: AsyncLLMEngine) -> None:
    metrics = (await engine.generate("hello world", LONG)).metrics
    assert metrics is not None
    times = (metrics.queue_time, metrics.prefill_time, metrics.decode_time)
    assert all(time is not None and time >= 0 for time in times)
    assert sum(time or 0 for time in times) == pytest.approx(metrics.e2e_time)
    assert metrics.time_to_first_token == pytest.approx((times[0] or 0) + (times[1] or 0))


async def test_waiting_requests_when_asked_why_then_the_head_has_a_reason_of_its_own(engine: AsyncLLMEngine) -> None:
    names = [await engine.submit("hello world", ENDLESS) for _ in range(SETTINGS["max_num_seqs"] + 3)]
    await first_chunk_of(engine, names[0])
    stats = await engine.stats()
    assert (stats.num_running, stats.num_waiting) == (8, 3)
    assert stats.waiting_by_reason == {"max_num_seqs": 1, "behind_head": 2}
    await engine.abort_all()
    for name in names:
        await engine.release(name)


async def test_steps_when_asked_from_a_step_on_then_they_come_in_order_and_within_the_limit(
    engine: AsyncLLMEngine,
) -> None:
    await engine.generate("hello world", SHORT, request_id="traced")
    last = await engine.steps(-5)
    assert [record.request_outputs for record in last] == [["traced"]] * 5
    assert last[0].kind == "prefill"
    assert await engine.steps(last[2].step) == last[2:]
    assert await engine.steps(last[1].step, limit=2) == last[1:3]
    assert await engine.steps(last[-1].step + 1) == []
    for limit in (0, 5000):
        with pytest.raises(InvalidRequestError, match=f"limit is {limit}"):
            await engine.steps(0, limit)


@pytest.mark.parametrize("kind", KINDS)
async def test_queue_when_it_is_full_then_refused_with_a_time_and_taken_again_when_there_is_room(
    model: Path, kind: str
) -> None:
    engine = start_engine(kind, model, max_num_seqs=2, max_waiting=1)
    try:
        names = [await engine.submit("hello world", ENDLESS) for _ in range(3)]
        with pytest.raises(QueueFullError, match="max_waiting 1 ") as refused:
            await engine.submit("hello world", SHORT)
        assert 1 <= refused.value.retry_after <= 60
        assert len(engine._book.streams) == 3
        await engine.cancel(names[0])
        await engine.cancel(names[1])
        await engine.generate("hello world", SHORT)
        await engine.abort_all()
        await check_rest(engine)
    finally:
        engine.close()


async def test_queue_when_nobody_may_wait_then_as_many_as_can_run_are_taken(model: Path) -> None:
    engine = start_engine("thread", model, max_num_seqs=4, max_waiting=0)
    try:
        done = await asyncio.gather(*[engine.submit("hello", ENDLESS) for _ in range(6)], return_exceptions=True)
        assert [type(one) for one in done].count(QueueFullError) == 2
        assert [type(one) for one in done].count(str) == 4
    finally:
        engine.close()


async def test_hidden_states_when_they_cross_to_the_front_end_then_the_bits_of_the_offline_engine(
    engine: AsyncLLMEngine, model: Path
) -> None:
    prompt = list(range(5, 45))
    wants = {
        "flat": HiddenStatesParams(),
        "rows": HiddenStatesParams((0, 3, -1)),
        "layers": HiddenStatesParams((-2, -1), (0, 1, -1)),
    }
    with LLM(model, **SETTINGS) as llm:
        for name, wanted in wants.items():
            request_id = llm.client.submit(prompt, SHORT, stream=False, options=RequestOptions(hidden_states=wanted))
            while not llm.client.is_finished(request_id):
                llm.client.step()
            whole = llm.client.collect(request_id)
            assert whole is not None
            expected = whole.outputs[0]
            found = (await engine.generate(prompt, SHORT, options=RequestOptions(hidden_states=wanted))).outputs[0]
            assert found.hidden_states is not None, name
            assert expected.hidden_states is not None
            assert torch.equal(torch.tensor(found.hidden_states), torch.tensor(expected.hidden_states)), name
            assert found.hidden_states_positions == expected.hidden_states_positions
            chunks = [
                chunk async for chunk in engine.stream(prompt, SHORT, options=RequestOptions(hidden_states=wanted))
            ]
            carrying = [chunk for chunk in chunks if chunk.hidden_states is not None]
            assert carrying == chunks[-1:], name
            assert torch.equal(torch.tensor(carrying[0].hidden_states), torch.tensor(expected.hidden_states))


async def test_streamed_hidden_states_when_chunks_are_joined_then_one_row_a_token(engine: AsyncLLMEngine) -> None:
    prompt, wanted = list(range(5, 45)), HiddenStatesParams(stream=True)
    request_id = await engine.submit(prompt, SHORT, options=RequestOptions(hidden_states=wanted))
    await engine.wait(request_id)
    late = [chunk async for chunk in engine.watch_stream(request_id)]
    await engine.release(request_id)
    rows = [
        chunk.hidden_states
        async for chunk in engine.stream(prompt, SHORT, options=RequestOptions(hidden_states=wanted))
    ]
    assert len(late) == 1
    assert late[0].hidden_states is not None
    assert len(late[0].hidden_states) == len(late[0].token_ids) == 5
    assert torch.equal(
        torch.tensor(late[0].hidden_states), torch.cat([torch.tensor(row) for row in rows if row is not None])
    )


async def test_hidden_states_when_they_are_refused_then_at_once_and_by_name(engine: AsyncLLMEngine) -> None:
    with pytest.raises(InvalidRequestError, match="names layer 99"):
        await engine.generate([5, 6], SHORT, options=RequestOptions(hidden_states=HiddenStatesParams(None, (99,))))


async def test_steering_when_it_crosses_to_the_owner_then_the_bits_of_the_offline_engine(
    engine: AsyncLLMEngine, model: Path
) -> None:
    prompt, wanted = list(range(5, 45)), HiddenStatesParams(tuple(range(40)))
    vectors = {"layers.0": [0.25] * 64, "layers.1.mlp": [-0.5] * 64}
    with LLM(model, **SETTINGS) as llm:
        asked = {"return_hidden_states": True, "hidden_states_for_tokens": list(range(40))}
        expected = [llm.generate([prompt], SHORT, steering=one, **asked)[0].outputs[0] for one in (None, vectors)]
    steered = RequestOptions(hidden_states=wanted, steering=SteeringParams.from_request(vectors))
    found = await asyncio.gather(
        *[engine.generate(prompt, SHORT, options=one) for one in (RequestOptions(hidden_states=wanted), steered)]
    )
    assert not torch.equal(expected[0].hidden_states, expected[1].hidden_states)  # type: ignore[arg-type]
    for output, whole in zip(found, expected, strict=True):
        assert torch.equal(torch.tensor(output.outputs[0].hidden_states), whole.hidden_states)  # type: ignore[arg-type]
        assert output.outputs[0].token_ids == whole.token_ids
    unknown = SteeringParams.from_request({"layers.9": [1.0]})
    with pytest.raises(InvalidRequestError, match="'layers.9'"):
        await engine.submit(prompt, SHORT, options=RequestOptions(steering=unknown))
