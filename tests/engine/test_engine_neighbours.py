"""One request never hurts another: whatever is wrong with it, wherever it comes out, its neighbours get what they get alone.

Each fault is planted at one stage of a request's way; each company is a way of planning. The faulty request ends with an error of
its own, or is refused; the others are compared bit by bit with their lone runs.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from utils.neighbours import (
    BEYOND,
    COMPANIES,
    NAN_TOKEN,
    SHARED,
    VOCAB,
    Asked,
    Blind,
    World,
    alone,
    asked,
    assert_same_bits,
    build_model,
    past_the_checks,
    patched,
    prompt_of,
)

from pellucid.api.hidden_states import CaptureParams, HiddenStatesParams, SteeringParams
from pellucid.api.outputs import RequestOutput
from pellucid.api.request_options import RequestOptions
from pellucid.api.sampling_params import SamplingParams
from pellucid.api.structured_outputs import CustomStructure, Grammar, Matcher
from pellucid.engine.admission import RequestChecker
from pellucid.errors import InvalidRequestError, NativeError

BAD = "bad"
LONG: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
PARAMS = SamplingParams(**LONG)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("neighbours"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[RequestOutput]:
    return alone(model)


# ---- faults: each prepares the world and gives the request that fails in it ------------------------------------------------


def unchecked(world: World) -> None:
    """An engine whose admission lets all ids pass."""
    world.engine.checker = Blind(**vars(world.engine.checker))


def id_beyond(token: int, place: int) -> Callable[[World], Asked]:
    def plant(world: World) -> Asked:
        unchecked(world)
        prompt = prompt_of(21, 40)
        prompt[place] = token
        return Asked(prompt, PARAMS)

    return plant


def text_beyond(world: World) -> Asked:
    unchecked(world)
    return Asked(f"the {BEYOND}", PARAMS)


def value(**values: Any) -> Callable[[World], Asked]:
    return lambda world: Asked(prompt_of(6, 41), past_the_checks(PARAMS, **values))


def not_finite(world: World) -> Asked:
    """It begins as a neighbour does, so that they share blocks."""
    return Asked([*SHARED, NAN_TOKEN, 5, 6], PARAMS)


def not_finite_later(world: World) -> Asked:
    """The token that makes NaN is drawn, after some good ones."""
    params = SamplingParams(**{**LONG, "temperature": 1.0, "seed": 3, "allowed_token_ids": (10, 20, NAN_TOKEN)})
    return Asked([10, 20, 10, 20], params)


def overflowing_steering(world: World) -> Asked:
    vectors = {"layers.0.mlp": [3e38] * 64, "layers.1": [-3e38] * 64, "embed_tokens": [1e38] * 64}
    return Asked(prompt_of(9, 42), PARAMS, RequestOptions(steering=SteeringParams.from_request(vectors)))


def misshapen_steering(world: World) -> Asked:
    steering = SteeringParams.from_request({"layers.1": [1.0] * 64})
    assert steering is not None
    steering.vectors["layers.1"] = np.ones(63, np.float32)
    unlimited = RequestChecker.check

    def check(self: RequestChecker, token_ids: Any, params: Any, options: Any) -> Any:
        return unlimited(self, token_ids, params)

    object.__setattr__(world.engine.checker, "check", check.__get__(world.engine.checker))
    return Asked(prompt_of(9, 43), PARAMS, RequestOptions(steering=steering))


class FailingStructure(CustomStructure):
    """All tokens may come, until something fails: at `step` of an output, in one of its methods."""

    def __init__(self, where: str, step: int) -> None:
        self.where, self.step = where, step

    def compile(self, vocab_size: int) -> Grammar:
        if self.where == "compile":
            raise InvalidRequestError("structured_outputs", ("planted: no structure",))
        return self  # type: ignore[return-value]

    def matcher(self, output_token_ids: Sequence[int] = ()) -> Matcher:
        if self.where == "matcher":
            raise RuntimeError("planted: no matcher")
        return FailingMatcher(self.where, self.step, len(output_token_ids))


class FailingMatcher:
    is_complete = False
    error: str | None = None

    def __init__(self, where: str, step: int, position: int) -> None:
        self._where, self._step, self._position = where, step, position
        self.mask = np.full((VOCAB + 31) // 32, 0xFFFFFFFF, np.uint32)

    def fill(self) -> None:
        if self._position < self._step:
            return
        if self._where == "fill":
            raise RuntimeError("planted: lost its place")
        if self._where == "mask":
            self.mask = np.zeros(1, np.uint32)
        if self._where == "nothing left":
            self.mask[:] = 0

    def accept(self, token_id: int) -> bool:
        self._position += 1
        if self._position <= self._step:
            return True
        if self._where == "accept":
            raise RuntimeError("planted: cannot take it")
        if self._where == "refuse":
            self.error = "planted: does not fit \ud800"
        return self.error is None


def structure(where: str, step: int = 3) -> Callable[[World], Asked]:
    params = SamplingParams(**LONG, structured_outputs=FailingStructure(where, step))  # type: ignore[arg-type]
    return lambda world: Asked(prompt_of(7, 44), params)


def row_of_bad(world: World) -> Callable[[], int]:
    """Where the faulty request's last row stands in the batch that is computed; -1: it is not in it."""
    seen: list[Any] = []

    def watch(forward: Any) -> Any:
        def watching(entries: Any, requests: Any, batch: Any) -> Any:
            seen[:] = [entries, batch]
            return forward(entries, requests, batch)

        return watching

    patched(world.executor.runner, "_forward", watch)

    def row() -> int:
        entries, batch = seen
        names = [entry.request_id for entry in entries]
        return int(batch.query_start[names.index(BAD) + 1]) - 1 if BAD in names else -1

    return row


