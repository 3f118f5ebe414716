"""Fields with an entry a position over HTTP, for prompts of one token and of two: the first entry is null, and nothing fails."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from utils.async_engines import KINDS
from utils.http_server import RunningServer, running_server
from utils.tiny_models import build_tiny_checkpoint

from pellucid.api.outputs import CompletionOutput, RequestOutput
from pellucid.engine.metrics import EngineStats
from pellucid.errors import RequestFailedError
from pellucid.server.embeddings import answer as embeddings
from pellucid.server.embeddings.protocol import EmbeddingRequest
from pellucid.server.generate.generation import Usage

pytestmark = pytest.mark.timeout(180)
PATIENCE = 60.0
LONG = [5, 6, 7]
NAME = "layers.1.mlp"
BASE: dict[str, Any] = {"temperature": 0, "max_tokens": 1, "ignore_eos": True}


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    model = build_tiny_checkpoint(tmp_path_factory.mktemp("first"), "llama", max_position_embeddings=8192)
    path = model / "tokenizer_config.json"
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"  # a message of one letter is one token
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    with running_server(
        model, engine_process=request.param == "process", capture=True, max_num_seqs=1, num_blocks=1024
    ) as server:
        yield server


def post(server: RunningServer, path: str, **body: Any) -> dict[str, Any]:
    """The answer to a request that must succeed."""
    answer = httpx.post(server.url + path, json=body, timeout=PATIENCE)
    assert answer.status_code == 200, (body, answer.text)
    read: dict[str, Any] = answer.json()
    return read


def choices(server: RunningServer, **body: Any) -> list[dict[str, Any]]:
    """Of a completion."""
    found: list[dict[str, Any]] = post(server, "/v1/completions", **{**BASE, **body})["choices"]
    return found


@pytest.fixture(scope="module")
def rows(server: RunningServer) -> list[dict[str, Any] | None]:
    """The log-probabilities at each position of `LONG`."""
    (choice,) = choices(server, prompt=LONG, prompt_logprobs=2)
    found: list[dict[str, Any] | None] = choice["prompt_logprobs"]
    assert [row is None for row in found] == [True, False, False]
    return found


@pytest.mark.parametrize("max_tokens", [0, 1, 2])
@pytest.mark.parametrize("logprobs", [0, 2])
@pytest.mark.parametrize("prompts", [[LONG[:1]], [LONG[:2]], [LONG[:1], LONG[:2], LONG[:1]], ["a"], ["a", "b c"]])
@pytest.mark.parametrize("n", [1, 2])
def test_echo_with_logprobs_when_prompts_are_short_then_the_first_token_has_null(
    server: RunningServer,
    rows: list[dict[str, Any] | None],
    prompts: list[Any],
    logprobs: int,
    max_tokens: int,
    n: int,
) -> None:
    drawn = {"n": n, "temperature": 1, "seed": 3} if n > 1 else {}
    found = choices(server, prompt=prompts, echo=True, logprobs=logprobs, max_tokens=max_tokens, **drawn)
    assert len(found) == n * len(prompts)
    for choice in found:
        prompt = prompts[choice["index"] // n]
        num_prompt = len(prompt)  # of these texts too: a letter a token
        shown = choice["logprobs"]
        assert {len(values) for values in shown.values()} == {num_prompt + max_tokens}
        assert shown["token_logprobs"][0] is None
        assert shown["top_logprobs"][0] is None
        assert shown["text_offset"][0] == 0
        assert all(value < 0 for value in shown["token_logprobs"][1:])
        assert all(len(row) in {max(1, logprobs), logprobs + 1} for row in shown["top_logprobs"][1:])
        if isinstance(prompt, str):
            assert "".join(shown["tokens"][:num_prompt]) == prompt
            assert choice["text"].startswith(prompt)
        elif num_prompt > 1:
            assert shown["token_logprobs"][1] == (rows[1] or {})["6"]["logprob"]
        assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("num_prompt", [1, 2])
def test_prompt_logprobs_when_prompts_are_short_then_one_entry_a_token(
    server: RunningServer, rows: list[dict[str, Any] | None], num_prompt: int
) -> None:
    for extra in ({}, {"logprobs": 0}, {"echo": True}, {"echo": True, "logprobs": 1}, {"n": 2, "temperature": 1}):
        for choice in choices(server, prompt=LONG[:num_prompt], prompt_logprobs=2, **extra):
            assert choice["prompt_logprobs"] == rows[:num_prompt]
            assert (choice["logprobs"] is None) == ("logprobs" not in extra)
    text = "ab"[:num_prompt]
    message = {"role": "user", "content": text}
    answer = post(
        server, "/v1/chat/completions", **BASE, messages=[message], prompt_logprobs=0, logprobs=True, top_logprobs=0
    )
    assert answer["usage"]["prompt_tokens"] == num_prompt
    assert answer["prompt_logprobs"][0] is None
    assert len(answer["prompt_logprobs"]) == num_prompt
    (entry,) = answer["choices"][0]["logprobs"]["content"]
    assert entry["top_logprobs"] == []
    assert "prompt_logprobs" not in post(server, "/v1/chat/completions", **BASE, messages=[message])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_prompt", [1, 2])
def test_states_and_activations_when_prompts_are_short_then_a_row_a_position(
    server: RunningServer, num_prompt: int, stream: bool
) -> None:
    def first(**body: Any) -> dict[str, Any]:
        if not stream:
            return choices(server, prompt=LONG[:num_prompt], **body)[0]
        request = {**BASE, "prompt": LONG[:num_prompt], "stream": True, **body}
        answer = httpx.post(f"{server.url}/v1/completions", json=request, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        merged: dict[str, Any] = {}
        for line in lines:
            merged |= {name: value for name, value in json.loads(line)["choices"][0].items() if value is not None}
        return merged

    wanted = {"return_hidden_states": True}
    flat = first(**wanted)["hidden_states"]
    assert np.array(flat).shape == (64,)
    some = first(**wanted, hidden_states_for_tokens=[0, -1])
    assert some["hidden_states_positions"] == [0, num_prompt - 1]
    assert some["hidden_states"][1] == flat
    layers = first(**wanted, hidden_states_layers=[-1, 1])
    assert np.array(layers["hidden_states"]).shape == (1, 2, 64)
    assert layers["hidden_states"][0][0] == flat
    captured = first(capture=[NAME])["captured"][NAME]["values"]
    assert np.array(captured).shape == (num_prompt, 64)
    # The output ends before the position comes: asked for, and none.
    never = {**wanted, "hidden_states_for_tokens": [7], "ignore_eos": False, "allowed_token_ids": [2], "max_tokens": 9}
    none = first(**never)
    assert (none["hidden_states"], none["hidden_states_positions"]) == ([], [])
    none = first(**never, hidden_states_format="base64")
    assert (none["hidden_states"], none["hidden_states_shape"], none["hidden_states_positions"]) == ("", [0, 64], [])
    assert "hidden_states" not in first()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embedding_when_the_input_is_one_token_then_its_one_row(server: RunningServer, pooling: str) -> None:
    (state,) = (choices(server, prompt=LONG[:1], return_hidden_states=True)[0]["hidden_states"],)
    body = {"pooling": pooling, "normalize": False}
    for given in (LONG[:1], [LONG[:1]], [LONG[:1], LONG[:2]]):
        answer = post(server, "/v1/embeddings", input=given, **body)
        assert answer["data"][0]["embedding"] == state
    answer = post(server, "/v1/embeddings", input=[5], encoding_format="base64", **body)
    vector = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    assert np.array_equal(vector, np.array(state, np.float32))
    assert answer["usage"] == {"prompt_tokens": 1, "total_tokens": 1}


def test_other_dialects_when_the_prompt_is_one_token_then_they_answer(server: RunningServer) -> None:
    message = [{"role": "user", "content": "a"}]
    answer = post(server, "/v1/messages", messages=message, max_tokens=1, stop_sequences=[])
    assert answer["usage"]["input_tokens"] == 1
    assert post(server, "/v1/messages/count_tokens", messages=message)["input_tokens"] == 1
    answer = post(
        server,
        "/v1/responses",
        input="a",
        max_output_tokens=16,
        include=["message.output_text.logprobs"],
        temperature=0,
    )
    assert answer["usage"]["input_tokens"] == 1
    (content,) = answer["output"][0]["content"]
    assert len(content["logprobs"]) == answer["usage"]["output_tokens"]


def test_tokens_when_the_text_is_empty_or_one_letter_then_lists_of_that_length(server: RunningServer) -> None:
    for text in ("", "a", "ab"):
        read = post(server, "/tokenize", prompt=text, return_token_strs=True)
        assert (read["count"], len(read["tokens"]), len(read["token_strs"])) == (len(text),) * 3
        assert post(server, "/tokenize", messages=[{"role": "user", "content": text}])["count"] == len(text)
        assert post(server, "/detokenize", tokens=read["tokens"]) == {"prompt": text}


@pytest.mark.parametrize(
    "body", [{"prompt": ""}, {"prompt": [""]}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [[5], []]}]
)
def test_prompt_when_empty_then_400_names_it(server: RunningServer, body: dict[str, Any]) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={**BASE, **body}, timeout=PATIENCE)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("num_prompt", [1, 3])
def test_request_with_echo_when_cancelled_before_its_first_step_then_it_is_answered_with_nulls(
    server: RunningServer, num_prompt: int
) -> None:
    """Nothing is computed of it: it waits behind another one."""
    states = {"return_hidden_states": True, "hidden_states_for_tokens": [0]}
    with ThreadPoolExecutor(2) as pool:
        long = {**BASE, "prompt": [5], "max_tokens": 8000, "request_id": f"long-{num_prompt}"}
        running = pool.submit(post, server, "/v1/completions", **long)
        _until(server, lambda stats: stats.num_running == 1)
        body = {**BASE, "prompt": LONG[:num_prompt], "echo": True, "logprobs": 1, **states}
        waiting = pool.submit(post, server, "/v1/completions", **body, request_id=f"short-{num_prompt}")
        _until(server, lambda stats: stats.num_waiting == 1)
        for name in (f"short-{num_prompt}", f"long-{num_prompt}"):
            cancelled = httpx.post(f"{server.url}/v1/requests/{name}/cancel", timeout=PATIENCE)
            assert cancelled.status_code == 200, (name, cancelled.text)
        (choice,) = waiting.result(PATIENCE)["choices"]
        assert choice["stop_reason"] == "abort"
        assert choice["logprobs"]["token_logprobs"] == choice["logprobs"]["top_logprobs"] == [None] * num_prompt
        assert (choice["hidden_states"], choice["hidden_states_positions"]) == ([], [])
        assert running.result(PATIENCE)["choices"][0]["stop_reason"] == "abort"


def _until(server: RunningServer, question: Callable[[EngineStats], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        stats = asyncio.run_coroutine_threadsafe(server.engine.stats(), server.loop).result(PATIENCE)
        if question(stats):
            return
        assert time.monotonic() < end, stats
        time.sleep(0.01)


def test_embedding_when_its_request_was_ended_before_it_was_computed_then_a_typed_error() -> None:
    request = EmbeddingRequest(input=[5])
    for states in (None, np.zeros((0, 8), np.float32)):
        choice = CompletionOutput(0, finish_reason="abort", hidden_states=states)
        output = RequestOutput("r", None, [5], [choice], True)
        with pytest.raises(RequestFailedError, match="input 0 has no embedding: its request ended with 'abort'"):
            embeddings.answer(request, "m", [output], Usage(1, 0))
