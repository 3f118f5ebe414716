"""`pellucid.testing`: it finds what differs, says where and why, and passes over what does not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams
from pellucid.config import EngineConfig
from pellucid.errors import ConfigError, InvalidRequestError
from pellucid.service.async_engine import AsyncLLMEngine
from pellucid.testing import (
    Generated,
    GoldenTokens,
    StepTable,
    TableRequest,
    TableRow,
    assert_outputs_match,
    check_step_table,
    compare_outputs,
    follow_with_transformers,
    force_tokens,
    load_step_table,
    load_transformers,
)

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=3)
PROMPTS = [[7, 8, 9], list(range(20, 60)), [5]]
ENGINE = {"num_threads": 1, "num_blocks": 64, "max_model_len": 128}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("testing"), "llama", num_hidden_layers=2)


# ---- outputs against a reference ---------------------------------------------------------------------------


def test_engine_when_compared_with_transformers_then_all_match_and_the_table_says_so(model: Path) -> None:
    with LLM(model, dtype="float32", **ENGINE) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
    ids = [output["token_ids"] for output in outputs]
    references = follow_with_transformers(load_transformers(model), PROMPTS, ids)
    comparison = assert_outputs_match(outputs, references)
    assert [row.num_equal for row in comparison.rows] == [24, 24, 24]
    assert comparison.table().count("match") == 3


def test_engine_when_a_token_is_not_transformers_then_the_reference_ends_there_with_what_it_thinks_of_both(
    model: Path,
) -> None:
    with LLM(model, dtype="float32", **ENGINE) as llm:
        (output,) = llm.generate([PROMPTS[0]], GREEDY)
    ids = list(output["token_ids"])
    wrong = (ids[5] + 1) % 300
    (reference,) = follow_with_transformers(load_transformers(model), PROMPTS[:1], [[*ids[:5], wrong, *ids[6:]]])
    assert list(reference.token_ids) == ids[:6]
    own, other = reference.logprob_of(5, ids[5]), reference.logprob_of(5, wrong)
    assert own is not None
    assert other is not None
    assert own > other


def test_outputs_when_equal_within_tolerance_then_they_match_and_beyond_it_the_position_is_named() -> None:
    reference = Generated([1, 2, 3], [-1.0, -10.0, -1.0])
    close = Generated([1, 2, 3], [-1.0, -10.9, -1.0])
    assert compare_outputs([close], [reference], rtol=0.1, atol=0).all_match
    (row,) = compare_outputs([close], [reference], rtol=0.05, atol=0.1).rows
    assert row.difference is not None
    assert (row.difference.kind, row.difference.position) == ("logprob", 1)
    assert (
        row.difference.text
        == "token 1, 2, has logprob -10.900000; the reference has -10.000000: 9.00e-01 apart, 6.00e-01 allowed"
    )
    assert row.max_logprob_difference == pytest.approx(0.9)


def test_logprob_that_is_no_number_when_compared_then_it_differs() -> None:
    broken = compare_outputs([Generated([1], [math.nan])], [Generated([1], [-1.0])])
    assert not broken.all_match


def test_token_when_it_differs_then_both_sides_say_what_they_think_of_it() -> None:
    ours = Generated([1, 2, 9], [-1.0, -0.7, -1.0], [{1: -1.0}, {2: -0.7, 3: -0.7004}, {9: -1.0}])
    theirs = Generated([1, 3], [-1.0, -0.7], [{1: -1.0}, {3: -0.7, 2: -0.7003}])
    comparison = compare_outputs([ours], [theirs], decode=lambda token_id: f"<{token_id}>")
    (row,) = comparison.rows
    assert row.difference is not None
    assert (row.num_equal, row.difference.kind, row.difference.position) == (1, "token", 1)
    assert row.difference.text == (
        "token 1 is 2 '<2>'; the reference has 3 '<3>' "
        "(here: -0.700000 against -0.700400; reference: -0.700000 against -0.700300: a near tie)"
    )
    far = replace(theirs, candidates=[{1: -1.0}, {3: -0.7, 2: -4.0}])
    assert compare_outputs([ours], [far]).table().endswith("no near tie)")
    unknown = Generated([1, 3])
    assert compare_outputs([replace(ours, candidates=())], [unknown]).table().endswith("the reference has 3")
    with pytest.raises(AssertionError, match="differs at token 1"):
        assert_outputs_match([ours], [theirs])


def test_outputs_when_one_is_shorter_then_the_length_differs() -> None:
    (row,) = compare_outputs([Generated([1, 2])], [Generated([1, 2, 3])]).rows
    assert row.difference is not None
    assert row.difference.kind == "length"
    assert "ends after 2 tokens, the reference after 3" in row.difference.text


def test_comparison_when_counts_do_not_agree_then_it_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 outputs and 2 references"):
        compare_outputs([Generated([1])], [Generated([1]), Generated([2])])
    with pytest.raises(ValueError, match="logprobs has 1 entries; there are 2 tokens"):
        Generated([1, 2], [-1.0])


# ---- forced tokens -----------------------------------------------------------------------------------------


def test_golden_tokens_when_forced_then_logprobs_are_those_of_the_model_on_that_path(model: Path) -> None:
    """Forced tokens are scored as `LLM.score` scores them as a prompt; a neighbour that is not forced goes on as it would."""
    golden = [11, 2, 299, 40, 41]  # 2 ends a text, 299 has no text
    with LLM(model, **ENGINE) as llm:
        (free,) = llm.generate([PROMPTS[1]], GREEDY)
        forced, beside = llm.generate([PROMPTS[0], PROMPTS[1]], [force_tokens(GREEDY, golden), GREEDY])
        (scores,) = llm.score([PROMPTS[0]], [golden])
    assert forced["token_ids"] == golden
    assert Generated.of(forced).logprobs == scores
    assert beside["token_ids"] == free["token_ids"]


def test_golden_tokens_when_they_are_the_models_own_then_nothing_changes_even_after_preemption(model: Path) -> None:
    with LLM(model, **ENGINE) as llm:
        expected = llm.generate(PROMPTS, GREEDY)
    forced = [force_tokens(GREEDY, output["token_ids"]) for output in expected]
    with LLM(model, num_threads=1, num_blocks=6, max_model_len=96) as llm:
        outputs = llm.generate(PROMPTS, forced)
        assert any(record.preempted for record in llm.engine.trace.records)
    assert_outputs_match(outputs, expected, rtol=0, atol=0)


def test_golden_tokens_when_all_are_said_then_the_output_is_free(model: Path) -> None:
    with LLM(model, **ENGINE) as llm:
        (expected,) = llm.generate([PROMPTS[0]], GREEDY)
        params = replace(GREEDY, structured_outputs=GoldenTokens(expected["token_ids"][:4]))
        assert llm.generate([PROMPTS[0]], params)[0]["token_ids"] == expected["token_ids"]


@pytest.mark.parametrize("token_ids", [[], [-1], [300]])
def test_golden_tokens_when_they_are_none_of_the_vocabulary_then_they_are_refused(
    model: Path, token_ids: list[int]
) -> None:
    with LLM(model, **ENGINE) as llm, pytest.raises(InvalidRequestError, match="golden tokens"):
        llm.generate([PROMPTS[0]], force_tokens(GREEDY, token_ids))


@pytest.mark.asyncio
async def test_golden_tokens_when_the_engine_is_another_process_then_they_are_refused_and_it_lives(model: Path) -> None:
    engine = AsyncLLMEngine.start(EngineConfig(str(model), **ENGINE), engine_process=True)
    try:
        with pytest.raises(InvalidRequestError, match="a GoldenTokens cannot be sent"):
            await engine.submit(PROMPTS[0], force_tokens(GREEDY, [4]))
        request_id = await engine.submit(PROMPTS[0], SamplingParams(max_tokens=1))
        assert len((await engine.wait(request_id))["token_ids"]) == 1
    finally:
        engine.close()


# ---- tables of steps ---------------------------------------------------------------------------------------

REQUESTS = (TableRequest("a", 5, 2), TableRequest("b", 3, 1, at=1))
ROWS = (
    TableRow(0, {"waiting": ["a"], "running": []}),
    TableRow(1, {"waiting": ["b"], "running": ["a"], "tokens": {"a": 5}}),
    TableRow(2, {"waiting": [], "running": [], "tokens": {"a": 1, "b": 3}, "finished_requests": ["a", "b"]}),
)


def test_step_table_when_it_holds_then_outputs_come_back(model: Path) -> None:
    with LLM(model, **ENGINE) as llm:
        outputs = check_step_table(llm.engine, StepTable("two", "b comes later", REQUESTS, ROWS))
    assert {name: len(output["token_ids"]) for name, output in outputs.items()} == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    ("requests", "rows", "message"),
    [
        (
            REQUESTS,
            (TableRow(1, {"running": ["b"]}), ROWS[2]),
            r"'t', after 1 steps: running is \['a'\]; expected \['b'\]",
        ),
        (REQUESTS, (TableRow(0, {"tkv": 0}), TableRow(2, {"tkv": 64})), "after 2 steps: tkv is 0; expected 64"),
        (REQUESTS, ROWS[:2], "after 1 steps: the table ends, but the engine has more to do"),
        ((REQUESTS[0], TableRequest("b", 3, 1, at=9)), (TableRow(2, {}),), r"after 2 steps: \['b'\] did not end"),
        ((TableRequest("a", 200, 2),), ROWS[:1], "'a' was refused: .*max_model_len is 128; expected: None"),
        ((TableRequest("a", 5, 2, refused="too long"),), ROWS[:1], "'a' was taken; it should be refused: too long"),
        ((TableRequest("a", 5, 1, cancel_at=2),), (TableRow(2, {}),), "'a' cannot be cancelled"),
    ],
)
def test_step_table_when_something_is_otherwise_then_it_names_the_step_and_what(
    model: Path, requests: tuple[TableRequest, ...], rows: tuple[TableRow, ...], message: str
) -> None:
    with LLM(model, **ENGINE) as llm, pytest.raises(AssertionError, match=message):
        check_step_table(llm.engine, StepTable("t", "", requests, rows))


def test_step_table_when_a_step_has_no_row_then_it_is_the_one_before_with_tkv_moved_on() -> None:
    table = StepTable("t", "", REQUESTS, (TableRow(1, {"tkv": 64, "kind": "decode"}), TableRow(9, {"tkv": 0})))
    assert table.expected(0) == {}
    assert table.expected(4) == {"tkv": 67, "kind": "decode"}
    assert table.expected(12) == {"tkv": 0}


def test_step_table_when_it_cannot_be_meant_then_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="column 'colour'"):
        StepTable("t", "", REQUESTS, (TableRow(0, {"colour": 1}),))
    with pytest.raises(ValueError, match="must ascend"):
        StepTable("t", "", REQUESTS, (TableRow(3, {}), TableRow(1, {})))
    path = tmp_path / "table.json"
    data = {"name": "t", "scenario": "s", "requests": [{"request_id": "a", "prompt": 3, "max_tokens": 1}]}
    path.write_text(json.dumps({**data, "columns": ["after", "tkv"], "rows": [[0, 0], [1, 64]]}))
    assert load_step_table(path).rows == [TableRow(0, {"tkv": 0}), TableRow(1, {"tkv": 64})]
    for text in (
        "",
        "[]",
        "{}",
        '{"columns": 1, "rows": [1]}',
        "[" * 100_000,
        json.dumps({**data, "columns": ["after"], "rows": [[0, 0]]}),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"^{path} is no step table: "):
            load_step_table(path)
    with pytest.raises(ConfigError, match="absent.json is no step table"):
        load_step_table(tmp_path / "absent.json")