def core_blames(item: str, step: int) -> Callable[[World], Asked]:
    """The core refuses a batch, and names a token or a sequence of it, in the `step`-th batch that has the faulty request."""

    def plant(world: World) -> Asked:
        row, count = row_of_bad(world), 0

        def fail(run: Any) -> Any:
            def failing(batch: Any, *more: Any) -> Any:
                nonlocal count
                at = row()
                count += at >= 0
                if at >= 0 and count > step:
                    index = at if item == "token" else int(np.searchsorted(batch.query_start, at, side="right")) - 1
                    raise NativeError(f"planted: {item} {index}", -1, item, index)  # type: ignore[arg-type]
                return run(batch, *more)

            return failing

        patched(world.executor.runner.executable, "run", fail)
        return Asked(prompt_of(19, 45), PARAMS)

    return plant


def spoiled(table: str, value: int) -> Callable[[World], Asked]:
    """What the runner keeps of the request is damaged while it runs: the core itself refuses its token or its block."""

    def plant(world: World) -> Asked:
        runner, count = world.executor.runner, 0

        def spoil(build: Any) -> Any:
            def spoiling(entries: Any, requests: Any) -> Any:
                nonlocal count
                for entry, request in zip(entries, requests, strict=True):
                    count += entry.request_id == BAD
                    if entry.request_id == BAD and count > 2:
                        array = getattr(runner._rows, table)
                        array[request.place] = value
                return build(entries, requests)

            return spoiling

        patched(runner._rows, "build", spoil)
        return Asked(prompt_of(4, 46), PARAMS)

    return plant


def no_variant(world: World) -> Asked:
    """There is no memory for the buffers of a program that keeps activations."""

    def fail(load: Any) -> Any:
        def failing(**variant: Any) -> Any:
            raise NativeError("planted: out of memory", -3)

        return failing

    patched(world.executor.runner.executable, "_load", fail)
    return Asked(prompt_of(8, 47), PARAMS, RequestOptions(capture=CaptureParams(("layers.*",))))


def no_rows(world: World) -> Asked:
    """An activation that was kept cannot be read."""

    def fail(activation: Any) -> Any:
        def failing(name: str) -> Any:
            raise KeyError(f"planted: {name}")

        return failing

    patched(world.executor.runner.executable, "activation", fail)
    states = HiddenStatesParams(layers=(1,))
    return Asked(prompt_of(8, 48), PARAMS, RequestOptions(hidden_states=states, capture=CaptureParams(("layers.0",))))


