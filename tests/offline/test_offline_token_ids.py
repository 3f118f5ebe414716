"""Ids that the model has not, by all ways in: refused by name before the engine, and nobody beside them notices.

The tokenizer has tokens beyond the embedding, as files often do whose makers added a pad token and resized nothing.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from utils.async_engines import KINDS, start_engine
from utils.neighbours import BASE, BEYOND, Blind, build_model, prompt_of

from pellucid import LLM, SamplingParams
from pellucid.commands.jsonl import run_jsonl
from pellucid.errors import InvalidRequestError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
TEXT = rf"prompt: the tokenizer makes '{BEYOND}' token 309, which the model has not; token ids are in \[0, 300\)"
LIST = r"prompt\[\d+\] is 309; token ids are in \[0, 300\)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("token_ids"))


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, **BASE) as llm:
        yield llm


def params(**values: Any) -> SamplingParams:
    return SamplingParams(max_tokens=2, **values)


WAYS: dict[str, tuple[Callable[[LLM], Any], str]] = {
    "text": (lambda m: m.generate(f"b {BEYOND}", GREEDY), TEXT),
    "texts": (lambda m: m.generate(["a", f"b {BEYOND}", "c"], GREEDY), TEXT),
    "ids": (lambda m: m.generate([[5, 309]], GREEDY), r"prompt\[1\] is 309"),
    "stream": (lambda m: list(m.stream(f"b {BEYOND}", GREEDY)), TEXT),
    "stream of ids": (lambda m: list(m.stream([309], GREEDY)), r"prompt\[0\] is 309"),
    "chat": (lambda m: m.chat([{"role": "user", "content": BEYOND}], GREEDY), LIST),
    "score of a prompt": (lambda m: m.score([BEYOND], ["a"]), LIST),
    "score of a continuation": (lambda m: m.score(["a"], [BEYOND]), LIST),
    "score of ids": (lambda m: m.score([[5]], [[309]]), LIST),
    "client": (lambda m: m.client.submit(BEYOND, GREEDY), TEXT),
    "bad word": (
        lambda m: m.generate("a", params(bad_words=["x", BEYOND])),
        rf"bad_words: the tokenizer makes '{BEYOND}' token 309, which the model has not",
    ),
    "stop token": (lambda m: m.generate("a", params(stop_token_ids=[2, 309])), "stop_token_ids names token 309"),
    "allowed token": (lambda m: m.generate("a", params(allowed_token_ids=[309])), "allowed_token_ids names token 309"),
    "bias": (lambda m: m.generate("a", params(logit_bias={309: 1.0})), "logit_bias names token 309"),
}


@pytest.mark.parametrize("way", WAYS)
def test_id_beyond_the_embedding_when_given_then_refused_by_name_and_a_running_request_goes_on(
    llm: LLM, way: str
) -> None:
    call, words = WAYS[way]
    prompt = prompt_of(9, 60)
    expected = llm.generate([prompt], GREEDY)[0]["token_ids"]
    running = llm.client.submit(prompt, GREEDY)
    for _ in range(4):
        llm.client.step()
    with pytest.raises(InvalidRequestError, match=words) as caught:
        call(llm)
    assert caught.value.param == words.split(":")[0].split(" ")[0].split("\\")[0]
    while not llm.client.is_finished(running):
        llm.client.step()
    output = llm.client.collect(running)
    assert output is not None
    assert output["token_ids"] == expected
    llm.client.release(running)
    assert llm.kv_cache_stats()["used_blocks"] == 0


def test_lines_of_a_file_when_some_have_ids_beyond_the_embedding_then_those_lines_alone_are_refused(llm: LLM) -> None:
    """Texts, ids and conversations, in one batch with good ones."""
    good: list[dict[str, Any]] = [{"prompt": "hello world"}, {"prompt": prompt_of(20, 61)}, {"prompt": "the quick"}]
    bad: list[dict[str, Any]] = [
        {"prompt": f"x {BEYOND}"},
        {"prompt": [5, 309]},
        {"messages": [{"role": "user", "content": BEYOND}]},
        {"prompt": "a", "bad_words": [BEYOND]},
        {"prompt": "a", "repetition_penalty": 5e-324},
    ]
    lines = [good[0], bad[0], bad[1], good[1], bad[2], bad[3], bad[4], good[2]]
    defaults = {"temperature": 0, "max_tokens": 9, "ignore_eos": True}
    found, alone = io.StringIO(), io.StringIO()
    source = io.BytesIO("\n".join(map(json.dumps, lines)).encode())
    assert run_jsonl(llm, source, found.write, defaults, lambda: None) == len(bad)
    assert (
        run_jsonl(llm, io.BytesIO("\n".join(map(json.dumps, good)).encode()), alone.write, defaults, lambda: None) == 0
    )
    results = [json.loads(line) for line in found.getvalue().splitlines()]
    assert ["error" in result for result in results] == [line in bad for line in lines]
    assert all(
        "309" in result["error"] or "repetition_penalty" in result["error"] for result in results if "error" in result
    )
    wanted = [json.loads(line)["token_ids"] for line in alone.getvalue().splitlines()]
    assert [result["token_ids"] for result in results if "error" not in result] == wanted


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", KINDS)
async def test_id_beyond_the_embedding_when_submitted_to_a_running_engine_then_refused_and_the_others_go_on(
    model: Path, kind: str
) -> None:
    engine = start_engine(kind, model, **BASE)
    try:
        prompts = [prompt_of(length, 62 + length) for length in (3, 17, 30)]
        expected = [(await engine.generate(prompt, GREEDY)).outputs[0].token_ids for prompt in prompts]
        running = [asyncio.create_task(engine.generate(prompt, GREEDY)) for prompt in prompts]
        for prompt, values in (
            (f"b {BEYOND}", {}),
            ([5, 309], {}),
            ([5, 2**40], {}),
            ("a", {"bad_words": [BEYOND]}),
            ("a", {"stop_token_ids": [309]}),
        ):
            with pytest.raises(InvalidRequestError):
                await engine.generate(prompt, params(**values))
        blind = Blind(**vars(engine._checker))
        engine._checker = blind  # the front end lets it pass: the owner still refuses it
        with pytest.raises(InvalidRequestError, match=r"prompt\[1\] is 309"):
            await engine.generate([5, 309], GREEDY)
        outputs = [await one for one in running]
    finally:
        engine.close()
    assert [output.outputs[0].token_ids for output in outputs] == expected
