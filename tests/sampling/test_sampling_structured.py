"""Structures: what is refused and how it is said, masks of two kinds of vocabulary, and what a matcher does with a token."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from utils.text_tokenizers import byte_level_metadata, sentencepiece_metadata

from pellucid.api.sampling_params import SamplingParams
from pellucid.api.structured_outputs import (
    MAX_CHOICE_CHARACTERS,
    MAX_CHOICES,
    MAX_GRAMMAR_DEPTH,
    MAX_REGEX_CHARACTERS,
    MAX_SCHEMA_BYTES,
    MAX_SCHEMA_DEPTH,
    StructuredOutputsParams,
)
from pellucid.core import abi
from pellucid.errors import InvalidRequestError
from pellucid.sampling.native import NativeRow, NativeSampler
from pellucid.sampling.reference import Sampler, row_stats_numpy
from pellucid.sampling.sampler import SamplingRow
from pellucid.structure import grammar as grammar_module
from pellucid.structure.grammar import CompiledGrammar, compile_grammar
from pellucid.text.tokenizer import Tokenizer


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def chain_of_references(length: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {
        f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(length)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{length}": {"type": "integer"}}}


CIRCLE: dict[str, Any] = {}
CIRCLE["items"] = CIRCLE

# what is asked, the field that the error names, what its text has
MALFORMED: list[tuple[Any, str, str]] = [
    ("json", "structured_outputs", "it must be an object"),
    ({}, "structured_outputs", "nothing; it must have exactly one of json, regex"),
    ({"regex": "a", "json_object": True}, "structured_outputs", "has regex, json_object"),
    ({"jsn": {}}, "structured_outputs", "unknown key 'jsn'"),
    ({"json": 5}, "structured_outputs.json", "is 5; it must be a JSON schema"),
    ({"json": "[1"}, "structured_outputs.json", "is no JSON: Expecting"),
    ({"json": "[1]"}, "structured_outputs.json", "it must be a JSON schema: an object"),
    ({"json": '{"maximum": NaN}'}, "structured_outputs.json", "is no JSON"),
    ({"json": {"maximum": float("inf")}}, "structured_outputs.json", "is no JSON"),
    ({"json": {"enum": {1, 2}}}, "structured_outputs.json", "{1, 2} is no JSON value"),
    ({"json": {"x-guidance": {"lenient": True}}}, "structured_outputs.json", "'x-guidance'"),
    ({"json": {"title": "\ud800"}}, "structured_outputs.json", "lone surrogate U+D800"),
    ({"json": {"title": "x" * MAX_SCHEMA_BYTES}}, "structured_outputs.json", f"the limit is {MAX_SCHEMA_BYTES:,}"),
    ({"json": '{"title": "' + "x" * MAX_SCHEMA_BYTES + '"}'}, "structured_outputs.json", "the limit is"),
    ({"json": nested(MAX_SCHEMA_DEPTH + 1)}, "structured_outputs.json", f"nests more than {MAX_SCHEMA_DEPTH}"),
    ({"json": '{"a":' * 20_000 + "1" + "}" * 20_000}, "structured_outputs.json", "the limit is 100"),
    ({"json": "[" * 60_000}, "structured_outputs.json", "nests too deeply"),
    ({"json": CIRCLE}, "structured_outputs.json", f"the limit is {MAX_SCHEMA_DEPTH}"),
    ({"regex": ""}, "structured_outputs.regex", "is empty"),
    ({"regex": 5}, "structured_outputs.regex", "it must be a string"),
    ({"regex": "a" * (MAX_REGEX_CHARACTERS + 1)}, "structured_outputs.regex", f"limit is {MAX_REGEX_CHARACTERS:,}"),
    ({"regex": "\udfff"}, "structured_outputs.regex", "lone surrogate U+DFFF at position 0"),
    ({"choice": []}, "structured_outputs.choice", "has 0 entries"),
    ({"choice": "yes"}, "structured_outputs.choice", "it must be a list of strings"),
    ({"choice": ["a", 1]}, "structured_outputs.choice[1]", "it must be a string"),
    ({"choice": [""]}, "structured_outputs.choice[0]", "is empty"),
    ({"choice": ["a"] * (MAX_CHOICES + 1)}, "structured_outputs.choice", f"it must have 1 to {MAX_CHOICES:,}"),
    ({"choice": ["a" * (MAX_CHOICE_CHARACTERS + 1)]}, "structured_outputs.choice[0]", "the limit is"),
    ({"grammar": "start: " + "(" * 60_000}, "structured_outputs.grammar", f"the limit is {MAX_GRAMMAR_DEPTH}"),
    ({"json_object": 1}, "structured_outputs.json_object", "it must be true or false"),
    ({"json_object": True, "whitespace_pattern": 3}, "structured_outputs.whitespace_pattern", "must be a string"),
    ({"regex": "a", "whitespace_pattern": " "}, "structured_outputs.whitespace_pattern", "beside regex"),
    ({"choice": ["a"], "disable_any_whitespace": True}, "structured_outputs.disable_any_whitespace", "beside choice"),
]

# what is asked, and what the error says
NOT_COMPILED: list[tuple[dict[str, Any], str]] = [
    ({"json": {"type": "strin"}}, "Invalid type: strin"),
    ({"json": {"type": "string", "format": "zzz"}}, "Unknown format: zzz"),
    ({"json": {"not": {}}}, "Unimplemented keys"),
    ({"json": {"enum": []}}, "Unsatisfiable schema"),
    ({"json": {"$ref": "#"}}, "no text satisfies it"),
    ({"json": {"$ref": "http://127.0.0.1:1/x"}}, "does not fetch"),
    ({"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "Unsatisfiable schema"),
    ({"json": {"type": "string", "pattern": "(?=x)x"}}, "look-around"),
    ({"json": chain_of_references(1500)}, "takes more than"),
    ({"regex": "(((("}, "unclosed group"),
    ({"regex": r"(a)\1"}, "backreferences are not supported"),
    ({"regex": r"[^\s\S]"}, "no text satisfies it"),
    ({"regex": "(" * 3000 + ")" * 3000}, "invalid regex"),
    ({"grammar": "start: undefined"}, 'unknown name: "undefined"'),
    ({"grammar": 'begin: "a"'}, "no start rule"),
    ({"grammar": "start: (("}, "Expected token"),
    ({"grammar": "root ::= ("}, "Expected"),
    ({"grammar": "start: " + "(" * 90 + '"a"' + ")" * 90}, "too deeply nested"),
    (
        {"grammar": "\n".join(["start: r0", *(f'r{i}: r{i + 1} | "x"' for i in range(4000)), 'r4000: "z"'])},
        "takes more",
    ),
]

# what is asked, texts that satisfy it, texts that do not
TEXTS: list[tuple[dict[str, Any], Sequence[str], Sequence[str]]] = [
    ({"regex": r"\d{3}-\d{2}"}, ["555-12"], ["555-1", "555-123", " 555-12"]),
    ({"regex": r"^(yes|no)$"}, ["yes", "no"], ["maybe", "yesno"]),
    ({"regex": "[é日]+x?"}, ["é", "日日x"], ["e", "xx"]),
    ({"choice": ['say "a"', "back\\slash", "日本", "line\nend", "\U0001f600", "no", "no way"]},
     ['say "a"', "back\\slash", "日本", "line\nend", "\U0001f600", "no", "no way"], ["sa", "no w", "yes"]),
    ({"json_object": True}, ['{"a": [1, {}]}', "{}"], ["[]", "{", '{"a": }', '{"a":   1}']),
    ({"json_object": True, "disable_any_whitespace": True}, ['{"a":1}'], ['{"a": 1}']),
    ({"json_object": True, "whitespace_pattern": "  "}, ['{"a":  1}'], ['{"a": 1}']),
    ({"json": {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"enum": [1, "x"]}}, "required": ["b", "a"]}},
     ['{"b": 1, "a": "x"}'], ['{"a": 1, "b": 1}', '{"b": 1.5, "a": 1}']),
    ({"json": '{"type": "array", "items": {"type": "boolean"}, "maxItems": 2}'}, ["[]", "[true, false]"], ["[1]"]),
    ({"grammar": 'start: "a" middle "c"\nmiddle: /b+/'}, ["abc", "abbbc"], ["ac", "abb"]),
    ({"grammar": 'root ::= "a" | "b" root'}, ["a", "bba"], ["b", "ab"]),
]  # fmt: skip


def byte_level() -> Tokenizer:
    return Tokenizer.from_gguf(byte_level_metadata())


def sentencepiece() -> Tokenizer:
    return Tokenizer.from_gguf(sentencepiece_metadata())


TOKENIZERS = {"byte level": byte_level, "sentencepiece": sentencepiece}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


def structure(**asked: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**asked)


def bits_of(compiled: CompiledGrammar, output: Sequence[int] = ()) -> set[int]:
    """The tokens that may come behind `output`."""
    matcher = compiled.matcher(output)
    matcher.fill()
    assert matcher.error is None
    return set(np.flatnonzero(np.unpackbits(matcher.mask.view(np.uint8), bitorder="little")).tolist())


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids whose bytes join to `text`: without the space that SentencePiece puts before a text."""
    lead = tokenizer.encode("\n", add_special_tokens=False)
    ids = tokenizer.encode("\n" + text, add_special_tokens=False)
    assert ids[: len(lead)] == lead
    return ids[len(lead) :]