def no_prompt_logprobs(world: World) -> Asked:
    def fail(logprobs_of: Any) -> Any:
        def failing(rows: Any, targets: Any, top_n: int) -> Any:
            if top_n == 5:
                raise NativeError("planted: no logits", -3)
            return logprobs_of(rows, targets, top_n)

        return failing

    patched(world.executor.runner, "_logprobs_of", fail)
    return Asked(prompt_of(30, 49), SamplingParams(**LONG, prompt_logprobs=5))


def output_fails(name: str, **params: Any) -> Callable[[World], Asked]:
    """A method of the output of the faulty request fails, the others' do not."""

    def plant(world: World) -> Asked:
        def fail(method: Any) -> Any:
            def failing(first: Any, *more: Any) -> Any:
                if getattr(first, "request_id", first) == BAD:
                    raise RuntimeError(f"planted: {name}")
                return method(first, *more)

            return failing

        patched(world.engine.output, name, fail)
        states = RequestOptions(hidden_states=HiddenStatesParams(), capture=CaptureParams(("layers.0",)))
        return Asked(prompt_of(8, 50), SamplingParams(**LONG, **params), states)

    return plant


class Panic(BaseException):
    """As a library in Rust panics: no `Exception`."""


def text_fails(method: str, **params: Any) -> Callable[[World], Asked]:
    """The detokeniser or the stop strings of the faulty request fail, now or when it ends."""

    def plant(world: World) -> Asked:
        def panic(*_: Any) -> Any:
            raise Panic("planted: no text")

        def spoil(new_choice: Any) -> Any:
            def spoiling(index: int, asked_for: SamplingParams, *more: Any) -> Any:
                choice = new_choice(index, asked_for, *more)
                if asked_for.max_tokens == LONG["max_tokens"]:
                    target = choice.stop if method == "push" else choice.detokenizer
                    setattr(target, method, panic)
                return choice

            return spoiling

        patched(world.engine.output, "new_choice", spoil)
        return Asked(prompt_of(8, 51), SamplingParams(**LONG, **params))

    return plant


# What is planted, and words of the error that its request ends with; None: it may also end well.
FAULTS: dict[str, tuple[Callable[[World], Asked], str | None]] = {
    "id beyond the embedding": (id_beyond(VOCAB, 20), r"token_ids\[\d+\] is 300"),
    "negative id in a later chunk": (id_beyond(-1, 15), r"token_ids\[\d+\] is -1"),
    "id beyond 32 bits": (id_beyond(2**40, 3), "OverflowError"),
    "text beyond the embedding": (text_beyond, r"token_ids\[\d+\] is 309"),
    "penalty that vanishes": (
        value(repetition_penalty=5e-324),
        r"repetition_penalty is 0; it must be in \[1e-06, 10\]",
    ),
    "penalty that is denormal": (value(repetition_penalty=1e-45), "repetition_penalty is 1.4013e-45"),
    "temperature beyond float32": (value(temperature=1e300), r"temperature is inf; it must be in \[0, 100\]"),
    "temperature that vanishes": (value(temperature=1e-45), None),
    "top_p of zero": (value(top_p=0.0), r"top_p is 0; it must be in \(0, 1\]"),
    "min_p NaN": (value(temperature=1.0, min_p=float("nan")), "min_p is nan"),
    "penalty infinite": (value(frequency_penalty=float("inf")), "frequency_penalty is inf"),
    "bias NaN": (value(logit_bias={5: float("nan")}), "logits are not finite behind .* and 1 biases"),
    "bias of no number": (value(logit_bias={5: "x"}), "could not convert string"),
    "top_k of no number": (value(top_k="x"), "TypeError"),
    "logprobs of no number": (value(logprobs="x"), "TypeError"),
    "NaN logits": (not_finite, "logits are not finite"),
    "NaN logits later": (not_finite_later, "logits are not finite"),
    "steering that overflows": (overflowing_steering, None),
    "steering of another width": (misshapen_steering, r"a vector \[63\] is added to an activation 64 wide"),
    "structure without a matcher": (structure("matcher"), "planted: no matcher"),
    "structure that fails at once": (structure("fill", 0), "planted: lost its place"),
    "structure that fails midway": (structure("fill"), "planted: lost its place"),
    "structure whose mask shrinks": (structure("mask"), r"mask is uint32 \[1\]; it must be uint32 \[10\]"),
    "structure that leaves nothing": (structure("nothing left"), "no token can be sampled"),
    "structure that cannot take a token": (structure("accept"), "planted: cannot take it"),
    "structure that refuses a token": (structure("refuse"), r"planted: does not fit \\ud800"),
    "core blames a token at once": (core_blames("token", 0), "planted: token"),
    "core blames a token later": (core_blames("token", 3), "planted: token"),
    "core blames a sequence": (core_blames("sequence", 1), "planted: sequence"),
    "newest token damaged": (spoiled("_newest_N", 10**6), r"token_ids\[\d+\] is 1000000"),
    "block table damaged": (spoiled("_tables_NW", 10**6), r"block_tables\[\d+\]\[0\] is 1000000"),
    "no program that keeps": (no_variant, "planted: out of memory"),
    "no rows to gather": (no_rows, "planted: layers.0"),
    "no prompt logprobs": (no_prompt_logprobs, "planted: no logits"),
    "states not taken": (output_fails("add_hidden_states"), "planted: add_hidden_states"),
    "captures not taken": (output_fails("add_captured"), "planted: add_captured"),
    "token not taken": (output_fails("add_token"), "planted: add_token"),
    "stop strings not checked": (output_fails("stop_check", stop=["zzz"]), "planted: stop_check"),
    "text not made": (text_fails("add"), "planted: no text"),
    "text not ended": (text_fails("flush"), "planted: no text"),
    "stop string not found": (text_fails("push", stop=["zzz"]), "planted: no text"),
}


