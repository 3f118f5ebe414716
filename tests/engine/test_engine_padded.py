"""Policy `padded`: tables of steps, worlds of requests, refusals; and the tokens of `mixed`, whatever is accounted for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from utils.async_engines import owner_of
from utils.scheduler_world import EOS, World, make_request
from utils.step_tables import prompt_of, row_of, world
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams
from pellucid.api.outputs import RequestOutput
from pellucid.config import EngineConfig
from pellucid.contract.executor import KVCacheSize
from pellucid.contract.facts import ContractDigest, ModelFacts
from pellucid.contract.plan import ModelRunnerOutput
from pellucid.engine.admission import RequestChecker
from pellucid.errors import ConfigError, InvalidRequestError, InvariantError
from pellucid.scheduling.config import DraftConfig, SchedulerConfig
from pellucid.scheduling.padded import PaddedBatch
from pellucid.scheduling.policies import policy_of
from pellucid.scheduling.request import RequestStatus
from pellucid.service.async_engine import AsyncLLMEngine
from pellucid.testing import check_step_table, load_step_table

pytestmark = pytest.mark.padded
TABLES = {path.stem: load_step_table(path) for path in sorted((Path(__file__).parent / "padded_steps").glob("*.json"))}
BEHIND = "head of the queue waits"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("padded"), "llama", num_hidden_layers=2)


@contextmanager
def padded_llm(model: Path, **settings: Any) -> Iterator[LLM]:
    options = {
        "policy": "padded",
        "max_num_seqs": 2,
        "max_model_len": 192,
        "num_blocks": 8,
        "num_threads": 1,
        **settings,
    }
    with LLM(model, **options) as llm:
        yield llm


def tokens_of(output: RequestOutput) -> torch.Tensor:
    return torch.tensor(output.outputs[0].token_ids)


# ---- tables ------------------------------------------------------------------------------------------------


def test_tables_when_counted_then_none_is_missing() -> None:
    assert len(TABLES) == 7


@pytest.mark.parametrize("name", list(TABLES))
def test_padded_when_a_scenario_runs_then_every_step_is_as_in_its_table_and_tokens_are_those_of_mixed(
    model: Path, name: str
) -> None:
    table = TABLES[name]
    with LLM(model, num_threads=1, **table.engine) as llm:
        padded = check_step_table(llm.engine, table)
        records = llm.engine.trace.records
    for record in records:
        assert record.n_free_blocks == table.engine["num_blocks"] - record.n_reserved_blocks
    first, last = records[0], records[-1]
    assert (first.kind, first.running) == ("prefill", ["0"])
    assert (last.kind, last.tkv, last.n_reserved_blocks, last.n_used_blocks) == ("none", 0, 0, 0)
    for expected in table.rows[1:]:
        record = records[expected.after - 1]
        assert record.running == expected.values["running"]
    with LLM(model, num_threads=1, policy="mixed", max_model_len=table.engine["max_model_len"]) as llm:
        params = [request.sampling_params() for request in table.requests]
        prompts = [padded[request.request_id].prompt_token_ids for request in table.requests]
        mixed = llm.generate(prompts, params)
    for request, output in zip(table.requests, mixed, strict=True):
        assert len(output["token_ids"]) == request.max_tokens
        assert torch.equal(tokens_of(padded[request.request_id]), tokens_of(output))


def test_padded_when_the_volume_is_one_too_large_then_the_second_waits_and_says_why() -> None:
    """Final lengths of 129 make 258; at a limit of 257 the second starts a batch of its own."""
    config = SchedulerConfig(2, 512, 192, "padded", max_batch_tkv_limit=257)
    a_world = World(config, 8, 64, caching=False)
    a_world.add(make_request("0", prompt_of(0, 64), max_tokens=2))
    a_world.add(make_request("1", prompt_of(100, 65), max_tokens=2))
    assert row_of(a_world.step())[3] == {"1": "one prompt a step"}
    reason = "max_batch_tkv_limit 257: the batch would come to 258 from tkv 128"
    assert row_of(a_world.step()) == ("decode", {"0": (64, 1)}, [], {"1": reason})
    assert row_of(a_world.step())[0] == "prefill"
    assert a_world.scheduler.account.tkv == 128
    a_world.drain(5)
    a_world.check_end()


def test_padded_when_blocks_are_reserved_then_the_next_two_wait_until_they_are_freed() -> None:
    """4 blocks, 2 for each of four requests: two pairs, one behind the other."""
    a_world = World(SchedulerConfig(4, 512, 128, "padded"), 4, 64, caching=False)
    for index in range(4):
        a_world.add(make_request(str(index), prompt_of(100 * index, 10), max_tokens=3))
    rows = [row_of(a_world.step()) for _ in range(4)]
    short = {"2": "no free blocks: needs 2, 0 free", "3": BEHIND}
    assert [row[0] for row in rows] == ["prefill", "prefill", "decode", "decode"]
    assert rows[2][3] == rows[3][3] == short
    assert list(rows[2][1]) == ["1", "0"], "the newest stands first"
    assert row_of(a_world.step())[1] == {"2": (0, 10)}
    a_world.drain(5)
    a_world.check_end()


def test_padded_when_joining_would_push_a_running_request_too_far_then_the_reason_has_the_numbers() -> None:
    a_world = World(SchedulerConfig(2, 512, 192, "padded"), 8, 64, caching=False)
    a_world.add(make_request("0", prompt_of(0, 49), max_tokens=67))
    a_world.add(make_request("1", prompt_of(100, 70), max_tokens=50))
    a_world.step()
    reason = "max_model_len 192: the batch would come to 195 from tkv 128"
    assert row_of(a_world.step())[3] == {"1": reason}


@pytest.mark.parametrize(("limit", "joins"), [(40, True), (39, False)])
def test_padded_when_three_end_one_after_the_other_then_the_largest_volume_on_the_way_counts(
    limit: int, joins: bool
) -> None:
    """Final lengths 10, 20 and 21: 3 x 10 until the first ends, then 2 x 20."""
    a_world = World(SchedulerConfig(3, 64, 48, "padded", max_batch_tkv_limit=limit), 32, 4, caching=False)
    for name, max_tokens in (("a", 7), ("b", 17), ("c", 18)):
        a_world.add(make_request(name, prompt_of(100 * ord(name), 4), max_tokens))
    plans = [a_world.step() for _ in range(3)]
    assert plans[2].kind == ("prefill" if joins else "decode")
    reason = {"c": "max_batch_tkv_limit 39: the batch would come to 40 from tkv 4"}
    assert plans[2].waiting == ({} if joins else reason)


def test_padded_when_a_running_request_goes_to_the_very_end_then_one_that_moves_nothing_may_join() -> None:
    """49 tokens, padded to 64, and 129 more but one: just max_model_len 192. The next prompt needs no shift."""
    a_world = World(SchedulerConfig(2, 512, 192, "padded"), 8, 64, caching=False)
    a_world.add(make_request("0", prompt_of(0, 49), max_tokens=129))
    a_world.add(make_request("1", prompt_of(100, 20), max_tokens=3))
    assert [next(iter(a_world.step().entries)).request_id for _ in range(2)] == ["0", "1"]
    a_world.drain(200)
    a_world.check_end()


def test_padded_when_a_running_request_is_cancelled_then_its_blocks_count_until_the_next_step() -> None:
    a_world = world("padded", num_blocks=8, block_size=4, max_num_seqs=2)
    a_world.add(make_request("a", prompt_of(10, 3), max_tokens=6))
    a_world.add(make_request("b", prompt_of(20, 3), max_tokens=6))
    a_world.step()
    a_world.step()
    padded = a_world.scheduler.account
    assert padded is not None
    assert padded.n_reserved_blocks == 6
    a_world.cancel("a")
    assert padded.n_reserved_blocks == 6
    a_world.step()
    assert padded.n_reserved_blocks == 3
    a_world.drain(10)
    a_world.check_end()
    assert not padded.is_open


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "prompt", "max_tokens", "message"),
    [
        ({}, 70, 66, "prompt of 70 tokens, padded to 128, with max_tokens 66 comes to 193; max_model_len is 192"),
        (
            {"num_blocks": 2},
            70,
            2,
            "prompt of 70 tokens, padded to 128, with max_tokens 2 needs 3 blocks of 64 tokens; 2 exist",
        ),
        (
            {"max_batch_tkv_limit": 128},
            70,
            2,
            "prompt of 70 tokens, padded to 128, with max_tokens 2 comes to 129; max_batch_tkv_limit is 128",
        ),
        (
            {"max_num_batched_tokens": 64},
            65,
            2,
            "policy padded computes whole prompts and max_num_batched_tokens is 64",
        ),
    ],
)
def test_padded_when_a_request_can_never_run_then_it_is_refused_with_the_numbers(
    model: Path, options: dict[str, int], prompt: int, max_tokens: int, message: str
) -> None:
    with padded_llm(model, **options) as llm:
        with pytest.raises(InvalidRequestError, match=re.escape(message)):
            llm.generate([[5] * prompt], SamplingParams(max_tokens=max_tokens))
        fits = SamplingParams(max_tokens=1, temperature=0)
        assert len(llm.generate([[5] * 60], fits)[0]["token_ids"]) == 1, "the engine goes on"


def said(call: Callable[[], object]) -> tuple[str, str | None]:
    try:
        call()
    except InvalidRequestError as error:
        return str(error), error.param
    return "", None


@settings(max_examples=300, deadline=None)
@given(
    policy=st.sampled_from(["mixed", "prefill_first", "padded"]),
    num_blocks=st.integers(1, 6),
    max_model_len=st.integers(2, 300),
    tkv_limit=st.none() | st.integers(1, 400),
    num_batched=st.integers(1, 200),
    num_prompt=st.integers(0, 310),
    asked=st.none() | st.integers(1, 310),
)
def test_checker_and_scheduler_when_asked_the_same_then_they_say_the_same(
    policy: Any,
    num_blocks: int,
    max_model_len: int,
    tkv_limit: int | None,
    num_batched: int,
    num_prompt: int,
    asked: int | None,
) -> None:
    """And all that they let in comes to its end alone, within what its blocks, its length and its batch may be."""
    tkv_limit = tkv_limit if policy == "padded" else None
    config = EngineConfig(
        "m", policy=policy, max_num_seqs=1, max_num_batched_tokens=num_batched, max_batch_tkv_limit=tkv_limit
    )
    facts = ModelFacts(
        *("m", "llama", "float32", 1000, 2, 3, max_model_len, (EOS,), {}, {}, {}, "f"),
        ContractDigest(1, "avx2", "w", ("float32",), "int8", "r"),
        num_threads=1,
    )
    checker = RequestChecker.of(config, facts, KVCacheSize(num_blocks, 64, 1, 1), None)
    limits = SchedulerConfig(1, num_batched, max_model_len, policy, max_batch_tkv_limit=tkv_limit)
    a_world = World(limits, num_blocks, 64, caching=False)
    params = SamplingParams(max_tokens=asked)
    max_tokens = checker.max_tokens(num_prompt, params)
    found = said(lambda: checker.check(prompt_of(3, num_prompt), params))
    request = replace(make_request("a", prompt_of(3, num_prompt), max_tokens=1), max_tokens=max_tokens)
    assert said(lambda: a_world.scheduler.add(request)) == found
    if policy == "padded" and asked is None and not found[0]:
        more = SamplingParams(max_tokens=max_tokens + 1)
        assert said(lambda: checker.check(prompt_of(3, num_prompt), more))[0], (
            "without max_tokens it gets all there is room for"
        )
    if policy == "padded" and not found[0]:
        most, length = a_world.scheduler.account, 0
        for _ in range(max_tokens + 3):
            a_world.scheduler.check_invariants()
            plan = a_world.scheduler.schedule()
            tokens = {entry.request_id: 5 for entry in plan.entries if entry.samples}
            a_world.scheduler.apply(plan, ModelRunnerOutput(tokens))
            length = max(length, most.tkv)
        assert not a_world.scheduler.has_unfinished
        assert length == -(-num_prompt // 64) * 64 + max_tokens - 1


def test_padded_without_max_tokens_when_blocks_are_few_then_it_gets_what_they_hold(model: Path) -> None:
    params = SamplingParams(max_tokens=None, ignore_eos=True, temperature=0)
    with padded_llm(model, num_blocks=2) as llm:
        (output,) = llm.generate([[5] * 10], params)
    assert len(output["token_ids"]) == 128 - 64 + 1


def test_padded_without_max_tokens_when_a_prompt_runs_then_it_gets_what_the_padded_length_leaves(model: Path) -> None:
    params = SamplingParams(max_tokens=None, ignore_eos=True, temperature=0)
    with padded_llm(model) as llm:
        (output,) = llm.generate([[5] * 70], params)
        records = llm.engine.trace.records
    assert len(output["token_ids"]) == 192 - 128 + 1
    assert max(record.tkv for record in records) == 192
    assert max(record.n_used_blocks for record in records) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_layout": "slot"}, "kv_layout is 'slot'; policy 'padded' counts blocks of 64 tokens"),
        ({"speculative_method": "ngram"}, "speculative_method is 'ngram'; policy 'padded' computes exactly one token"),
        ({"async_scheduling": True}, "async_scheduling is True; policy 'padded' plans a step by what ended"),
        ({"block_size": 32}, "block_size is 32; with policy 'padded' it is 64"),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 7}, "max_num_seqs is 8; .* at most max_num_batched_tokens, 7"),
        ({"max_batch_tkv_limit": 0}, "max_batch_tkv_limit is 0; it must be an integer from 1"),
        (
            {"policy": "mixed", "max_batch_tkv_limit": 9},
            "max_batch_tkv_limit is 9; policy 'mixed' has no common length",
        ),
    ],
)
def test_padded_beside_what_makes_no_sense_when_configured_then_it_is_refused_by_name(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**{"policy": "padded", **options})


def test_padded_when_configured_then_blocks_have_64_tokens_said_or_not() -> None:
    assert EngineConfig(policy="padded").block_size == EngineConfig(policy="padded", block_size=64).block_size == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_prefill_chunk": 4}, "max_prefill_chunk 4: padded computes whole prompts"),
        ({"async_scheduling": True}, "padded plans step by step"),
        ({"drafts": DraftConfig(1, 1, 1, 1)}, "padded plans step by step"),
        ({"max_num_seqs": 9}, "max_num_seqs is 9; padded decodes all"),
    ],
)
def test_padded_scheduler_when_its_limits_contradict_it_then_it_is_refused(
    options: dict[str, Any], message: str
) -> None:
    fields = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 16, "policy": "padded", **options}
    with pytest.raises(ConfigError, match=message):
        policy_of(SchedulerConfig(**fields))


def test_padded_when_a_plan_is_asked_for_before_the_last_was_applied_then_it_is_an_error() -> None:
    scheduler = world("padded").scheduler
    scheduler.add(make_request("a", 3))
    scheduler.schedule()
    with pytest.raises(InvariantError, match="step by step"):
        scheduler.schedule()


# ---- the same bits -----------------------------------------------------------------------------------------


PROMPTS = [[7, 8, 9] * 30, [7, 8, 9] * 30, [5], list(range(20, 84)), list(range(20, 85)), [3] * 17]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=20, logprobs=2),
    SamplingParams(temperature=1, seed=3, max_tokens=30, n=3, logprobs=0),
    SamplingParams(temperature=0.7, seed=4, max_tokens=9, stop="e"),
    SamplingParams(temperature=0, max_tokens=40, prompt_logprobs=1),
    SamplingParams(temperature=1, seed=5, max_tokens=1),
    SamplingParams(temperature=0, max_tokens=25, ignore_eos=True),
]


def everything(outputs: list[RequestOutput]) -> list[object]:
    return [
        (choice.token_ids, choice.text, choice.logprobs, choice.finish_reason, output.prompt_logprobs)
        for output in outputs
        for choice in output.outputs
    ]


@pytest.mark.parametrize("caching", [False, True])
def test_padded_when_requests_of_all_kinds_run_then_outputs_are_those_of_mixed(model: Path, caching: bool) -> None:
    with LLM(model, num_threads=1, max_model_len=192, enable_prefix_caching=caching) as llm:
        expected = everything(llm.generate(PROMPTS, PARAMS))
    with padded_llm(model, max_num_seqs=4, num_blocks=9, enable_prefix_caching=caching) as llm:
        assert everything(llm.generate(PROMPTS, PARAMS)) == expected
        records = llm.engine.trace.records
        assert llm.kv_cache_stats()["used_blocks"] == 0
        if caching:
            assert everything(llm.generate(PROMPTS, PARAMS)) == expected
            assert any(record.n_prefix_hits for record in llm.engine.trace.records[len(records) :])
    assert {record.kind for record in records} == {"prefill", "decode", "none"}
    assert all(len(record.tokens) == 1 for record in records if record.kind == "prefill")
    assert not any(record.preempted for record in records)
    assert (records[-1].kind, records[-1].tkv, records[-1].n_reserved_blocks) == ("none", 0, 0)


@pytest.mark.asyncio
@pytest.mark.parametrize("engine_process", [False, True])
async def test_padded_behind_the_asynchronous_engine_when_it_runs_then_tokens_are_those_of_mixed(
    model: Path, engine_process: bool
) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(model, num_threads=1, max_model_len=192) as llm:
        expected = [output["token_ids"] for output in llm.generate(PROMPTS, params)]
    config = EngineConfig(str(model), policy="padded", max_num_seqs=2, max_model_len=192, num_blocks=8, num_threads=1)
    engine = AsyncLLMEngine.start(config, engine_process=engine_process)
    try:
        ids = [await engine.submit(prompt, params) for prompt in PROMPTS]
        outputs = [await engine.wait(request_id) for request_id in ids]
        with pytest.raises(InvalidRequestError, match="comes to 193; max_model_len is 192"):
            await engine.submit([5] * 70, SamplingParams(max_tokens=66))
        steps = await engine.steps()
    finally:
        engine.close()
    assert [output["token_ids"] for output in outputs] == expected
    assert steps[0].tkv == 128


def test_padded_when_asked_by_the_front_end_or_the_engine_then_one_rule_admits(model: Path) -> None:
    config = EngineConfig(str(model), policy="padded", max_num_seqs=2, max_model_len=192, num_blocks=8, num_threads=1)
    engine = AsyncLLMEngine.start(config)
    try:
        owned = owner_of(engine).engine.checker
        assert engine._checker == owned
        assert owned.max_tokens(70, SamplingParams(max_tokens=None)) == 192 - 128 + 1
    finally:
        engine.close()


# ---- worlds ------------------------------------------------------------------------------------------------


class PaddedWorld(World):
    """A world in which padding is accounted for: what must hold behind every step."""

    @property
    def padded(self) -> PaddedBatch:
        assert isinstance(self.scheduler.account, PaddedBatch)
        return self.scheduler.account

    def check(self) -> None:
        super().check()
        padded = self.padded
        assert 0 <= padded.n_used_blocks <= padded.n_reserved_blocks <= self.num_blocks
        assert padded.tkv <= self.config.max_model_len

    def step(self) -> Any:
        waited = [request.request_id for request in self.scheduler.waiting]
        plan = super().step()
        assert not plan.preempted
        assert len(plan.new_requests) <= 1
        if plan.kind == "prefill":
            (entry,) = plan.entries
            assert entry.request_id == waited[0], "the head alone comes in"
            assert entry.samples
        for name, sequence in self.padded._sequences.items():
            request = self.records[name]
            is_full = request.num_output_tokens == self.cores[name].max_tokens
            if request.status is RequestStatus.FINISHED_LENGTH and is_full:
                assert sequence.n_used == sequence.n_reserved, "what was reserved was needed"
        return plan


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 24),  # prompt
        st.integers(1, 20),  # max_tokens
        st.integers(0, 30),  # submitted after so many steps
        st.sampled_from([None, None, None, 1, 5, 20]),  # cancelled so many steps later
        st.booleans(),  # may end early
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=400, derandomize=True)
@given(
    requests=REQUESTS,
    block_size=st.integers(1, 6),
    num_blocks=st.integers(2, 16),
    max_num_seqs=st.integers(1, 5),
    max_model_len=st.integers(8, 48),
    tkv_limit=st.none() | st.integers(8, 120),
    caching=st.booleans(),
)
@pytest.mark.slow
def test_padded_world_when_requests_come_and_go_then_reservations_hold_and_nobody_starves(
    requests: list[tuple[int, int, int, int | None, bool]],
    block_size: int,
    num_blocks: int,
    max_num_seqs: int,
    max_model_len: int,
    tkv_limit: int | None,
    caching: bool,
) -> None:
    config = SchedulerConfig(max_num_seqs, 64, max_model_len, "padded", max_batch_tkv_limit=tkv_limit)
    a_world = PaddedWorld(config, num_blocks, block_size, caching)
    taken: dict[str, int | None] = {}
    for after in range(51):
        for index, (prompt, max_tokens, at, cancel_after, may_stop) in enumerate(requests):
            name = str(index)
            if at == after:
                eos = (EOS,) if may_stop else ()
                try:
                    a_world.add(make_request(name, (index % 3,) * prompt, max_tokens, eos=eos, seed=index))
                except InvalidRequestError:
                    continue
                taken[name] = cancel_after
            if name in taken and taken[name] is not None and at + (taken[name] or 0) == after:
                a_world.cancel(name)
        a_world.step()
    a_world.drain(max_steps=sum(1 + max_tokens for _, max_tokens, *_ in requests))
    ended = not a_world.scheduler.has_unfinished
    a_world.check_end()  # with the empty step behind the last one
    assert ended
    assert not a_world.padded.is_open
    assert (a_world.padded.tkv, a_world.padded.n_reserved_blocks, a_world.padded.n_used_blocks) == (0, 0, 0)


def test_padded_worlds_when_counted_then_they_shift_reduce_and_wait_for_every_reason() -> None:
    """What the random worlds above would be worthless without."""
    a_world = PaddedWorld(SchedulerConfig(3, 64, 24, "padded", max_batch_tkv_limit=40), 9, 4, caching=False)
    for index, (prompt, max_tokens) in enumerate([(3, 9), (9, 6), (2, 4), (14, 2), (1, 12), (7, 3), (5, 8), (11, 7)]):
        a_world.add(make_request(str(index), (index % 3,) * prompt, max_tokens, seed=index))
    reasons, tkvs = set(), [0]
    while a_world.scheduler.has_unfinished:
        plan = a_world.step()
        reasons |= {reason.partition(" ")[0] for reason in plan.waiting.values()}
        tkvs.append(a_world.padded.tkv)
    a_world.check_end()
    jumps = [after - before for before, after in itertools.pairwise(tkvs)]
    assert any(jump > 1 for jump in jumps[1:])
    assert any(jump < 0 for jump in jumps)
    assert reasons >= {"max_model_len", "max_batch_tkv_limit", "no", "one", "head"}
