"""Every field that has an entry a position, for prompts of one token and of two: nothing stands before the first, and it is said so.

A prompt of one token is the empty case of all that skips the first position. What is right is known without the engine's own
bookkeeping: row i of a longer prompt is that of its first i + 1 tokens, whatever comes behind.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from utils.async_engines import KINDS, start_engine
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams
from pellucid.api.hidden_states import CaptureParams, HiddenStatesParams
from pellucid.api.outputs import RequestOutput
from pellucid.api.request_options import RequestOptions
from pellucid.commands.capture import ERRORS, capture_jsonl
from pellucid.commands.jsonl import run_jsonl
from pellucid.errors import RequestFailedError
from pellucid.service.async_engine import AsyncLLMEngine
from pellucid.weights.safetensors import open_safetensors

pytestmark = pytest.mark.timeout(180)

LONG = [5, 6, 7, 8]
NAME = "layers.1.mlp"
BASE: dict[str, Any] = {"max_model_len": 64, "num_blocks": 64, "block_size": 4, "num_threads": 1}
# How the same prompts are served.
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token a step": {"max_num_batched_tokens": 1},
    "blocks of one token": {"block_size": 1},
    "no cache": {"enable_prefix_caching": False},
    "planned ahead": {"async_scheduling": True},
    "slots": {"kv_layout": "slot", "block_size": 1},
    "drafts": {"speculative_method": "ngram", "prompt_lookup_min": 1},
    "whole prompts first": {"policy": "prefill_first"},
    "eager": {"enforce_eager": True},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = build_tiny_checkpoint(tmp_path_factory.mktemp("first"), "llama")
    path = made / "tokenizer_config.json"
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"  # a message of one letter is one token
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return made


class Known:
    """What is right at each position of `LONG`."""

    def __init__(self, llm: LLM) -> None:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2, ignore_eos=True)
        wanted: dict[str, Any] = {"return_hidden_states": True, "hidden_states_for_tokens": [0, 1, 2, 3]}
        output = llm.generate([LONG], params, **wanted)[0]
        rows = llm.generate([LONG], params, capture=[NAME])[0].outputs[0].captured
        assert rows is not None
        self.captured: Any = rows[NAME]  # [4, width]
        self.states: Any = output.outputs[0].hidden_states  # [4, D]
        self.logprobs = [self.plain(row) for row in output.prompt_logprobs or []]

    @staticmethod
    def plain(row: Any) -> dict[int, float] | None:
        return None if row is None else {token: entry.logprob for token, entry in row.items()}


@pytest.fixture(scope="module")
def known(model: Path) -> Known:
    with LLM(model, **BASE) as llm:
        return Known(llm)


@pytest.fixture(scope="module", params=ENGINES)
def llm(request: pytest.FixtureRequest, model: Path) -> Iterator[LLM]:
    with LLM(model, **{**BASE, **ENGINES[request.param]}) as llm:
        yield llm


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 2, "ignore_eos": True, **fields})


def check_prompt_logprobs(output: RequestOutput, known: Known, num_prompt: int) -> None:
    assert [known.plain(row) for row in output.prompt_logprobs or []] == known.logprobs[:num_prompt]
    assert len(output.prompt_logprobs or ()) == num_prompt


def equal(found: Any, right: Any) -> bool:
    return torch.equal(torch.from_numpy(np.asarray(found).copy()), torch.from_numpy(np.asarray(right).copy()))


# field: how it is asked for, and a check of the output for a prompt of so many tokens
Check = Callable[[RequestOutput, Known, int], None]


def _no_field(output: RequestOutput, known: Known, num_prompt: int) -> None:
    choice = output.outputs[0]
    assert (output.prompt_logprobs, choice.logprobs, choice.cumulative_logprob) == (None, None, None)
    assert (choice.hidden_states, choice.hidden_states_positions, choice.captured) == (None, None, None)


def _logprobs(output: RequestOutput, known: Known, num_prompt: int) -> None:
    for choice in output.outputs:
        assert choice.logprobs is not None
        assert len(choice.logprobs) == len(choice.token_ids) > 0
        assert choice.cumulative_logprob is not None
    first = output.outputs[0]
    assert first.logprobs is not None
    after = known.logprobs[num_prompt]
    assert after is not None
    token = LONG[num_prompt]
    if token in first.logprobs[0]:
        assert first.logprobs[0][token].logprob == after[token]


def _flat_state(output: RequestOutput, known: Known, num_prompt: int) -> None:
    assert equal(output.outputs[0].hidden_states, known.states[num_prompt - 1])
    assert output.outputs[0].hidden_states_positions is None


def _states(output: RequestOutput, known: Known, num_prompt: int) -> None:
    assert equal(output.outputs[0].hidden_states, known.states[[0, num_prompt - 1]])
    assert output.outputs[0].hidden_states_positions == [0, num_prompt - 1]


def _layered(output: RequestOutput, known: Known, num_prompt: int) -> None:
    states: Any = output.outputs[0].hidden_states
    assert tuple(states.shape) == (1, 2, known.states.shape[1])
    assert equal(states[0, 1], known.states[num_prompt - 1])


def _no_rows(output: RequestOutput, known: Known, num_prompt: int) -> None:
    """Asked for, and there are none: that is not the same as not asked for."""
    states: Any = output.outputs[0].hidden_states
    assert tuple(states.shape) == (0, known.states.shape[1])
    assert output.outputs[0].hidden_states_positions == []


def _captured(output: RequestOutput, known: Known, num_prompt: int) -> None:
    assert output.outputs[0].captured is not None
    assert equal(output.outputs[0].captured[NAME], known.captured[:num_prompt])


_STATES = {"return_hidden_states": True}
FIELDS: dict[str, tuple[dict[str, Any], dict[str, Any], Check]] = {
    "nothing": ({}, {}, _no_field),
    "empty lists": ({"stop": [], "stop_token_ids": [], "bad_words": [], "logit_bias": {}}, {}, _no_field),
    "prompt_logprobs 0": ({"prompt_logprobs": 0}, {}, lambda o, k, n: _chosen_alone(o, k, n)),
    "prompt_logprobs 2": ({"prompt_logprobs": 2}, {}, check_prompt_logprobs),
    "prompt_logprobs, n 2": ({"prompt_logprobs": 2, "n": 2, "temperature": 1, "seed": 3}, {}, check_prompt_logprobs),
    "logprobs": ({"logprobs": 20}, {}, _logprobs),
    "logprobs, n 2": ({"logprobs": 0, "n": 2, "temperature": 1, "seed": 3}, {}, _logprobs),
    "the last state": ({"max_tokens": 1}, _STATES, _flat_state),
    "states": ({"max_tokens": 1}, {**_STATES, "hidden_states_for_tokens": [0, -1]}, _states),
    "layers": ({"max_tokens": 1}, {**_STATES, "hidden_states_layers": [0, -1]}, _layered),
    "states that never came": (
        {"max_tokens": 9, "ignore_eos": False, "allowed_token_ids": [2]},
        {**_STATES, "hidden_states_for_tokens": [7]},
        _no_rows,
    ),
    "capture": ({"max_tokens": 1}, {"capture": [NAME]}, _captured),
}


def _chosen_alone(output: RequestOutput, known: Known, num_prompt: int) -> None:
    rows = [known.plain(row) for row in output.prompt_logprobs or ()]
    assert len(rows) == num_prompt
    assert rows[0] is None
    for row, right, token in zip(rows[1:], known.logprobs[1:], LONG[1:], strict=False):
        assert right is not None
        assert row == {token: right[token]}


@pytest.mark.parametrize("field", FIELDS)
def test_field_when_the_prompt_has_one_token_or_two_then_it_has_an_entry_a_position(
    llm: LLM, known: Known, field: str
) -> None:
    given, options, check = FIELDS[field]
    for num_prompt in (1, 2, 1, 2):  # the second time from the cache
        (output,) = llm.generate([LONG[:num_prompt]], params(**given), **options)
        assert output.prompt_token_ids == LONG[:num_prompt]
        check(output, known, num_prompt)
    one, two = llm.generate([LONG[:1], LONG[:2]], params(**given), **options)  # and side by side
    check(one, known, 1)
    check(two, known, 2)


def test_scores_when_prompt_or_continuation_has_one_token_then_one_a_token(llm: LLM, known: Known) -> None:
    scores = llm.score([LONG[:1], LONG[:1], LONG[:2]], [LONG[1:2], LONG[1:3], LONG[2:3]])
    rows = known.logprobs
    assert scores == [
        [rows[1][6]],  # type: ignore[index]
        [rows[1][6], rows[2][7]],  # type: ignore[index]
        [rows[2][7]],  # type: ignore[index]
    ]
    assert llm.score([], []) == []


def test_stream_when_the_prompt_has_one_token_then_its_chunks_are_its_output(llm: LLM) -> None:
    for num_prompt in (1, 2):
        for max_tokens in (1, 3):
            wanted = params(logprobs=1, max_tokens=max_tokens)
            (output,) = llm.generate([LONG[:num_prompt]], wanted)
            chunks = list(llm.stream(LONG[:num_prompt], wanted))
            assert [t for chunk in chunks for t in chunk.token_ids] == output["token_ids"]
            assert [row for chunk in chunks for row in chunk.logprobs or ()] == output.outputs[0].logprobs


def test_chat_when_the_template_makes_one_token_then_as_generate(llm: LLM, known: Known) -> None:
    (output,) = llm.chat([{"role": "user", "content": "a"}], params(prompt_logprobs=0))
    assert len(output.prompt_token_ids) == 1
    assert output.prompt_logprobs == [None]
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.chat([{"role": "user", "content": ""}], params())


def test_text_when_empty_then_it_has_no_tokens_and_is_no_prompt(llm: LLM) -> None:
    assert llm.encode("") == [[]]
    assert llm.encode([]) == []
    assert llm.generate([]) == []
    for prompts in ("", [""], [[]]):
        with pytest.raises(ValueError, match="the prompt is empty"):
            llm.generate(prompts, params())  # type: ignore[arg-type]


# ---- requests that end before they are computed -----------------------------------------------------------------------


@pytest.mark.parametrize("num_prompt", [1, 2, 4])
def test_request_when_cancelled_before_its_first_step_then_each_field_has_its_length(llm: LLM, num_prompt: int) -> None:
    options = RequestOptions(hidden_states=HiddenStatesParams((0, -1)), capture=CaptureParams((NAME,)))
    wanted = params(prompt_logprobs=1, logprobs=1)
    request_id = llm.client.submit(LONG[:num_prompt], wanted, options=options)
    assert llm.client.cancel(request_id)
    (output,) = llm.client.step()
    llm.client.release(request_id)
    choice = output.outputs[0]
    assert choice.finish_reason == "abort"
    assert output.prompt_logprobs == [None] * num_prompt
    assert (choice.token_ids, choice.logprobs, choice.cumulative_logprob) == ([], [], 0.0)
    assert choice.hidden_states is not None
    assert choice.hidden_states.shape == (0, 64)
    assert choice.hidden_states_positions == []


def test_request_when_cancelled_in_the_middle_of_its_prompt_then_the_rest_is_none(model: Path, known: Known) -> None:
    with LLM(model, **{**BASE, "max_num_batched_tokens": 2}) as llm:
        request_id = llm.client.submit(LONG, params(prompt_logprobs=2))
        llm.client.step()
        llm.client.cancel(request_id)
        (output,) = llm.client.step()
        rows = [known.plain(row) for row in output.prompt_logprobs or []]
        assert rows == [*known.logprobs[:3], None]


def test_score_when_its_request_is_ended_by_an_error_then_that_is_said(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(model, **BASE) as llm:

        def fails(plan: Any) -> Any:
            raise RuntimeError("no")

        monkeypatch.setattr(llm.engine.executor, "execute", fails)
        with pytest.raises(RequestFailedError, match=r"continuations\[0\] has no scores: .*RuntimeError: no"):
            llm.score([[5]], [[6]])


# ---- other ways in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_asynchronous_engine_when_the_prompt_has_one_token_or_two_then_as_offline(
    model: Path, known: Known, kind: str
) -> None:
    engine = start_engine(kind, model, **BASE)
    try:
        asyncio.run(_serve(engine, known))
    finally:
        engine.close()


async def _serve(engine: AsyncLLMEngine, known: Known) -> None:
    for given, asked, check in FIELDS.values():
        states = HiddenStatesParams.from_request(
            asked.get("return_hidden_states", False),
            asked.get("hidden_states_for_tokens"),
            asked.get("hidden_states_layers"),
        )
        options = RequestOptions(hidden_states=states, capture=CaptureParams.from_request(asked.get("capture")))
        for num_prompt in (1, 2):
            prompt = LONG[:num_prompt]
            check(await engine.generate(prompt, params(**given), options=options), known, num_prompt)
            request_id = await engine.submit(prompt, params(**given), options=options)
            chunks = [chunk async for chunk in engine.watch_stream(request_id)]
            output = await engine.wait(request_id)
            check(output, known, num_prompt)
            if output.outputs[0].logprobs is not None:
                rows = [row for chunk in chunks if chunk.index == 0 for row in chunk.logprobs or ()]
                assert rows == output.outputs[0].logprobs
            await engine.release(request_id)


def test_run_when_lines_have_one_token_or_two_then_each_has_what_it_asked_for(llm: LLM, known: Known) -> None:
    asked = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 2, "logprobs": 0}
    lines = [
        {"prompt": LONG[:1], **asked},
        {"prompt": LONG[:2], **asked},
        {"prompt": "a", **asked, "n": 2, "temperature": 1},
        {"messages": [{"role": "user", "content": "a"}], **asked},
        {"prompt": LONG[:1], "max_tokens": 1},
        {"prompt": "", **asked},
    ]
    source, target = io.BytesIO("\n".join(map(json.dumps, lines)).encode()), io.StringIO()
    assert run_jsonl(llm, source, target.write, {}, lambda: None) == 1
    results = [json.loads(line) for line in target.getvalue().splitlines()]
    for num_prompt in (1, 2):
        rows: list[Any] = results[num_prompt - 1]["prompt_logprobs"]
        read = [None if row is None else {int(token): value for token, value in row.items()} for row in rows]
        assert read == known.logprobs[:num_prompt]
    assert results[2]["prompt_logprobs"] == results[3]["prompt_logprobs"] == [None]
    assert [len(choice["logprobs"]) for choice in results[2]["choices"]] == [1, 1]
    assert not {"prompt_logprobs", "logprobs"} & set(results[4])
    assert "the prompt is empty" in results[5]["error"]


def test_capture_when_lines_have_one_token_then_a_row_each(llm: LLM, known: Known, tmp_path: Path) -> None:
    lines = [{"prompt": LONG[:1]}, {"prompt": LONG[:2]}, {"prompt": LONG[:1]}]
    source = io.BytesIO("\n".join(map(json.dumps, lines)).encode())
    defaults = {"max_tokens": 1, "temperature": 0}
    failed = capture_jsonl(
        llm, source, tmp_path, [NAME], defaults, dtype="float32", shard_bytes=1 << 20, advance=lambda: None
    )
    assert failed == 0
    assert (tmp_path / ERRORS).read_text() == ""
    shard = open_safetensors(tmp_path / "shard-00000.safetensors")
    assert shard["offsets"].data.view(np.int64).tolist() == [0, 1, 3, 4]
    assert shard["token_ids"].data.view(np.int32).tolist() == [5, 5, 6, 5]
    rows = shard[NAME].data.view(np.float32).reshape(4, -1)
    assert equal(rows, known.captured[[0, 0, 1, 0]])