def run_beside(
    world: World, plant: Callable[[World], Asked], expected: list[RequestOutput], draw: random.Random
) -> RequestOutput:
    """Neighbours and the faulty request in a drawn order, a few steps apart; what became of the latter. Then it comes once more
    beside nobody, to find what the first left behind."""
    requests = {f"good{index}": request for index, request in enumerate(asked())}
    bad = plant(world)
    order = [*requests, BAD]
    draw.shuffle(order)
    for name in order:
        world.submit(bad if name == BAD else requests[name], name, stream=draw.random() < 0.5)
        for _ in range(draw.choice([0, 0, 1, 3])):
            world.step()
    outputs = dict(world.run())
    for index, wanted in enumerate(expected):
        assert_same_bits(outputs[f"good{index}"], wanted, f"neighbour {index}, order {order}")
    return outputs[BAD]


# All faults in the companies that differ most, a part of them in each of the others.
_WHOLE = ("step by step", "plans ahead", "drafts, plans ahead")
CASES = [(fault, company) for company in _WHOLE for fault in FAULTS] + [
    (fault, company)
    for place, company in enumerate(name for name in COMPANIES if name not in _WHOLE)
    for fault in list(FAULTS)[place % 5 :: 5]
]


@pytest.mark.parametrize(("fault", "company"), CASES)
def test_request_when_anything_is_wrong_with_it_then_its_neighbours_get_what_they_get_alone(
    model: Path, expected: list[RequestOutput], fault: str, company: str
) -> None:
    plant, words = FAULTS[fault]
    world = World(model, **COMPANIES[company])
    try:
        output = run_beside(world, plant, expected, random.Random(f"{fault} {company}"))
    finally:
        world.close()
    (choice,) = output.outputs
    if words is not None:
        assert choice.finish_reason == "error"
        assert re.search(words, choice.error or ""), choice.error


@pytest.mark.parametrize("fault", ["id beyond the embedding", "NaN logits", "steering of another width"])
def test_request_when_it_fails_in_a_module_run_eagerly_then_its_neighbours_get_what_they_get_alone(
    model: Path, expected: list[RequestOutput], fault: str
) -> None:
    plant, words = FAULTS[fault]
    world = World(model, enforce_eager=True)
    try:
        output = run_beside(world, plant, expected, random.Random(fault))
    finally:
        world.close()
    assert re.search(words or "", output.outputs[0].error or "")


