"""Steering: a vector added to an activation of one request, and not a bit of its neighbours' changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams
from pellucid.api.hidden_states import CaptureParams, SteeringParams
from pellucid.api.request_options import RequestOptions
from pellucid.errors import InvalidRequestError

BASE: dict[str, Any] = {
    "max_num_seqs": 16,
    "num_blocks": 256,
    "max_model_len": 256,
    "enable_prefix_caching": False,
    "num_threads": 2,
    "dtype": "float32",
}
NUM_TOKENS, WIDTH = 10, 64
LENGTHS = (1, 5, 16, 17, 33, 48, 64, 90)
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def llm(model: str) -> Any:
    with LLM(model, **BASE) as opened:
        yield opened


def vector(seed: int, scale: float = 1.0) -> list[float]:
    return (scale * torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))).tolist()


def prompts() -> list[list[int]]:
    """All begin alike, so that a prefix cache could mix them up."""
    tokens = torch.randint(3, 280, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    return [tokens[:length] for length in LENGTHS]


STEERING = {"layers.0": vector(1), "layers.1.mlp": vector(2), "layers.2.self_attn": vector(3, 0.5)}


@pytest.mark.parametrize("name", ["embed_tokens", "layers.0", "layers.1.mlp", "norm"])
def test_vector_when_added_then_the_activation_is_the_sum_and_the_answer_another(llm: LLM, name: str) -> None:
    prompt, added = prompts()[5], vector(7, 3.0)
    plain = llm.generate([prompt], GREEDY, capture=[name])[0].outputs[0]
    steered = llm.generate([prompt], GREEDY, capture=[name], steering={name: added})[0].outputs[0]
    assert steered.token_ids != plain.token_ids
    rows = len(prompt)  # those of the prompt have the same inputs
    before, after = plain.captured[name][:rows], steered.captured[name][:rows]  # type: ignore[index]
    if name in ("embed_tokens", "layers.1.mlp", "norm"):
        first = (
            before if name == "embed_tokens" else before[:1]
        )  # what comes before the first layer, or reads no others
        assert torch.equal(after[: len(first)], first + torch.tensor(added))
    else:
        torch.testing.assert_close(after[:1], before[:1] + torch.tensor(added), atol=1e-4, rtol=1e-4)


def test_nothing_when_added_then_the_same_bits(llm: LLM) -> None:
    for steering in ({"layers.1": [0.0] * WIDTH}, {"layers.1": [-0.0] * WIDTH}):
        plain = llm.generate(prompts(), GREEDY, capture=["norm"])
        steered = llm.generate(prompts(), GREEDY, capture=["norm"], steering=steering)
        for one, other in zip(plain, steered, strict=True):
            assert torch.equal(one.outputs[0].captured["norm"], other.outputs[0].captured["norm"])  # type: ignore[index]


def run(model: str, *, alone: bool = False, steer: bool = True, **config: Any) -> list[torch.Tensor]:
    """The rows behind the last norm of each prompt; every second one is steered, each by vectors of its own."""
    with LLM(model, **{**BASE, **config}) as llm:
        texts, found = prompts(), []
        groups = [[index] for index in range(len(texts))] if alone else [list(range(len(texts)))]
        for group in groups:
            ids = []
            for index in group:
                own = {name: [value * (index + 1) / 4 for value in values] for name, values in STEERING.items()}
                steering = SteeringParams.from_request(own) if steer and index % 2 else None
                options = RequestOptions(capture=CaptureParams(("norm",)), steering=steering)
                params = SamplingParams(temperature=0.7, seed=index, max_tokens=NUM_TOKENS, ignore_eos=True)
                ids.append(llm.client.submit(texts[index], params, stream=False, options=options))
            while llm.client.has_unfinished:
                llm.client.step()
            for request_id in ids:
                output = llm.client.collect(request_id)
                assert output is not None
                assert output.outputs[0].captured is not None
                found.append(torch.from_numpy(output.outputs[0].captured["norm"]))
        if config.get("num_blocks", 256) < 64:
            assert any(record.preempted for record in llm.engine.trace.records)
        return found


@pytest.fixture(scope="module")
def expected(model: str) -> list[torch.Tensor]:
    """Each request alone, those that are not steered by an engine that steers nobody."""
    plain, steered = run(model, alone=True, steer=False), run(model, alone=True)
    found = [steered[index] if index % 2 else plain[index] for index in range(len(LENGTHS))]
    assert all(not torch.equal(plain[index], steered[index]) for index in range(1, len(LENGTHS), 2))
    return found


SCHEDULES: dict[str, dict[str, Any]] = {
    "together": {},
    "chunks of 16": {"max_num_batched_tokens": 16},
    "prefix cache": {"enable_prefix_caching": True},
    "preempted": {"num_blocks": 11, "max_model_len": 128},
    "eager": {"enforce_eager": True},
    "ahead": {"async_scheduling": True},
    "drafts": {"speculative_method": "ngram", "speculative_max_num_seqs": 16},
    "one thread": {"num_threads": 1},
    "slots": {"kv_layout": "slot", "num_blocks": 4096},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_neighbours_when_some_are_steered_then_all_have_the_bits_that_they_have_alone(
    model: str, expected: list[torch.Tensor], schedule: str
) -> None:
    for index, (one, other) in enumerate(zip(run(model, **SCHEDULES[schedule]), expected, strict=True)):
        assert torch.equal(one, other), f"request {index} differs"


def test_prompt_when_steered_before_then_its_blocks_are_not_shared_with_others(model: str) -> None:
    with LLM(model, **{**BASE, "enable_prefix_caching": True}) as llm:
        prompt = prompts()[6]
        llm.generate([prompt], GREEDY, steering=STEERING)
        plain = llm.generate([prompt], GREEDY)[0]
        again = llm.generate([prompt], GREEDY, steering=STEERING)[0]
        other = llm.generate([prompt], GREEDY, steering={"layers.0": vector(9)})[0]
    assert plain.num_cached_tokens == other.num_cached_tokens == 0
    assert again.num_cached_tokens > 0


BAD: dict[str, tuple[Any, str]] = {
    "a list": ([1.0], r"steering is \[1.0\]; it must map"),
    "nothing": ({}, r"steering is \{\}; it must map"),
    "unknown": ({"layers.9": vector(1)}, "steering names 'layers.9'; the model has no such activation"),
    "a pattern": ({"layers.*": vector(1)}, r"steering names 'layers.\*'"),
    "a part": ({"layers.0.self_attn.qkv_proj.1": vector(1)}, "that a vector can be added to"),
    "too short": ({"layers.0": [1.0] * 5}, r"steering\['layers.0'\] has 5 values; the activation is 64 wide"),
    "NaN": ({"layers.0": [0.0, float("nan")] * 32}, r"steering\['layers.0'\]\[1\] is nan; it must be finite numbers"),
    "too great": (
        {"layers.0": [1e300] * WIDTH},
        r"steering\['layers.0'\]\[0\] is 1e\+300; .* finite numbers, in float32",
    ),
    "too great an integer": ({"layers.0": [10**400] * WIDTH}, r"steering\['layers.0'\] is .* finite numbers"),
    "too great an array": (
        {"layers.0": np.full(WIDTH, -3.5e38)},
        r"steering\['layers.0'\]\[0\] is -3.5e\+38; .* finite numbers, in float32",
    ),
    "truths": ({"layers.0": np.ones(WIDTH, bool)}, "it must be finite numbers"),
    "an array of texts": ({"layers.0": np.array(["1"] * WIDTH)}, "it must be finite numbers"),
    "texts": ({"layers.0": ["a"] * WIDTH}, r"steering\['layers.0'\] is .* finite numbers"),
    "nested": ({"layers.0": [[1.0] * WIDTH]}, r"steering\['layers.0'\] is .* finite numbers"),
    "no name": ({3: vector(1)}, "steering names 3; it must be a name"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("case", BAD)
def test_bad_steering_when_given_then_refused_by_name_and_nothing_runs(llm: LLM, case: str) -> None:
    steering, message = BAD[case]
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate([[5, 6]], GREEDY, steering=steering)
    assert not llm.client.has_unfinished


def test_vectors_when_made_without_a_request_then_checked_and_copied_as_float32() -> None:
    values = np.linspace(0, 1, WIDTH)
    params = SteeringParams({"layers.0": values})  # type: ignore[dict-item]
    digest = params.digest
    values[:] = 7.0
    assert params.vectors["layers.0"].dtype == np.float32
    assert (
        params.digest == digest == SteeringParams.from_request({"layers.0": np.linspace(0, 1, WIDTH).tolist()}).digest
    )  # type: ignore[union-attr]
    with pytest.raises(InvalidRequestError, match=r"steering\['layers.0'\]\[0\] is 1e\+39"):
        SteeringParams({"layers.0": np.full(WIDTH, 1e39)})  # type: ignore[dict-item]
