"""Hidden states and embeddings over HTTP: the bits of the offline engine, absent when not asked for, refused by name."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from utils.hidden_pairs import FEATURES, every_position
from utils.hidden_pairs import PROMPT as PAIRS_PROMPT
from utils.http_server import RunningServer, running_server

from pellucid import LLM, SamplingParams
from pellucid.api.hidden_states import HiddenStatesParams
from pellucid.api.request_options import RequestOptions
from pellucid.server.generate import states
from pellucid.server.generate.states import encoded

PROMPT = list(range(20, 60))
WIDTH = 64
NUM_TOKENS = 6
LAYERS = [0, 2, -1]
POSITIONS = [0, 7, -1, -2]
BODY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "the quick brown fox"}],
    "max_tokens": NUM_TOKENS,
    "temperature": 0,
    "ignore_eos": True,
}
ASKED: dict[str, dict[str, Any]] = {
    "flat": {"return_hidden_states": True},
    "rows": {"return_hidden_states": True, "hidden_states_for_tokens": POSITIONS},
    "layers": {"return_hidden_states": True, "hidden_states_layers": LAYERS},
    "rows and layers": {
        "return_hidden_states": True,
        "hidden_states_for_tokens": POSITIONS,
        "hidden_states_layers": LAYERS,
    },
}


@pytest.fixture(scope="module", params=[False, True], ids=["thread", "process"])
def server(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[RunningServer]:
    with running_server(tiny_model, engine_process=request.param) as running:
        yield running


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, num_blocks=256, num_threads=1) as opened:
        yield opened


def post(server: RunningServer, path: str, body: dict[str, Any]) -> Any:
    return httpx.post(f"{server.url}{path}", json=body, timeout=300)


def events(server: RunningServer, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with httpx.stream("POST", f"{server.url}{path}", json={**body, "stream": True}, timeout=300) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def decoded(fields: dict[str, Any]) -> torch.Tensor:
    """Either form, as float32."""
    if isinstance(fields["hidden_states"], list):
        return torch.tensor(fields["hidden_states"], dtype=torch.float32)
    assert fields["hidden_states_dtype"] == "float32"
    values = np.frombuffer(base64.b64decode(fields["hidden_states"]), "<f4")
    return torch.tensor(values).reshape(fields["hidden_states_shape"])


def expected_of(llm: LLM, prompt: list[int], asked: dict[str, Any]) -> Any:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return llm.generate([prompt], params, **asked)[0].outputs[0]


@pytest.mark.parametrize("form", ["float", "base64"])
@pytest.mark.parametrize("case", ASKED)
def test_completion_when_it_asks_then_the_bits_of_the_offline_engine(
    server: RunningServer, llm: LLM, case: str, form: str
) -> None:
    expected = expected_of(llm, PROMPT, ASKED[case])
    body = {**BODY, **ASKED[case], "hidden_states_format": form}
    whole = post(server, "/v1/completions", body).json()["choices"][0]
    carrying = [e["choices"][0] for e in events(server, "/v1/completions", body) if "hidden_states" in e["choices"][0]]
    assert len(carrying) == 1
    assert carrying[0]["finish_reason"] == "length"
    for fields in (whole, carrying[0]):
        assert torch.equal(decoded(fields), expected.hidden_states)
        assert fields.get("hidden_states_positions") == expected.hidden_states_positions


@pytest.mark.parametrize("case", ASKED)
def test_chat_when_it_asks_then_in_the_message_and_in_one_delta(server: RunningServer, llm: LLM, case: str) -> None:
    ids = post(server, "/tokenize", {"messages": CHAT["messages"]}).json()["tokens"]
    expected = expected_of(llm, ids, ASKED[case])
    body = {**CHAT, **ASKED[case]}
    message = post(server, "/v1/chat/completions", body).json()["choices"][0]["message"]
    deltas = [event["choices"][0]["delta"] for event in events(server, "/v1/chat/completions", body)]
    carrying = [delta for delta in deltas if "hidden_states" in delta]
    assert len(carrying) == 1
    for fields in (message, carrying[0]):
        assert torch.equal(decoded(fields), expected.hidden_states)
        assert fields.get("hidden_states_positions") == expected.hidden_states_positions


def test_stream_when_each_token_has_its_row_then_joined_they_are_the_rows_of_the_text(
    server: RunningServer, llm: LLM
) -> None:
    positions = list(range(len(PROMPT) - 1, len(PROMPT) + NUM_TOKENS - 1))
    expected = expected_of(llm, PROMPT, {"return_hidden_states": True, "hidden_states_for_tokens": positions})
    body = {**BODY, "return_hidden_states": True, "hidden_states_stream": True, "return_token_ids": True}
    choices = [event["choices"][0] for event in events(server, "/v1/completions", body)]
    rows = [decoded(choice) for choice in choices if "hidden_states" in choice]
    assert [len(choice["token_ids"]) for choice in choices if "hidden_states" in choice] == [len(row) for row in rows]
    assert torch.equal(torch.cat(rows), expected.hidden_states)


def test_choices_and_prompts_when_several_then_each_has_its_own(server: RunningServer, llm: LLM) -> None:
    body = {**BODY, "prompt": [PROMPT, PROMPT[:9]], "return_hidden_states": True, "n": 2, "temperature": 1, "seed": 5}
    choices = post(server, "/v1/completions", body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert len({tuple(choice["hidden_states"]) for choice in choices}) == 4


def test_request_when_it_does_not_ask_then_the_keys_are_absent(server: RunningServer) -> None:
    for path, body in (("/v1/completions", BODY), ("/v1/chat/completions", CHAT)):
        for extra in ({}, {"return_hidden_states": False}, {"return_hidden_states": None}):
            assert "hidden" not in post(server, path, {**body, **extra}).text
            assert "hidden" not in json.dumps(events(server, path, {**body, **extra}))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a number": ({"return_hidden_states": 1}, "return_hidden_states"),
    "a text": ({"return_hidden_states": "true"}, "return_hidden_states"),
    "rows alone": ({"hidden_states_for_tokens": [0]}, "hidden_states_for_tokens"),
    "layers alone": ({"hidden_states_layers": [0]}, "hidden_states_layers"),
    "rows as text": ({"return_hidden_states": True, "hidden_states_for_tokens": "0"}, "hidden_states_for_tokens"),
    "rows as numbers": ({"return_hidden_states": True, "hidden_states_for_tokens": [0.5]}, "hidden_states_for_tokens"),
    "rows too far": ({"return_hidden_states": True, "hidden_states_for_tokens": [99]}, "hidden_states_for_tokens"),
    "huge row": ({"return_hidden_states": True, "hidden_states_for_tokens": [2**70]}, "hidden_states_for_tokens"),
    "layer too far": ({"return_hidden_states": True, "hidden_states_layers": [17]}, "hidden_states_layers"),
    "format": ({"return_hidden_states": True, "hidden_states_format": "float16"}, "hidden_states_format"),
    "format as number": ({"return_hidden_states": True, "hidden_states_format": 3}, "hidden_states_format"),
    "stream of rows, whole": ({"return_hidden_states": True, "hidden_states_stream": True}, "hidden_states_stream"),
    "stream of rows as text": ({"return_hidden_states": True, "hidden_states_stream": "yes"}, "hidden_states_stream"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_field_when_sent_then_400_by_name(server: RunningServer, case: str) -> None:
    extra, name = REFUSED[case]
    for path, body in (("/v1/completions", BODY), ("/v1/chat/completions", CHAT)):
        answer = post(server, path, {**body, **extra})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == name
    server.wait_until_idle()


def test_switch_when_off_then_400_and_embeddings_too(tiny_model: Path) -> None:
    with running_server(tiny_model, hidden_states=False) as server:
        answer = post(server, "/v1/completions", {**BODY, "return_hidden_states": True})
        assert answer.status_code == 400
        assert "hands out no hidden states" in answer.json()["error"]["message"]
        assert post(server, "/v1/embeddings", {"input": "hello"}).status_code == 400
        assert post(server, "/v1/completions", BODY).status_code == 200


def test_cap_when_passed_then_400_with_the_numbers(tiny_model: Path) -> None:
    with running_server(tiny_model, hidden_states_max_mb=1) as server:
        asked = {"return_hidden_states": True, "hidden_states_for_tokens": [0] * 5000}
        answer = post(server, "/v1/completions", {**BODY, **asked})
        assert answer.status_code == 400
        assert "hidden_states_max_mb allows 1,000,000" in answer.json()["error"]["message"]


def test_total_when_passed_then_429_until_what_others_hold_is_released(tiny_model: Path) -> None:
    """A request may take 0.8 MB, all together 1."""
    asked = {"return_hidden_states": True, "hidden_states_for_tokens": [0] * 3125}
    options = RequestOptions(hidden_states=HiddenStatesParams((0,) * 3125))
    with running_server(tiny_model, hidden_states_total_mb=1) as server:
        engine = server.engine

        def call(work: Coroutine[Any, Any, Any]) -> Any:
            return asyncio.run_coroutine_threadsafe(work, server.loop).result(300)

        call(engine.submit(PROMPT, SamplingParams(max_tokens=1), request_id="kept", options=options))
        call(engine.wait("kept"))  # it has ended, and its states are kept
        refused = post(server, "/v1/completions", {**BODY, **asked})
        assert refused.status_code == 429
        assert "take up to 800,000 bytes, those of others 800,000" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert post(server, "/v1/completions", BODY).status_code == 200
        call(engine.release("kept"))
        for _ in range(3):
            assert post(server, "/v1/completions", {**BODY, **asked}).status_code == 200
        never = post(server, "/v1/completions", {**BODY, **asked, "n": 2})
        assert never.status_code == 400
        assert "take up to 1,600,000 bytes; hidden_states_total_mb allows 1,000,000" in never.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", BODY), ("/v1/chat/completions", CHAT)])
def test_states_when_they_are_spelled_then_not_on_the_event_loop(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], stream: bool
) -> None:
    threads: list[str] = []

    def noted(*arguments: Any) -> dict[str, Any]:
        threads.append(threading.current_thread().name)
        return encoded(*arguments)

    monkeypatch.setattr(states, "encoded", noted)
    assert post(server, path, {**body, "stream": stream, "return_hidden_states": True}).status_code == 200
    assert threads
    assert "test-server" not in threads


# ---- embeddings --------------------------------------------------------------------------------------------------------


def rows_of(llm: LLM, ids: list[int]) -> torch.Tensor:
    asked = {"return_hidden_states": True, "hidden_states_for_tokens": list(range(len(ids)))}
    return llm.generate([ids], SamplingParams(temperature=0, max_tokens=1), **asked)[0].outputs[0].hidden_states  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_embedding_when_pooled_then_that_of_the_rows(
    server: RunningServer, llm: LLM, pooling: str, normalize: bool
) -> None:
    inputs = [PROMPT, PROMPT[:1], PROMPT[5:30]]
    body = {"input": inputs, "pooling": pooling, "normalize": normalize}
    answer = post(server, "/v1/embeddings", body).json()
    assert answer["object"] == "list"
    assert answer["usage"] == {"prompt_tokens": 66, "total_tokens": 66}
    for index, (ids, entry) in enumerate(zip(inputs, answer["data"], strict=True)):
        rows = rows_of(llm, ids).double()
        vector = rows.mean(0) if pooling == "mean" else rows[-1]
        expected = vector / vector.norm() if normalize else vector
        assert entry["index"] == index
        assert entry["object"] == "embedding"
        torch.testing.assert_close(torch.tensor(entry["embedding"]).double(), expected, atol=1e-6, rtol=1e-5)


def test_embedding_when_alone_or_among_others_then_the_same_bits(server: RunningServer) -> None:
    together = post(server, "/v1/embeddings", {"input": ["hello world", "the dog", "fox"]}).json()["data"]
    for text, entry in zip(["hello world", "the dog", "fox"], together, strict=True):
        alone = post(server, "/v1/embeddings", {"input": text}).json()["data"][0]
        assert alone["embedding"] == entry["embedding"]


def test_embedding_when_asked_by_the_official_client_then_both_formats_agree(server: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        name = client.models.list().data[0].id
        packed = client.embeddings.create(model=name, input=["hello", "world"])  # base64, which the client reads
        plain = client.embeddings.create(model=name, input=["hello", "world"], encoding_format="float")
    for one, other in zip(packed.data, plain.data, strict=True):
        assert torch.equal(torch.tensor(one.embedding).float(), torch.tensor(other.embedding).float())
        assert abs(torch.tensor(other.embedding).norm().item() - 1) < 1e-5


BAD_EMBEDDINGS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"input": []}, "input"),
    "empty text": ({"input": ""}, "input"),
    "mixed": ({"input": ["a", 3]}, "input"),
    "negative id": ({"input": [-1]}, "input"),
    "id beyond the vocabulary": ({"input": [10**6]}, "input"),
    "float ids": ({"input": [1.5]}, "input"),
    "too many": ({"input": ["a"] * 300}, "input"),
    "too long": ({"input": [5] * 600}, "input"),
    "dimensions": ({"input": "a", "dimensions": 8}, "dimensions"),
    "format": ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    "pooling": ({"input": "a", "pooling": "max"}, "pooling"),
    "cut": ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    "unknown": ({"input": "a", "colour": 1}, "colour"),
}


@pytest.mark.parametrize("case", BAD_EMBEDDINGS)
def test_bad_embedding_when_sent_then_400_by_name(server: RunningServer, case: str) -> None:
    body, name = BAD_EMBEDDINGS[case]
    answer = post(server, "/v1/embeddings", body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == name
    server.wait_until_idle()


# ---- beside every other feature -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", FEATURES)
def test_feature_when_states_are_asked_for_too_then_the_bits_of_the_offline_engine(
    server: RunningServer, llm: LLM, feature: str
) -> None:
    asked = {"return_hidden_states": True, "hidden_states_for_tokens": every_position(feature)}
    expected = llm.generate([PAIRS_PROMPT], SamplingParams(**FEATURES[feature]), **asked)[0].outputs
    body = {**FEATURES[feature], **asked, "prompt": PAIRS_PROMPT, "hidden_states_format": "base64"}
    body |= {"return_token_ids": True}
    choices = post(server, "/v1/completions", body).json()["choices"]
    assert len(choices) == len(expected)
    for choice, whole in zip(choices, expected, strict=True):
        assert choice["token_ids"] == whole.token_ids
        assert choice["hidden_states_positions"] == whole.hidden_states_positions
        assert torch.equal(decoded(choice), whole.hidden_states)  # type: ignore[arg-type]
    server.wait_until_idle()


# ---- activations ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_server(tiny_model: Path) -> Iterator[RunningServer]:
    with running_server(tiny_model, capture=True, steering=True, engine_process=True) as running:
        yield running


@pytest.mark.parametrize("form", ["float", "base64"])
def test_activations_when_the_server_allows_it_then_the_bits_of_the_offline_engine(
    open_server: RunningServer, llm: LLM, form: str
) -> None:
    names = ["layers.*.mlp", "norm"]
    expected = expected_of(llm, PROMPT, {"capture": names}).captured
    body = {**BODY, "capture": names, "hidden_states_format": form}
    whole = post(open_server, "/v1/completions", body).json()["choices"][0]
    carrying = [e["choices"][0] for e in events(open_server, "/v1/completions", body) if "captured" in e["choices"][0]]
    assert len(carrying) == 1
    for fields in (whole, carrying[0]):
        assert list(fields["captured"]) == list(expected)
        for name, rows in fields["captured"].items():
            states = {key.replace("values", "hidden_states"): value for key, value in rows.items()}
            assert torch.equal(decoded(states), expected[name])


def test_activations_when_not_allowed_or_unknown_then_400_by_name(
    server: RunningServer, open_server: RunningServer
) -> None:
    for asked, running in ((["norm"], server), (["colour"], open_server), ("norm", open_server), ([], open_server)):
        answer = post(running, "/v1/completions", {**BODY, "capture": asked})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "capture"
    assert "captured" not in post(open_server, "/v1/completions", BODY).text


# ---- steering ------------------------------------------------------------------------------------------------------------


def test_requests_when_some_are_steered_then_each_has_the_bits_of_the_offline_engine(
    open_server: RunningServer, llm: LLM
) -> None:
    vectors = {"layers.0": [0.1 * (column % 7 - 3) for column in range(WIDTH)]}
    asked: dict[str, Any] = {"return_hidden_states": True, "hidden_states_for_tokens": POSITIONS}
    ways: list[dict[str, Any]] = [asked, {**asked, "steering": vectors}] * 4
    expected = [expected_of(llm, PROMPT, way) for way in ways[:2]] * 4
    assert not torch.equal(expected[0].hidden_states, expected[1].hidden_states)
    with ThreadPoolExecutor(len(ways)) as pool:
        bodies = [{**BODY, **way, "hidden_states_format": "base64"} for way in ways]
        answers = list(pool.map(lambda body: post(open_server, "/v1/completions", body).json(), bodies))
    for answer, whole in zip(answers, expected, strict=True):
        assert torch.equal(decoded(answer["choices"][0]), whole.hidden_states)
    steered = events(open_server, "/v1/chat/completions", {**CHAT, "steering": vectors})
    plain = events(open_server, "/v1/chat/completions", CHAT)
    text = ["".join(e["choices"][0]["delta"].get("content") or "" for e in one) for one in (steered, plain)]
    assert text[0] != text[1]


BAD_STEERING: dict[str, Any] = {
    "unknown": {"layers.99": [0.0] * WIDTH},
    "short": {"layers.0": [0.0]},
    "texts": {"layers.0": ["1"] * WIDTH},
    "truths": {"layers.0": [True] * WIDTH},
    "too great": {"layers.0": [1e300] * WIDTH},
    "no list": {"layers.0": 1.0},
    "a list": [1.0],
    "empty": {},
    "many": {f"layers.{index}": [0.0] * WIDTH for index in range(300)},
}


@pytest.mark.parametrize("case", BAD_STEERING)
def test_bad_steering_when_sent_then_400_by_name(open_server: RunningServer, case: str) -> None:
    answer = post(open_server, "/v1/completions", {**BODY, "steering": BAD_STEERING[case]})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "steering"
    open_server.wait_until_idle()


def test_steering_when_not_allowed_then_400_that_names_the_option(server: RunningServer) -> None:
    answer = post(server, "/v1/completions", {**BODY, "steering": {"layers.0": [0.0] * WIDTH}})
    assert answer.status_code == 400
    assert "--steering" in answer.json()["error"]["message"]


def test_steering_when_it_overflows_then_that_request_ends_alone(open_server: RunningServer, llm: LLM) -> None:
    huge = {**BODY, "steering": {"layers.0": [3e38] * WIDTH, "layers.1": [3e38] * WIDTH}}
    with ThreadPoolExecutor(2) as pool:
        bad, good = pool.map(lambda body: post(open_server, "/v1/completions", body), (huge, BODY))
    assert bad.status_code == 500
    assert "not finite" in bad.json()["error"]["message"]
    assert good.json()["choices"][0]["text"] == expected_of(llm, PROMPT, {}).text
    assert post(open_server, "/v1/completions", BODY).json()["choices"] == good.json()["choices"]
