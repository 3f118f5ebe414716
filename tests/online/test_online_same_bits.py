"""What comes over HTTP is what the engine makes offline, token by token, streamed or whole, by thread or by process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from utils.http_server import RunningServer, running_server

from pellucid import LLM, SamplingParams

_PROMPTS = ["hello world", "the quick brown fox", [5, 6, 7, 8]]
_PARAMS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 24},
    {"temperature": 1.0, "seed": 11, "max_tokens": 24, "top_p": 0.9},
    {"temperature": 0.8, "seed": 5, "max_tokens": 16, "n": 3, "presence_penalty": 1.0, "min_p": 0.02},
]


@pytest.fixture(scope="module", params=[False, True], ids=["thread", "process"])
def server(tiny_model: Any, request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    with running_server(tiny_model, engine_process=request.param) as running:
        yield running


@pytest.fixture(scope="module")
def expected(tiny_model: Any) -> list[list[list[tuple[str, list[int]]]]]:
    """(text, ids) by parameters, prompt and choice."""
    with LLM(tiny_model, num_blocks=256, num_threads=1) as llm:
        return [
            [
                [
                    (choice.text, choice.token_ids)
                    for choice in llm.generate([prompt], SamplingParams(**params))[0].outputs  # type: ignore[list-item]
                ]
                for prompt in _PROMPTS
            ]
            for params in _PARAMS
        ]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("number", range(len(_PARAMS)))
def test_given_prompts_when_served_then_tokens_are_those_of_llm_generate(
    server: RunningServer, expected: Any, number: int, stream: bool
) -> None:
    for prompt, wanted in zip(_PROMPTS, expected[number], strict=True):
        body = {"prompt": prompt, **_PARAMS[number], "return_token_ids": True, "stream": stream}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)
        assert _choices(answer, stream) == wanted


def _choices(answer: httpx.Response, stream: bool) -> list[tuple[str, list[int]]]:
    if not stream:
        return [(choice["text"], choice["token_ids"]) for choice in answer.json()["choices"]]
    texts: dict[int, str] = {}
    ids: dict[int, list[int]] = {}
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
                ids.setdefault(choice["index"], []).extend(choice["token_ids"])
    return [(texts[index], ids[index]) for index in sorted(texts)]
