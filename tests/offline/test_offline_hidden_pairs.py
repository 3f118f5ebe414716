"""Hidden states beside every other feature: the tokens that come without them, the rows of the plain forward, no harm done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from utils.hidden_pairs import FEATURES, NUM_TOKENS, PROMPT, every_position
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams
from pellucid.api.hidden_states import HiddenStatesParams
from pellucid.api.outputs import CompletionOutput
from pellucid.api.request_options import RequestOptions

BASE: dict[str, Any] = {"num_blocks": 256, "max_model_len": 256, "num_threads": 1}
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "prefix cache off": {"enable_prefix_caching": False},
    "slots": {"kv_layout": "slot", "num_blocks": 4096},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "drafts": {"speculative_method": "ngram"},
    "ahead": {"async_scheduling": True},
    "padded": {"policy": "padded", "block_size": 64, "max_batch_tkv_limit": 4096},
}
NEIGHBOURS = [[9] * 5, [11, 12] * 20]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture(scope="module", params=ENGINES)
def llm(request: pytest.FixtureRequest, model: Path) -> Any:
    with LLM(model, **{**BASE, **ENGINES[request.param]}) as opened:
        yield opened
        assert opened.kv_cache_stats()["used_blocks"] == 0


def plain_rows(llm: LLM, token_ids: list[int]) -> torch.Tensor:
    """The rows of a request whose prompt is all of it."""
    asked = list(range(len(token_ids)))
    one = SamplingParams(temperature=0, max_tokens=1)
    output = llm.generate([token_ids], one, return_hidden_states=True, hidden_states_for_tokens=asked)[0].outputs[0]
    assert output.hidden_states_positions == asked
    return output.hidden_states  # type: ignore[return-value]


def check(llm: LLM, choice: CompletionOutput) -> None:
    assert choice.hidden_states is not None
    computed = [*PROMPT, *choice.token_ids][:-1] or PROMPT
    assert choice.hidden_states_positions == list(range(len(computed)))
    assert torch.equal(torch.as_tensor(choice.hidden_states), plain_rows(llm, computed))


def brought(choice: CompletionOutput) -> tuple[Any, ...]:
    return (choice.token_ids, choice.text, choice.finish_reason, choice.stop_reason, choice.logprobs)


@pytest.mark.parametrize("feature", FEATURES)
def test_feature_when_states_are_asked_for_too_then_both_are_right(llm: LLM, feature: str) -> None:
    params = SamplingParams(**FEATURES[feature])
    without = llm.generate([PROMPT, *NEIGHBOURS], params)
    every = every_position(feature)
    asked = {"return_hidden_states": True, "hidden_states_for_tokens": every}
    having = llm.generate([PROMPT], params, **asked)[0]
    assert having.prompt_logprobs == without[0].prompt_logprobs
    for choice, expected in zip(having.outputs, without[0].outputs, strict=True):
        assert brought(choice) == brought(expected)
        check(llm, choice)
    # In one batch with others that ask for nothing: the same again, and theirs unchanged.
    options = RequestOptions(hidden_states=HiddenStatesParams(tuple(every)))
    ids = [llm.client.submit(PROMPT, params, options=options, stream=False)]
    ids += [llm.client.submit(prompt, params, stream=False) for prompt in NEIGHBOURS]
    while llm.client.has_unfinished:
        llm.client.step()
    outputs = [llm.client.collect(request_id) for request_id in ids]
    for output, expected_output in zip(outputs, without, strict=True):
        assert output is not None
        for choice, expected in zip(output.outputs, expected_output.outputs, strict=True):
            assert brought(choice) == brought(expected)
    for choice in outputs[0].outputs:  # type: ignore[union-attr]
        check(llm, choice)


@pytest.mark.parametrize("feature", FEATURES)
def test_feature_when_streamed_then_each_token_has_the_row_that_it_was_drawn_from(llm: LLM, feature: str) -> None:
    params = SamplingParams(**FEATURES[feature])
    if params.prompt_logprobs is not None:
        pytest.skip("prompt_logprobs come whole")
    options = RequestOptions(hidden_states=HiddenStatesParams(stream=True))
    request_id = llm.client.submit(PROMPT, params, options=options)
    rows: dict[int, list[torch.Tensor]] = {}
    while llm.client.has_unfinished:
        for chunk in llm.client.step_outputs().chunks:
            if chunk.hidden_states is not None:
                rows.setdefault(chunk.index, []).append(torch.as_tensor(chunk.hidden_states))
    output = llm.client.collect(request_id)
    assert output is not None
    for choice in output.outputs:
        found = torch.cat(rows[choice.index])
        assert len(found) == len(choice.token_ids)
        assert torch.equal(found, plain_rows(llm, [*PROMPT, *choice.token_ids][:-1])[len(PROMPT) - 1 :])


def test_request_when_cancelled_midway_then_the_rows_so_far(llm: LLM) -> None:
    options = RequestOptions(hidden_states=HiddenStatesParams(tuple(every_position("greedy"))))
    endless = SamplingParams(temperature=0, ignore_eos=True, max_tokens=NUM_TOKENS)
    request_id = llm.client.submit(PROMPT, endless, options=options)
    for _ in range(4):
        llm.client.step()
    assert llm.client.cancel(request_id)
    while llm.client.has_unfinished:
        llm.client.step()
    output = llm.client.collect(request_id)
    assert output is not None
    choice = output.outputs[0]
    assert choice.finish_reason == "abort"
    assert 0 < len(choice.token_ids) < NUM_TOKENS
    check(llm, choice)