def test_companies_when_run_then_they_preempt_and_guess_as_their_names_say(
    model: Path, expected: list[RequestOutput]
) -> None:
    for company, settings in COMPANIES.items():
        world = World(model, **settings)
        try:
            run_beside(world, value(temperature=1e-45), expected, random.Random(company))
            records = world.engine.trace.records
        finally:
            world.close()
        assert any(record.preempted for record in records) == ("few blocks" in company)
        assert any(record.n_accepted_tokens for record in records) == ("drafts" in company)


# ---- errors that are nobody's ---------------------------------------------------------------------------------------------


def test_step_when_its_error_is_nobody_s_then_all_of_it_end_and_the_log_says_that_it_cannot_be_told(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(model)

    def fail(run: Any) -> Any:
        def failing(batch: Any, *more: Any) -> Any:
            raise NativeError("planted: internal error", -5)

        return failing

    patched(world.executor.runner.executable, "run", fail)
    for index, request in enumerate(asked()[:3]):
        world.submit(request, str(index))
    outputs = world.run()
    world.close()
    assert {output.outputs[0].error for output in outputs.values()} == {"planted: internal error"}
    assert (
        "step 0 failed as a whole; it cannot be told for which request, so all 3 of it end with an error" in caplog.text
    )


@pytest.mark.parametrize("place", ["token", "sequence"])
def test_error_of_the_core_when_its_index_is_no_place_of_the_batch_then_it_is_nobody_s(model: Path, place: Any) -> None:
    world = World(model)

    def fail(run: Any) -> Any:
        def failing(batch: Any, *more: Any) -> Any:
            raise NativeError("planted: beyond", -1, place, 10**6)

        return failing

    patched(world.executor.runner.executable, "run", fail)
    world.submit(asked()[0], "r")
    assert world.run()["r"].outputs[0].error == "planted: beyond"
    world.close()


def test_plan_ahead_when_the_one_before_failed_as_a_whole_then_who_came_with_it_is_not_hurt(
    model: Path, expected: list[RequestOutput]
) -> None:
    """The failed plan takes the whole budget; the next was made before its failure was known, and admits a neighbour."""
    world = World(model, async_scheduling=True, max_num_batched_tokens=8)

    def fail(execute: Any) -> Any:
        def failing(plan: Any) -> Any:
            if any(new.request_id == BAD for new in plan.new_requests):
                raise RuntimeError("planted: the executor is out")
            return execute(plan)

        return failing

    patched(world.executor, "execute", fail)
    world.submit(Asked(prompt_of(8, 70), PARAMS), BAD)
    world.submit(asked()[0], "good")
    outputs = world.run()
    world.close()
    assert outputs[BAD].outputs[0].error == "the step failed: RuntimeError: planted: the executor is out"
    assert_same_bits(outputs["good"], expected[0], "the neighbour")


def test_structure_that_is_code_when_a_trace_is_written_then_refused_by_name_and_nothing_of_it_is_queued(
    model: Path, expected: list[RequestOutput], tmp_path: Path
) -> None:
    world = World(model, trace_path=str(tmp_path / "trace.jsonl"))
    world.submit(asked()[0], "good")
    with pytest.raises(InvalidRequestError, match="structured_outputs is a FailingStructure, which is code"):
        world.submit(structure("nowhere")(world), BAD)
    assert world.engine.scheduler.num_waiting == 1
    assert_same_bits(world.run()["good"], expected[0], "the neighbour")
    world.close()


def test_request_when_its_output_cannot_be_begun_then_nothing_of_it_is_queued(
    model: Path, expected: list[RequestOutput]
) -> None:
    world = World(model)
    world.submit(asked()[0], "good")

    def fail(new_choice: Any) -> Any:
        def failing(*arguments: Any) -> Any:
            raise RuntimeError("planted: no detokeniser")

        return failing

    patched(world.engine.output, "new_choice", fail)
    with pytest.raises(RuntimeError, match="no detokeniser"):
        world.submit(asked()[1], BAD)
    assert world.engine.scheduler.num_waiting == 1
    assert_same_bits(world.run()["good"], expected[0], "the neighbour")
    world.close()
