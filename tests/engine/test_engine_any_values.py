"""Any request with any values: admission refuses it by name, or it runs; either way its neighbours get what they get alone."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from utils.neighbours import COMPANIES, NAN_TOKEN, VOCAB, Asked, World, alone, asked, assert_same_bits, build_model

from pellucid.api.hidden_states import CaptureParams, HiddenStatesParams, SteeringParams
from pellucid.api.outputs import RequestOutput
from pellucid.api.request_options import RequestOptions
from pellucid.api.sampling_params import SamplingParams
from pellucid.errors import InvalidRequestError
from pellucid.service.messages import Submit
from pellucid.service.wire import decode_command, encode

NUM_CASES = 40
FLOATS = [
    *(0.0, -0.0, 5e-324, 1e-320, 1e-300, 1e-46, 7e-46, 1e-45, 1e-40, 1.2e-38, 1e-30, 1e-7, 1e-6, 0.01, 0.5, 0.99999999),
    *(
        1.0,
        1.00000001,
        2.0,
        10.0,
        10.0000001,
        100.0,
        3.4e38,
        3.5e38,
        1e300,
        math.inf,
        math.nan,
        -1e-46,
        -1.0,
        -2.0,
        -1e300,
    ),
    *(np.float32(1e-45), np.float64(0.7), np.float16(6e-8), 10**400, True, None, "1", b"1", [], {}),
]
INTEGERS = [
    -(2**63),
    -2,
    -1,
    0,
    1,
    2,
    5,
    20,
    100,
    101,
    2**31 - 1,
    2**31,
    2**63,
    2**64,
    1.5,
    math.nan,
    True,
    None,
    "x",
    [],
]
IDS = [
    -(2**31),
    -1,
    0,
    1,
    2,
    5,
    NAN_TOKEN,
    VOCAB - 2,
    VOCAB,
    309,
    2**31 - 1,
    2**31,
    2**32 + 5,
    2**63,
    1.0,
    True,
    None,
    "5",
]
TEXTS = ["", "a", "the quick", "\0", "\ud800", "<x19>", "</s>", "x" * 3000, "é😀", 5, None]
_FLOAT_FIELDS = (
    *("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("temperature", "repetition_penalty"),
)
_INTEGER_FIELDS = ("top_k", "max_tokens", "min_tokens", "seed", "logprobs", "prompt_logprobs")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("any_values"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[RequestOutput]:
    return alone(model)


def ids(draw: random.Random, most: int) -> Any:
    kind = draw.random()
    if kind < 0.1:
        return draw.choice([None, 5, "ab", {5: 1}, [[5]]])
    pool = IDS if kind < 0.4 else range(3, VOCAB)
    return [draw.choice(pool) for _ in range(draw.randint(0, most))]


def values(draw: random.Random) -> dict[str, Any]:
    """Up to four fields of the sampling parameters, each with any value."""
    found: dict[str, Any] = {"max_tokens": draw.randint(1, 14), "seed": 5}
    for _ in range(draw.randint(0, 3)):
        found[draw.choice(_FLOAT_FIELDS)] = draw.choice(FLOATS)
    if draw.random() < 0.4:
        found[draw.choice(_INTEGER_FIELDS)] = draw.choice(INTEGERS)
    if draw.random() < 0.3:
        found["logit_bias"] = {draw.choice(IDS): draw.choice(FLOATS) for _ in range(3)}  # type: ignore[misc]
    if draw.random() < 0.3:
        found[draw.choice(["stop_token_ids", "allowed_token_ids"])] = ids(draw, 4)
    if draw.random() < 0.3:
        found[draw.choice(["stop", "bad_words"])] = [draw.choice(TEXTS) for _ in range(draw.randint(0, 2))]
    if draw.random() < 0.3:
        found[draw.choice(["ignore_eos", "skip_special_tokens", "include_stop_str_in_output"])] = draw.choice(
            [True, None]
        )
    if draw.random() < 0.2:
        found["n"] = draw.choice([0, 1, 2, 3, 129, -1, "2", 1.0])
    if draw.random() < 0.2:
        found["structured_outputs"] = {"choice": [draw.choice(TEXTS) for _ in range(2)]}
    return found


def taken(name: str, value: Any) -> bool:
    try:
        SamplingParams(**{"max_tokens": None, name: value})
        return True
    except InvalidRequestError:
        return False


def params_of(draw: random.Random) -> SamplingParams:
    """Any values; most of the time only those that are taken by themselves, so that something runs."""
    found = values(draw)
    if draw.random() < 0.8:
        found = {name: value for name, value in found.items() if taken(name, value)}
    return SamplingParams(**found)


def prompt_of(draw: random.Random) -> Any:
    if draw.random() < 0.7:
        return draw.choice(["a", "the quick", [5, 6, 7], [draw.randrange(3, VOCAB) for _ in range(30)], [7, NAN_TOKEN]])
    return draw.choice(TEXTS) if draw.random() < 0.5 else ids(draw, 30)


def options(draw: random.Random) -> RequestOptions:
    """Any rows, names and vectors."""
    found: dict[str, Any] = {}
    if draw.random() < 0.2:
        found["priority"] = draw.choice(INTEGERS)
    if draw.random() < 0.2:
        found["cache_salt"] = draw.choice(TEXTS)
    if draw.random() < 0.3:
        found["hidden_states"] = HiddenStatesParams.from_request(
            True, draw.choice([None, [0], [-1, 3], [10**6], [-1.0], []]), draw.choice([None, [0, -1], [1], [9], ["1"]])
        )
    if draw.random() < 0.2:
        found["capture"] = CaptureParams.from_request(draw.choice([["layers.*"], ["layers.0.mlp"], ["x"], [], "norm"]))
    if draw.random() < 0.3:
        vector = (
            [draw.choice(FLOATS) for _ in range(64)] if draw.random() < 0.3 else [draw.choice([0.1, 3e38, -1e20])] * 64
        )
        found["steering"] = SteeringParams.from_request({draw.choice(["layers.0", "layers.1.mlp", "x"]): vector})
    return RequestOptions(**found)


def submit_any(world: World, draw: random.Random) -> str | None:
    """The id of what was admitted; None: it was refused, and nothing is left of it."""
    known = set(world.engine.output.requests)
    try:
        about = options(draw) if draw.random() < 0.4 else RequestOptions()
        request = Asked(prompt_of(draw), params_of(draw), about)
        request_id = world.submit(request, "any")
        ids = world.engine.output.requests[request_id].prompt_token_ids
        sent = encode(Submit(1, request_id, ids, request.params, None, about))
        assert decode_command(sent) is not None, "an engine in a process of its own could not read it"
        return request_id
    except InvalidRequestError:
        assert set(world.engine.output.requests) == known
        return None


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("company", ["step by step", "plans ahead", "drafts", "slots", "few blocks, plans ahead"])
def test_request_when_its_values_are_any_then_refused_or_run_and_its_neighbours_get_what_they_get_alone(
    model: Path, expected: list[RequestOutput], company: str
) -> None:
    requests, world, endings = asked(), World(model, **COMPANIES[company]), list[str | None]()
    try:
        for case in range(NUM_CASES):
            draw = random.Random(f"{company} {case}")
            chosen = draw.sample(range(len(requests)), 3)
            for index in chosen:
                world.submit(requests[index], f"good{index}")
            for _ in range(draw.choice([0, 2, 4])):
                world.step()
            admitted = submit_any(world, draw)
            outputs = world.run()
            for index in chosen:
                assert_same_bits(outputs[f"good{index}"], expected[index], f"neighbour {index} in case {case}")
            endings.append(None if admitted is None else outputs["any"]["finish_reason"])
            outputs.clear()
    finally:
        world.close()
    assert endings.count(None) >= NUM_CASES // 5
    assert len(endings) - endings.count(None) >= NUM_CASES // 5


def test_fields_of_the_parameters_when_counted_then_any_values_are_tried_for_all_of_them() -> None:
    tried = {name for case in range(2000) for name in values(random.Random(case))}
    assert tried == {field.name for field in dataclasses.fields(SamplingParams)}
