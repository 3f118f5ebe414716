"""Structured outputs end to end: what comes out satisfies what was asked, and is the same whatever the schedule."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from typer.testing import CliRunner
from utils.real_model import real_model as path_of
from utils.real_model import real_models
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams
from pellucid.api.outputs import RequestOutput
from pellucid.cli import app
from pellucid.errors import InvalidRequestError
from pellucid.structure.grammar import GrammarMatcher

BASE: dict[str, Any] = {"max_num_seqs": 20, "num_blocks": 512, "max_model_len": 400, "num_threads": 1}
# Bounded, so that a model of random weights comes to the end of them.
SHORT = {"type": "string", "maxLength": 6}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {"name": SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    "enum": {"enum": ["red", "green", 3, None, {"a": [1]}]},
    "any of": {"anyOf": [{"type": "null"}, {"const": {"x": 1}}, {"type": "array", "items": SHORT, "maxItems": 2}]},
    "references": {
        "$ref": "#/$defs/pair",
        "$defs": {
            "pair": {"type": "object", "properties": {"l": {"$ref": "#/$defs/leaf"}}, "required": ["l"],
                     "additionalProperties": False},
            "leaf": {"type": "array", "prefixItems": [{"type": "boolean"}, SHORT], "items": False, "minItems": 2},
        },
    },
    "pattern and format": {
        "type": "object",
        "properties": {"day": {"type": "string", "format": "date"}, "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]$"}},
        "required": ["day", "code"],
        "additionalProperties": False,
    },
    "numbers": {
        "type": "array", "minItems": 2, "maxItems": 2,
        "items": {"type": "integer", "minimum": -5, "maximum": 40, "multipleOf": 5},
    },
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "regex": {"regex": r"[A-Z][a-z]{1,5} \d{2}(\.\d)?"},
    "unicode regex": {"regex": r"(日本|é|\U0001F600){1,3}!"},
    "choice": {"choice": ["yes", "no", "no way", "línea"]},
    "grammar": {"grammar": 'start: "(" term (op term){0,2} ")"\nop: " + " | " * "\nterm: /[0-9]{1,3}/'},
}
STRUCTURES = {**{name: {"json": schema} for name, schema in SCHEMAS.items()}, **OTHERS}
PATTERNS = {
    "regex": OTHERS["regex"]["regex"],
    "unicode regex": "(日本|é|\U0001f600){1,3}!",
    "choice": "yes|no|no way|línea",
    "grammar": r"\(\d{1,3}( [+*] \d{1,3}){0,2}\)",
}


def assert_satisfies(name: str, text: str) -> None:
    if name in SCHEMAS:
        checker = jsonschema.Draft202012Validator(SCHEMAS[name], format_checker=jsonschema.FormatChecker())
        checker.validate(json.loads(text))
    else:
        assert re.fullmatch(PATTERNS[name], text), text


def asked(name: str, index: int = 0, **more: Any) -> SamplingParams:
    """Every second one is greedy, the others draw."""
    sampled = {"temperature": 0.0} if index % 2 == 0 else {"temperature": 1.1, "seed": 50 + index, "top_p": 0.95}
    values = {"max_tokens": 200, "structured_outputs": STRUCTURES[name], **sampled, **more}
    return SamplingParams.from_dict(values)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_checkpoint(tmp_path_factory.mktemp("structured"), "llama"))


@pytest.fixture(scope="module", params=["random", *real_models()])
def llm(request: pytest.FixtureRequest, tiny_model: str) -> Any:
    model = tiny_model if request.param == "random" else str(path_of(request.param))
    with LLM(model, **BASE) as loaded:
        yield loaded


def test_every_structure_when_asked_of_a_model_then_each_text_satisfies_it(llm: LLM) -> None:
    cases = [(name, index) for name in STRUCTURES for index in range(4)]
    outputs = llm.generate(["Answer: "] * len(cases), [asked(name, index) for name, index in cases])
    for (name, index), output in zip(cases, outputs, strict=True):
        assert output["finish_reason"] == "stop", (name, index, output["text"], output.outputs[0].error)
        assert_satisfies(name, output["text"])
    assert len({output["text"] for output in outputs}) > len(STRUCTURES)


def test_conversation_when_a_schema_is_asked_then_the_answer_is_of_it(real_model: Path) -> None:
    with LLM(str(real_model), **BASE) as llm:
        messages = [{"role": "user", "content": "Give me a person of 30 years named Bob as JSON."}]
        params = SamplingParams.from_dict(
            {"temperature": 0, "max_tokens": 60, "structured_outputs": {"json_object": True}}
        )
        answer = llm.chat(messages, params)[0]
    if answer["finish_reason"] == "stop":
        assert isinstance(json.loads(answer["text"]), dict)
    else:
        assert answer["finish_reason"] == "length"
        assert answer["text"].startswith("{")


# ---- the same bits --------------------------------------------------------------------------------------------------

NAMES = tuple(STRUCTURES)


def batch(vocab_size: int) -> list[tuple[list[int], SamplingParams]]:
    """Structured requests and as many neighbours without structure, of many lengths."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for index in range(16):
        prompt = torch.randint(3, vocab_size, (1 + 7 * index,), generator=generator).tolist()
        plain = SamplingParams(temperature=0.7, seed=index, max_tokens=30, logprobs=2, ignore_eos=True)
        params = asked(NAMES[index // 2 % len(NAMES)], index // 2, logprobs=2) if index % 2 == 0 else plain
        made.append((prompt, params))
    return made


def bits_of(output: RequestOutput) -> tuple[torch.Tensor, torch.Tensor]:
    choice = output.outputs[0]
    rows = [row[token].logprob for row in choice.logprobs or [] for token in sorted(row)]
    return torch.tensor(choice.token_ids), torch.tensor(rows, dtype=torch.float64)


def run(model: str, *, alone: bool = False, only: int | None = None, **config: Any) -> tuple[list[Any], LLM]:
    with LLM(model, **{**BASE, **config}) as llm:
        made = batch(min(llm.engine.vocab_size, 290))
        made = made if only is None else made[only::2]
        if alone:
            return [bits_of(llm.generate([prompt], params)[0]) for prompt, params in made], llm
        return [bits_of(one) for one in llm.generate([p for p, _ in made], [params for _, params in made])], llm


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one[0], other[0]), f"tokens of request {index} differ"
        assert torch.equal(one[1], other[1]), f"logprobs of request {index} differ"


NGRAM = {"speculative_method": "ngram", "prompt_lookup_min": 1, "speculative_max_num_seqs": 20}
SCHEDULES: dict[str, dict[str, Any]] = {
    "chunks of 16": {"max_num_batched_tokens": 16},
    "chunks of 512, few at once": {"max_num_batched_tokens": 512, "max_num_seqs": 3},
    "preempted": {"num_blocks": 27},
    "preempted, ahead, cached": {"num_blocks": 27, "async_scheduling": True, "enable_prefix_caching": True},
    "ahead": {"async_scheduling": True},
    "drafts": NGRAM,
    "drafts, preempted": {**NGRAM, "num_blocks": 27, "num_threads": 2},
    "eager": {"enforce_eager": True},
}


@pytest.fixture(scope="module")
def expected(tiny_model: str) -> list[Any]:
    return run(tiny_model, alone=True, enable_prefix_caching=False)[0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_structured_among_neighbours_when_scheduled_otherwise_then_same_bits(
    tiny_model: str, expected: list[Any], schedule: str
) -> None:
    found, llm = run(tiny_model, **SCHEDULES[schedule])
    assert_same(found, expected)
    records = llm.engine.trace.records
    if "preempted" in schedule:
        assert any(record.preempted for record in records)
    if "drafts" in schedule:
        assert sum(record.n_accepted_tokens for record in records) > 0


def test_neighbours_when_nobody_asks_for_structure_then_same_bits_as_beside_it(
    tiny_model: str, expected: list[Any]
) -> None:
    assert_same(run(tiny_model, only=1)[0], expected[1::2])


@pytest.mark.slow
def test_the_real_model_when_together_preempted_ahead_or_with_drafts_then_same_bits(real_model: Path) -> None:
    model = str(real_model)
    alone = run(model, alone=True)[0]
    assert_same(run(model, num_blocks=27, async_scheduling=True)[0], alone)
    assert_same(run(model, **NGRAM, max_num_batched_tokens=64)[0], alone)


def test_choices_when_three_are_asked_then_each_has_its_own_way_through(tiny_model: str) -> None:
    with LLM(tiny_model, **BASE) as llm:
        params = asked("object", 1, n=3)
        output = llm.generate(["hello"], params)[0]
        fewer = llm.generate(["hello"], asked("object", 1, n=1))[0]
    assert len({choice.text for choice in output.outputs}) == 3
    for choice in output.outputs:
        assert_satisfies("object", choice.text)
    assert torch.equal(torch.tensor(output.outputs[0].token_ids), torch.tensor(fewer.outputs[0].token_ids))


# ---- beside other parameters ------------------------------------------------------------------------------------------

# what else is asked of a choice between yes and no, and how it ends
BESIDE: dict[str, tuple[dict[str, Any], str]] = {
    "min_tokens": ({"min_tokens": 20}, "stop"),  # the structure is complete before: it ends
    "ignore_eos": ({"ignore_eos": True, "max_tokens": 20}, "length"),  # what follows is the end token alone
    "few tokens": ({"max_tokens": 1}, "length"),
    "allowed tokens of which none fits the second": ({"allowed_token_ids": [91]}, "error"),
    "penalties": ({"repetition_penalty": 1.5, "presence_penalty": 1.0, "logit_bias": {"9": 50.0}}, "stop"),
    "streamed specials": ({"skip_special_tokens": False}, "stop"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_choice_when_asked_beside_another_parameter_then_it_ends_as_documented(tiny_model: str, case: str) -> None:
    more, ending = BESIDE[case]
    with LLM(tiny_model, **BASE) as llm:
        params = {
            "max_tokens": 40,
            "structured_outputs": {"choice": ["yes indeed", "no thanks"]},
            "temperature": 0,
            **more,
        }
        output, neighbour = llm.generate(["a", "a"], [SamplingParams.from_dict(params), asked("enum")])
    assert output["finish_reason"] == ending
    assert neighbour["finish_reason"] == "stop"
    if ending == "error":
        assert "structured_outputs" in str(output.outputs[0].error)
    elif ending == "stop" or case == "ignore_eos":
        assert output["text"] in ("yes indeed", "no thanks")
    else:
        assert any(choice.startswith(output["text"]) for choice in ("yes indeed", "no thanks"))


def test_stop_string_when_the_structure_has_it_then_the_text_ends_there(tiny_model: str) -> None:
    with LLM(tiny_model, **BASE) as llm:
        output = llm.generate(["a"], asked("object", stop=['"age"']))[0]
    assert output["finish_reason"] == "stop"
    assert output.outputs[0].stop_reason == '"age"'
    assert output["text"].startswith("{")
    assert "age" not in output["text"]


@pytest.mark.parametrize("config", [{}, {"async_scheduling": True}, NGRAM], ids=["plain", "ahead", "drafts"])
@pytest.mark.parametrize("where", ["fill", "accept"])
def test_matcher_when_it_fails_midway_then_its_request_alone_ends_with_error(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch, where: str, config: dict[str, Any]
) -> None:
    calls: dict[int, int] = {}
    real = getattr(GrammarMatcher, where)
    victims: list[GrammarMatcher] = []

    def failing(self: GrammarMatcher, *given: Any) -> Any:
        victims.append(self) if not victims else None
        calls[id(self)] = calls.get(id(self), 0) + 1
        if self is victims[0] and calls[id(self)] == 5:
            self._do(lambda: (_ for _ in ()).throw(RuntimeError("broken")))
        return real(self, *given)

    monkeypatch.setattr(GrammarMatcher, where, failing)
    with LLM(tiny_model, **{**BASE, **config}) as llm:
        outputs = llm.generate(["a", "b", "c"], [asked("object"), asked("object", 1), SamplingParams(max_tokens=30)])
        assert llm.kv_cache_stats()["used_blocks"] == 0
    assert [output["finish_reason"] for output in outputs[:2]] == ["error", "stop"]
    assert outputs[0].outputs[0].error == "structured_outputs cannot go on: broken"
    assert_satisfies("object", outputs[1]["text"])
    assert outputs[2]["finish_reason"] in ("stop", "length")


def test_bad_schema_when_submitted_then_refused_and_nothing_is_queued(tiny_model: str) -> None:
    with LLM(tiny_model, **BASE) as llm:
        params = SamplingParams.from_dict({"structured_outputs": {"json": {"type": "strin"}}})
        with pytest.raises(InvalidRequestError, match="Invalid type: strin") as caught:
            llm.client.submit("hello", params)
        assert caught.value.field == "structured_outputs.json"
        assert not llm.client.has_unfinished


def test_model_without_tokenizer_when_asked_for_structure_then_refused(tmp_path: Path) -> None:
    model = build_tiny_checkpoint(tmp_path, "llama", with_tokenizer=False)
    with LLM(str(model), **BASE) as llm, pytest.raises(InvalidRequestError, match="need a tokenizer"):
        llm.generate([[5, 6]], asked("choice"))


def test_command_line_when_a_schema_or_regex_is_given_then_the_text_is_of_it(tiny_model: str, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMAS["array"]))
    small = ["--model", tiny_model, "--num-blocks", "64", "--num-threads", "1", "--max-tokens", "100"]
    made = CliRunner().invoke(app, ["generate", "hello", "--json-schema", str(schema), *small])
    assert_satisfies("array", made.stdout.rstrip("\n"))
    made = CliRunner().invoke(app, ["generate", "hello", "--regex", OTHERS["regex"]["regex"], *small])
    assert_satisfies("regex", made.stdout.rstrip("\n"))
    made = CliRunner().invoke(app, ["generate", "hello", "--json-schema", str(tmp_path / "none"), *small])
    assert isinstance(made.exception, InvalidRequestError)
    assert "cannot be read" in str(made.exception)
