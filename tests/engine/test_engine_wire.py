"""Messages between a front end and an engine's owner: each comes back from bytes as it was, and nothing else does."""

from __future__ import annotations

import dataclasses
import random
from typing import Any, get_args

import numpy as np
import pytest

from pellucid import errors
from pellucid.api.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, StreamChunk
from pellucid.api.request_options import RequestOptions
from pellucid.api.sampling_params import MAX_SEED, MIN_SEED, SamplingParams
from pellucid.config import EngineConfig
from pellucid.contract.executor import KVCacheSize
from pellucid.contract.facts import ContractDigest, ModelFacts
from pellucid.contract.plan import WaitingReasons
from pellucid.engine.metrics import EngineMetrics, EngineStats
from pellucid.service.messages import (
    AbortAll,
    Cancel,
    Command,
    Died,
    Done,
    ErrorInfo,
    Event,
    Loaded,
    LoadFailed,
    LoadProgress,
    News,
    ReadStats,
    ReadSteps,
    Refusal,
    Refused,
    ResetPrefixCache,
    Shutdown,
    Start,
    Stats,
    Steps,
    Submit,
)
from pellucid.service.wire import CoreStart, decode_command, decode_events, decode_start, encode
from pellucid.trace.records import StepRecord

PARAMS = SamplingParams(
    n=2,
    max_tokens=None,
    temperature=0.1,
    seed=MAX_SEED,
    stop=["é", "\x00"],
    stop_token_ids=[3],
    logit_bias={5: -1.5},
    bad_words=["no"],
    allowed_token_ids=[1, 2],
    logprobs=0,
)
ENTRY = {7: Logprob(-0.1, 1, "a"), 8: Logprob(float("-inf"), 2, None)}
OUTPUT = RequestOutput(
    "x",
    "text",
    [1, 2],
    [
        CompletionOutput(0, "\U0001f600", [7], -0.1, [ENTRY], "stop", "a stop", 3),
        CompletionOutput(1, "", [], None, None, "error", 5, None, "why"),
    ],
    True,
    "finished_stopped",
    [None, ENTRY],
    1,
    RequestMetrics(0.1, 0.2, 0.3, 4, 0.1, 0.1),
)
RECORD = StepRecord(1, "mixed", tokens={"a": 3}, waiting=["b", "c"], waiting_reasons={"b": "full", "c": "behind"})
ERROR = ErrorInfo("InvalidRequestError", "no", Refusal("stop[1]", [(True, "stop[1]"), (False, " is")], "5", "no"))
FACTS = ModelFacts(
    *("m", "llama", "float32", 1, 2, 3, 4, (5,), {"top_p": 0.5, "eos_token_id": [1, 2]}, {"layers.0": 2}, {}, "f"),
    ContractDigest(1, "avx2", "w", ("float32",), "int8", "r"),
    num_threads=2,
    tokenizer=memoryview(b'{"format": 1}'),
)
COMMANDS: list[Command] = [
    Submit(1, "x", [1, 2], PARAMS, "text", RequestOptions(-5, "salt"), False),
    Submit(2, "x", [1], SamplingParams(seed=MIN_SEED)),
    Cancel(2, "x"),
    AbortAll(3),
    ReadStats(4),
    ReadSteps(5, -1, 10),
    ResetPrefixCache(6),
    Shutdown(),
]
EVENTS: list[Event] = [
    LoadProgress(1, 2),
    Loaded(FACTS, KVCacheSize(7, 6, 8, 9)),
    LoadFailed(ERROR),
    Done(1, 0),
    Refused(1, ERROR),
    Stats(1, EngineStats(1, 2, {"a": 1}, {"usage": 0.5, "used_blocks": 3}, finished={"stop": 1})),
    Stats(
        2,
        EngineStats(histograms={name: histogram.stats() for name, histogram in EngineMetrics().histograms.items()}),
    ),
    Steps(1, [RECORD, StepRecord(2, "none")]),
    News(
        [StreamChunk("x", 0, "é", [1], [ENTRY], "stop", 5, "why"), StreamChunk("y", 1, "", [])],
        [OUTPUT],
        {"x": "running"},
    ),
    Died(ERROR),
]


def test_messages_when_listed_here_then_none_is_missing() -> None:
    assert {type(command) for command in COMMANDS} == set(get_args(Command))
    assert {type(event) for event in EVENTS} == set(get_args(Event))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: type(command).__name__)
def test_command_when_sent_then_it_comes_back_equal_and_of_the_same_types(command: Command) -> None:
    back = decode_command(encode(command))
    assert back == command
    assert repr(back) == repr(command)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_event_when_sent_then_it_comes_back_equal_and_of_the_same_types(event: Event) -> None:
    (back,) = decode_events(encode([event]))
    assert back == event
    assert repr(back) == repr(event)


def test_reasons_of_a_plan_when_sent_then_they_come_back_as_a_plain_mapping() -> None:
    record = dataclasses.replace(RECORD, waiting_reasons=WaitingReasons(("b", "c"), "full"))
    (back,) = decode_events(encode([Steps(1, [record])]))
    assert isinstance(back, Steps)
    assert dict(back.records[0].waiting_reasons) == dict(record.waiting_reasons)


def test_texts_and_numbers_of_classes_of_their_own_when_sent_then_they_come_back_plain() -> None:
    class Id(int):
        pass

    params = SamplingParams(max_tokens=2, stop=np.str_("é"), temperature=np.float64(0.5))
    sent = Submit(1, np.str_("x"), [Id(5)], params, np.str_("é"), RequestOptions(cache_salt=np.str_("s")))
    got = decode_command(encode(sent))
    assert isinstance(got, Submit)
    assert got == sent
    plain = (got.request_id, got.prompt, *got.prompt_token_ids, *got.params.stop, got.options.cache_salt)
    assert [type(value) for value in plain] == [str, str, int, str, str]


def test_start_when_sent_then_the_config_comes_back_checked() -> None:
    start = CoreStart(Start(EngineConfig("m", num_blocks=3, kv_layout="slot"), 7), "/folder", 5)
    assert decode_start(encode(start)) == start
    with pytest.raises(ValueError, match="block_size is 0"):
        decode_start(encode(start).replace(b"block_size\x01", b"block_size\x00"))


def test_frames_when_cut_or_changed_anywhere_then_the_decoder_never_raises() -> None:
    rng = random.Random(1)
    for frame, decode in [(encode(COMMANDS[0]), decode_command), (encode(EVENTS), decode_events)]:
        for size in range(len(frame)):
            assert not decode(frame[:size])
        for _ in range(2000):
            changed = bytearray(frame)
            for _ in range(rng.choice([1, 1, 3])):
                changed[rng.randrange(len(frame))] = rng.randrange(256)
            decode(bytes(changed))


_KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PellucidError)]
_MORE: dict[type, tuple[Any, ...]] = {
    errors.InvalidRequestError: (("why",),),
    errors.QueueFullError: (2.5,),
    errors.NativeError: (-3,),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_error_when_sent_then_it_is_of_its_class_again_with_all_that_it_says(kind: type[errors.PellucidError]) -> None:
    error = kind("why", *_MORE.get(kind, ()))
    back = ErrorInfo.of(error).to_error()
    assert type(back) is kind
    assert str(back) == "why"
    assert vars(back) == vars(error)


def test_error_of_somebody_else_when_sent_then_its_class_is_named() -> None:
    assert str(ErrorInfo.of(ZeroDivisionError("by 0")).to_error()) == "ZeroDivisionError: by 0"
    assert str(ErrorInfo.of(SystemExit()).to_error()) == "SystemExit"