@pytest.mark.parametrize(("asked", "param", "text"), MALFORMED, ids=range(len(MALFORMED)))
def test_structure_when_malformed_then_refused_with_field_and_limit(asked: Any, param: str, text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams.from_dict({"structured_outputs": asked})
    assert caught.value.param == "structured_outputs"
    assert caught.value.field == param
    assert text in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("asked", "text"), NOT_COMPILED, ids=range(len(NOT_COMPILED)))
def test_structure_when_it_cannot_be_compiled_then_refused_with_the_reason(asked: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        compile_grammar(structure(**asked), byte_level())
    assert caught.value.field == f"structured_outputs.{next(iter(asked))}"
    assert text in str(caught.value)
    assert len(str(caught.value)) < 500


def test_structure_that_explodes_when_compiled_then_refused_and_the_next_one_compiles() -> None:
    patterns = [{"type": "string", "pattern": f".*a.{{{i}}}$"} for i in range(1, 30)]
    with pytest.raises(InvalidRequestError, match="takes more than"):
        compile_grammar(structure(json={"allOf": patterns}), byte_level())
    assert bits_of(compile_grammar(structure(regex="after that"), byte_level()))


@pytest.mark.parametrize(("asked", "good", "bad"), TEXTS, ids=range(len(TEXTS)))
def test_structure_when_texts_are_followed_then_exactly_those_that_satisfy_it_pass(
    tokenizer: Tokenizer, asked: dict[str, Any], good: Sequence[str], bad: Sequence[str]
) -> None:
    compiled = compile_grammar(structure(**asked), tokenizer)
    eos = set(tokenizer.eos_token_ids)
    for text in good:
        ids = tokens_of(tokenizer, text)
        for end, token_id in enumerate(ids):
            assert token_id in bits_of(compiled, ids[:end]), (text, end)
        assert eos <= bits_of(compiled, ids), text
    for text in bad:
        ids = tokens_of(tokenizer, text)
        followed = all(token_id in bits_of(compiled, ids[:end]) for end, token_id in enumerate(ids))
        assert not (followed and eos <= bits_of(compiled, ids)), text


def test_first_mask_when_compared_with_all_tokens_then_exactly_those_whose_bytes_begin_a_match(
    tokenizer: Tokenizer,
) -> None:
    from pellucid.text.detokenizer import token_bytes_of

    compiled = compile_grammar(structure(regex="[a-e ]{1,9}"), tokenizer)
    pieces = token_bytes_of(tokenizer, tokenizer.vocab_size)
    special = tokenizer.special_token_ids
    fitting = {i for i, piece in enumerate(pieces) if re.fullmatch(b"[a-e ]{1,9}", piece) and i not in special}
    assert bits_of(compiled) == fitting
    assert len(fitting) > 5


def test_padding_of_the_output_matrix_when_masked_then_never_allowed(tokenizer: Tokenizer) -> None:
    compiled = compile_grammar(structure(regex=r"(.|\n)*"), tokenizer, vocab_size=tokenizer.vocab_size + 100)
    assert max(bits_of(compiled)) < tokenizer.vocab_size


def test_end_tokens_beyond_the_output_when_compiled_then_the_others_end_it(tokenizer: Tokenizer) -> None:
    own = tokenizer.eos_token_ids[0]
    compiled = compile_grammar(structure(choice=["a"]), tokenizer, eos_token_ids=[10**6, own, -1])
    matcher = compiled.matcher(tokens_of(tokenizer, "a"))
    matcher.fill()
    assert matcher.mask[own // 32] >> (own % 32) & 1
    with pytest.raises(InvalidRequestError, match="needs a model with an end token"):
        compile_grammar(structure(choice=["a"]), tokenizer, eos_token_ids=[10**6])


def test_same_structure_when_asked_for_by_many_threads_then_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    real = grammar_module._compile
    monkeypatch.setattr(grammar_module, "_compile", lambda *given: calls.append(given) or real(*given))
    found: list[CompiledGrammar] = []
    tokenizers = [byte_level(), byte_level()]

    def ask(index: int) -> None:
        found.append(compile_grammar(structure(regex="once only"), tokenizers[index % 2]))

    threads = [threading.Thread(target=ask, args=(index,), daemon=True) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(calls) == 1
    assert len({id(one) for one in found}) == 1
    assert len(found) == 8


def test_matcher_when_given_a_token_that_does_not_fit_then_error_that_stays_and_others_go_on() -> None:
    tokenizer = byte_level()
    compiled = compile_grammar(structure(regex="abc"), tokenizer)
    broken, whole = compiled.matcher(), compiled.matcher()
    assert not broken.accept(tokens_of(tokenizer, "z")[0])
    broken.fill()
    assert not broken.mask.any()
    assert "structured_outputs cannot go on" in str(broken.error)
    assert all(whole.accept(token_id) for token_id in tokens_of(tokenizer, "abc"))
    assert whole.is_complete


def test_matcher_when_others_have_used_up_the_lexer_then_its_masks_are_those_of_a_fresh_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = byte_level()
    monkeypatch.setitem(grammar_module.LIMITS, "max_lexer_states", 600)
    a, b = (tokens_of(tokenizer, letter)[0] for letter in "ab")
    compiled = compile_grammar(structure(regex="[ab]*a[ab]{9}c"), tokenizer)
    draw = np.random.default_rng(1)
    for _ in range(30):
        matcher, plain = compiled.matcher(), []
        for bit in draw.integers(0, 2, 60):
            matcher.fill()
            assert matcher.error is None
            assert set(bits_of(compiled, plain)) >= {a, b}
            plain.append(int((a, b)[bit]))
            assert matcher.accept(plain[-1])
    assert compiled._generation > 0


def test_matcher_when_a_grammar_has_too_many_readings_then_error_before_a_mask_takes_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert grammar_module.LIMITS["step_max_items"] <= 10_000  # some 20 ms
    monkeypatch.setitem(grammar_module.LIMITS, "step_max_items", 300)
    tokenizer = byte_level()
    matcher = compile_grammar(structure(grammar="start: s\ns: s s s | /[a-z ]/"), tokenizer).matcher()
    for token_id in tokens_of(tokenizer, "the quick brown fox " * 20):
        matcher.fill()
        if not matcher.accept(token_id):
            break
    assert "Too many items (limit 300" in str(matcher.error)


def test_matcher_when_the_text_is_complete_then_only_ends_and_they_may_repeat() -> None:
    tokenizer = byte_level()
    matcher = compile_grammar(structure(choice=["ab"]), tokenizer).matcher(tokens_of(tokenizer, "ab"))
    for _ in range(3):
        matcher.fill()
        allowed = np.flatnonzero(np.unpackbits(matcher.mask.view(np.uint8), bitorder="little")).tolist()
        assert set(allowed) == set(tokenizer.eos_token_ids)
        assert matcher.accept(allowed[0])


def test_sampler_when_rows_have_masks_then_as_the_oracle_and_as_alone() -> None:
    tokenizer = byte_level()
    vocab_size = tokenizer.vocab_size
    compiled = compile_grammar(
        structure(json={"type": "object", "additionalProperties": {"type": "integer"}}), tokenizer
    )
    prefixes = ["", "{", '{"', '{"ab": 1', '{"ab": 1}']
    generator = np.random.default_rng(5)
    logits = generator.standard_normal((2 * len(prefixes), vocab_size)).astype(np.float32) * 3

    def row(index: int, masked: bool) -> SamplingRow:
        params = SamplingParams(
            temperature=0.0 if index % 2 else 1.3, top_p=0.9, min_tokens=9, max_tokens=9, logprobs=2
        )
        output = tokens_of(tokenizer, prefixes[index // 2])
        matcher = compiled.matcher(output) if masked else None
        return SamplingRow(params, 7, index, (), output, eos_token_ids=tokenizer.eos_token_ids, matcher=matcher)

    rows = range(len(logits))
    with contextlib.closing(abi.Context(num_threads=2)) as context:
        native = NativeSampler(context, vocab_size, len(logits))
        together = native.sample(logits, [NativeRow(row(i, i % 3 != 0)) for i in rows])
        alone = [native.sample(logits[i : i + 1], [NativeRow(row(i, i % 3 != 0))])[0] for i in rows]
    oracle = Sampler(vocab_size).sample(logits, row_stats_numpy(logits), [row(i, i % 3 != 0) for i in rows])
    assert together == alone
    assert torch.equal(
        torch.tensor([token.token_id for token in together]), torch.tensor([token.token_id for token in oracle])
    )
    assert together[8].token_id in tokenizer.eos_token_ids  # complete: before min_tokens
