"""Hidden states offline: which rows come, the same bits whatever the schedule, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from utils.tiny_gguf import MIXED_TYPES, build_tiny_gguf
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams
from pellucid.api.hidden_states import HiddenStatesParams
from pellucid.api.request_options import RequestOptions
from pellucid.errors import ConfigError, InvalidRequestError

BASE: dict[str, Any] = {
    "max_num_batched_tokens": 512,
    "max_num_seqs": 16,
    "num_blocks": 256,
    "max_model_len": 256,
    "enable_prefix_caching": False,
    "num_threads": 2,
}
LAYERS, WIDTH, NUM_TOKENS = 3, 64, 12
LENGTHS = (1, 2, 7, 15, 16, 17, 31, 33, 40, 48, 64, 70, 90, 100, 120, 130)
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
ALL_LAYERS = [0, 1, 2, 3, -1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama"))


@pytest.fixture(scope="module")
def llm(model: str) -> Any:
    with LLM(model, **BASE) as opened:
        yield opened


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    shared = torch.randint(3, 280, (100,), generator=generator).tolist()
    own = [torch.randint(3, 280, (length,), generator=generator).tolist() for length in LENGTHS]
    return [shared[: len(ids) * 2 // 3] + ids[len(ids) * 2 // 3 :] for ids in own]


def stammer(index: int) -> SamplingParams:
    """Seeded draws; every second request says the same two tokens again and again, so that guesses at them come true."""
    own = {"allowed_token_ids": (10, 20)} if index % 2 else {}
    return SamplingParams(temperature=0.8, seed=index, max_tokens=NUM_TOKENS, ignore_eos=True, **own)  # type: ignore[arg-type]


def all_positions(prompt: list[int]) -> list[int]:
    return list(range(len(prompt) + NUM_TOKENS - 1))


# ---- which rows come ---------------------------------------------------------------------------------------------------


def test_last_row_when_nothing_else_is_said_then_flat_and_that_of_the_last_token(llm: LLM) -> None:
    prompt = prompts()[7]
    output = llm.generate([prompt], GREEDY, return_hidden_states=True)[0].outputs[0]
    assert isinstance(output.hidden_states, torch.Tensor)
    assert output.hidden_states.shape == (WIDTH,)
    assert output.hidden_states.dtype == torch.float32
    assert output.hidden_states_positions is None
    rows = llm.generate([prompt], GREEDY, return_hidden_states=True, hidden_states_for_tokens=all_positions(prompt))
    assert torch.equal(rows[0].outputs[0].hidden_states[-1], output.hidden_states)


def test_positions_when_asked_for_in_any_order_then_rows_in_that_order(llm: LLM) -> None:
    prompt = prompts()[5]
    last = len(prompt) + NUM_TOKENS - 2
    asked = [-1, 0, 3, -3, len(prompt) + 1, 3]
    output = llm.generate([prompt], GREEDY, return_hidden_states=True, hidden_states_for_tokens=asked)[0].outputs[0]
    assert output.hidden_states_positions == [last, 0, 3, last - 2, len(prompt) + 1, 3]
    whole = llm.generate([prompt], GREEDY, return_hidden_states=True, hidden_states_for_tokens=all_positions(prompt))
    every = whole[0].outputs[0].hidden_states
    assert torch.equal(output.hidden_states, every[output.hidden_states_positions])


def test_rows_when_the_text_ends_early_then_those_that_never_came_are_absent(llm: LLM) -> None:
    prompt = prompts()[6]
    free = llm.generate([prompt], GREEDY)[0]["token_ids"]
    ends = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, stop_token_ids=[free[3]])
    asked = [len(prompt), len(prompt) + NUM_TOKENS - 2, -1, -(len(prompt) + NUM_TOKENS - 1)]
    output = llm.generate([prompt], ends, return_hidden_states=True, hidden_states_for_tokens=asked)[0].outputs[0]
    num_tokens = free.index(free[3]) + 1
    assert output.finish_reason == "stop"
    assert len(output.token_ids) == num_tokens
    last = len(prompt) + num_tokens - 2
    assert output.hidden_states_positions == ([len(prompt), last] if num_tokens > 1 else [last])


def test_layers_when_asked_for_then_rows_by_layers_by_width_and_final_is_minus_one(llm: LLM) -> None:
    prompt = prompts()[4]
    output = llm.generate(
        [prompt], GREEDY, return_hidden_states=True, hidden_states_for_tokens=[0, -1], hidden_states_layers=ALL_LAYERS
    )[0].outputs[0]
    assert output.hidden_states.shape == (2, len(ALL_LAYERS), WIDTH)
    final = llm.generate([prompt], GREEDY, return_hidden_states=True, hidden_states_for_tokens=[0, -1])[0].outputs[0]
    assert torch.equal(output.hidden_states[:, -1], final.hidden_states)


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_one_token_prompt_when_rows_are_asked_for_then_there(llm: LLM, max_tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    output = llm.generate([[7]], params, return_hidden_states=True, hidden_states_for_tokens=[0, -1])[0].outputs[0]
    assert output.hidden_states_positions == [0, max_tokens - 1]


def test_choices_when_three_then_each_has_its_own_rows(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.5, seed=3, max_tokens=NUM_TOKENS, ignore_eos=True)
    choices = llm.generate([prompts()[3]], params, return_hidden_states=True)[0].outputs
    assert len({tuple(choice.token_ids) for choice in choices}) == 3
    assert not torch.equal(choices[0].hidden_states, choices[1].hidden_states)


def test_nobody_asks_then_outputs_have_none_and_the_program_is_the_same_object(llm: LLM) -> None:
    executable = llm.engine.executor.runner.executable  # type: ignore[attr-defined]
    plain = executable._plain
    output = llm.generate([prompts()[3]], GREEDY)[0].outputs[0]
    assert output.hidden_states is None
    assert executable._program is plain


# ---- the same bits -----------------------------------------------------------------------------------------------------


def rows_of(model: str, *, asking: str = "all", alone: bool = False, **config: Any) -> list[torch.Tensor | None]:
    """[rows, layers, D] of each prompt at every position; with `asking` "odd" every second request asks for nothing."""
    with LLM(model, **{**BASE, **config}) as llm:
        texts, found = prompts(), []
        layers = (*range(llm.engine.executor.model.config.num_hidden_layers + 1), -1)
        groups = [[index] for index in range(len(texts))] if alone else [list(range(len(texts)))]
        for group in groups:
            ids = []
            for index in group:
                wants = asking == "all" or index % 2 == 1
                hidden = HiddenStatesParams(tuple(all_positions(texts[index])), layers) if wants else None
                ids.append(
                    llm.client.submit(
                        texts[index], stammer(index), stream=False, options=RequestOptions(hidden_states=hidden)
                    )
                )
            while llm.client.has_unfinished:
                llm.client.step()
            for request_id in ids:
                output = llm.client.collect(request_id)
                assert output is not None
                states = output.outputs[0].hidden_states
                found.append(None if states is None else torch.from_numpy(states))
        if config.get("num_blocks", 256) < 64:
            assert any(record.preempted for record in llm.engine.trace.records)
        if "speculative_method" in config:
            assert sum(record.n_accepted_tokens for record in llm.engine.trace.records) > 0
        if config.get("enable_prefix_caching"):
            assert llm.kv_cache_stats()["prefix_misses"] > 0
        return found


PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8", "kv_cache_dtype": "int8"},
    "int4": {"quantization": "int4"},
    "stored types": {},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "alone": {"alone": True},
    "every second asks": {"asking": "odd"},
    "chunks of 16": {"max_num_batched_tokens": 16},
    "prefix cache": {"enable_prefix_caching": True},
    "preempted": {"num_blocks": 24, "max_model_len": 160},
    "slots": {"kv_layout": "slot", "num_blocks": 4096},
    "prefill first": {"policy": "prefill_first"},
    "padded": {"policy": "padded", "num_blocks": 64},
    "eager": {"enforce_eager": True},
    "one thread": {"num_threads": 1},
    "ahead": {"async_scheduling": True},
    "ahead, preempted": {"async_scheduling": True, "num_blocks": 24, "max_model_len": 160},
    "drafts": {"speculative_method": "ngram", "speculative_max_num_seqs": 16},
    "drafts ahead": {"speculative_method": "ngram", "speculative_max_num_seqs": 16, "async_scheduling": True},
}


@pytest.fixture(scope="module", params=PRECISIONS)
def reference(
    request: pytest.FixtureRequest, model: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any], list[torch.Tensor | None]]:
    precision, source = PRECISIONS[request.param], model
    if not precision:
        source = str(build_tiny_gguf(tmp_path_factory.mktemp("gguf"), MIXED_TYPES))
    return source, precision, rows_of(source, **precision)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_row_of_every_layer_when_scheduled_otherwise_then_the_same_bits(
    reference: tuple[str, dict[str, Any], list[torch.Tensor | None]], schedule: str
) -> None:
    source, precision, expected = reference
    found = rows_of(source, **precision, **SCHEDULES[schedule])
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        if SCHEDULES[schedule].get("asking") == "odd" and index % 2 == 0:
            assert one is None
            continue
        assert one is not None
        assert other is not None
        assert one.shape[0] == LENGTHS[index] + NUM_TOKENS - 1
        assert torch.equal(one, other), f"rows of request {index} differ"


def test_prompt_rows_when_the_prompt_is_cached_then_computed_again_and_equal(model: str) -> None:
    with LLM(model, **{**BASE, "enable_prefix_caching": True}) as llm:
        prompt = prompts()[-1]
        asked = {"return_hidden_states": True, "hidden_states_for_tokens": [3, 40, len(prompt) - 1]}
        cold = llm.generate([prompt], GREEDY, **asked)[0]  # type: ignore[arg-type]
        warm = llm.generate([prompt], GREEDY, **asked)[0]  # type: ignore[arg-type]
        last = llm.generate([prompt], GREEDY, return_hidden_states=True)[0]
    assert torch.equal(cold.outputs[0].hidden_states, warm.outputs[0].hidden_states)
    assert warm.num_cached_tokens == 0  # position 3 lies in the first block
    assert last.num_cached_tokens == len(prompt) // 16 * 16  # the last row alone lies behind the cached ones


def test_streamed_rows_when_joined_then_those_of_the_whole_and_one_a_token(llm: LLM) -> None:
    prompt = prompts()[8]
    wanted = HiddenStatesParams(stream=True)
    request_id = llm.client.submit(prompt, GREEDY, options=RequestOptions(hidden_states=wanted))
    rows, num_tokens = [], 0
    while not llm.client.is_finished(request_id):
        for chunk in llm.client.step_outputs().chunks:
            num_tokens += len(chunk.token_ids)
            assert chunk.hidden_states is not None
            assert len(chunk.hidden_states) == len(chunk.token_ids)
            rows.append(torch.from_numpy(chunk.hidden_states))
    llm.client.release(request_id)
    positions = list(range(len(prompt) - 1, len(prompt) + NUM_TOKENS - 1))
    whole = llm.generate([prompt], GREEDY, return_hidden_states=True, hidden_states_for_tokens=positions)[0]
    assert num_tokens == NUM_TOKENS
    assert torch.equal(torch.cat(rows), whole.outputs[0].hidden_states)


def test_stream_without_the_switch_then_the_last_chunk_alone_carries_the_rows(llm: LLM) -> None:
    request_id = llm.client.submit(prompts()[8], GREEDY, options=RequestOptions(hidden_states=HiddenStatesParams()))
    chunks = []
    while not llm.client.is_finished(request_id):
        chunks += llm.client.step_outputs().chunks
    llm.client.release(request_id)
    assert [chunk.hidden_states is not None for chunk in chunks] == [False] * (NUM_TOKENS - 1) + [True]


# ---- what is refused ---------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "flag is a number": ({"return_hidden_states": 1}, "return_hidden_states is 1"),
    "flag is a text": ({"return_hidden_states": "true"}, "return_hidden_states is 'true'"),
    "flag is null": ({"return_hidden_states": None}, "return_hidden_states is None"),
    "positions without the flag": ({"hidden_states_for_tokens": [0]}, "hidden_states_for_tokens needs return_hidden"),
    "layers without the flag": ({"hidden_states_layers": [0]}, "hidden_states_layers needs return_hidden"),
    "positions are one number": (
        {"return_hidden_states": True, "hidden_states_for_tokens": 3},
        "is 3; it must be a list",
    ),
    "positions are a text": ({"return_hidden_states": True, "hidden_states_for_tokens": "3"}, "must be a list"),
    "no positions": ({"return_hidden_states": True, "hidden_states_for_tokens": []}, "has 0 entries"),
    "a position is a float": ({"return_hidden_states": True, "hidden_states_for_tokens": [1.0]}, r"\[0\] is 1.0"),
    "a position is a truth": ({"return_hidden_states": True, "hidden_states_for_tokens": [True]}, r"\[0\] is True"),
    "a position too far": (
        {"return_hidden_states": True, "hidden_states_for_tokens": [0, 21]},
        "names position 21; 10 prompt",
    ),
    "a position too far back": (
        {"return_hidden_states": True, "hidden_states_for_tokens": [-22]},
        "names position -22",
    ),
    "a layer too many": (
        {"return_hidden_states": True, "hidden_states_layers": [4]},
        r"names layer 4; layers are -1 and \[0, 3\]",
    ),
    "a layer before the first": ({"return_hidden_states": True, "hidden_states_layers": [-2]}, "names layer -2"),
    "more than the cap with all choices": (
        {"return_hidden_states": True, "hidden_states_for_tokens": [0] * 1000, "sampling_params": SamplingParams(n=4)},
        r"take up to 1,024,000 bytes \(1,000 rows of 1 layers of 64 values for each of 4 choices\)",
    ),
    "more than the cap together": (
        {"return_hidden_states": True, "hidden_states_for_tokens": [0] * 3900, "capture": ["layers.*.mlp"]},
        r"the activations take up to 1,014,528 bytes \(21 rows of 192 values, 249,600 values of hidden states\)",
    ),
    "more than the cap": (
        {"return_hidden_states": True, "hidden_states_for_tokens": [0] * 2000, "hidden_states_layers": [0, 1, 2]},
        r"take up to 1,536,000 bytes \(2,000 rows of 3 layers of 64 values\); hidden_states_max_mb allows 1,000,000",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request_when_made_then_refused_by_name_and_nothing_runs(model: str, case: str) -> None:
    asked, message = BAD[case]
    with LLM(model, **{**BASE, "hidden_states_max_mb": 1}) as llm:
        with pytest.raises(InvalidRequestError, match=message):
            llm.generate([[5] * 10], **{"sampling_params": GREEDY, **asked})
        assert not llm.client.has_unfinished
        assert len(llm.generate([[5] * 10], GREEDY)[0]["token_ids"]) == NUM_TOKENS


def test_switch_when_off_then_requests_that_ask_are_refused_and_others_run(model: str) -> None:
    with LLM(model, **{**BASE, "hidden_states": False}) as llm:
        with pytest.raises(ValueError, match="this engine hands out no hidden states"):
            llm.generate([[5] * 10], GREEDY, return_hidden_states=True)
        assert llm.generate([[5] * 10], GREEDY)[0].outputs[0].hidden_states is None


def test_cap_when_not_a_number_then_config_error(model: str) -> None:
    with pytest.raises(ConfigError, match="hidden_states_max_mb is 0"):
        LLM(model, hidden_states_max_mb=0)


def test_program_file_when_its_names_are_damaged_then_refused(model: str, tmp_path: Path) -> None:
    from dataclasses import replace

    from pellucid.errors import WeightFormatError
    from pellucid.program.variant import activation_widths, variant_of

    with LLM(model, **BASE) as llm:
        file = llm.engine.executor.model.file
        assert next(iter(activation_widths(file))) == "embed_tokens"
        for damage in (None, {}, {"norm": None}, {"norm": []}, {"norm": [[9999, 0, 64]]}, {"norm": [[0, 0, 64]] * 3}):
            broken = replace(file, meta={**file.meta, "activations": damage})
            with pytest.raises((WeightFormatError, InvalidRequestError)):
                variant_of(broken, ["norm"])


# ---- activations by name -------------------------------------------------------------------------------------------------


def captured_of(model: str, **config: Any) -> list[dict[str, torch.Tensor]]:
    with LLM(model, **{**BASE, **config}) as llm:
        names = list(llm.engine.checker.hidden_states.activations)  # type: ignore[union-attr]
        outputs = llm.generate(prompts(), [stammer(i) for i in range(len(LENGTHS))], capture=names)
        if config.get("num_blocks", 256) < 64:
            assert any(record.preempted for record in llm.engine.trace.records)
    return [output.outputs[0].captured for output in outputs]  # type: ignore[misc]


@pytest.fixture(scope="module", params=["float32", "int8", "int4"])
def captured(request: pytest.FixtureRequest, model: str) -> tuple[dict[str, Any], list[dict[str, torch.Tensor]]]:
    precision = PRECISIONS[request.param]
    return precision, captured_of(model, **precision)


@pytest.mark.parametrize("schedule", ["alone", "chunks of 16", "prefix cache", "preempted", "eager", "ahead", "drafts"])
def test_every_activation_when_scheduled_otherwise_then_the_same_bits(
    model: str, captured: tuple[dict[str, Any], list[dict[str, torch.Tensor]]], schedule: str
) -> None:
    precision, expected = captured
    config = {"max_num_seqs": 1} if schedule == "alone" else SCHEDULES[schedule]
    for index, (one, other) in enumerate(zip(captured_of(model, **precision, **config), expected, strict=True)):
        assert list(one) == list(other)
        for name in one:
            assert len(one[name]) == LENGTHS[index] + NUM_TOKENS - 1
            assert torch.equal(one[name], other[name]), f"{name} of request {index} differs"


def test_activations_when_named_by_a_pattern_then_those_of_all_layers_in_order(llm: LLM) -> None:
    prompt = prompts()[6]
    output = llm.generate([prompt], GREEDY, capture=["layers.*.mlp", "norm"])[0].outputs[0]
    assert list(output.captured) == ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp", "norm"]  # type: ignore[arg-type]
    hidden = llm.generate([prompt], GREEDY, return_hidden_states=True, hidden_states_for_tokens=all_positions(prompt))
    assert torch.equal(output.captured["norm"], hidden[0].outputs[0].hidden_states)  # type: ignore[index]


def test_activation_when_compared_with_its_neighbours_then_the_layers_arithmetic(llm: LLM) -> None:
    """The residual stream behind a block is what came in, and attention, and MLP."""
    names = ["layers.0", "layers.1.self_attn", "layers.1.mlp", "layers.1"]
    found = llm.generate([prompts()[9]], GREEDY, capture=names)[0].outputs[0].captured
    assert found is not None
    before, attention, mlp, after = (found[name] for name in ("layers.0", *names[1:]))
    assert torch.equal((before + attention) + mlp, after)


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        ("layers.0", "capture is 'layers.0'; it must be a list of names"),
        ([], "capture has 0 entries"),
        ([3], r"capture\[0\] is 3"),
        (["layers.9.mlp"], "capture names 'layers.9.mlp'; the model has no such activation"),
        (["layers.*"], None),
        (["*.mlp"], r"capture names '\*.mlp'"),
        (["a" * 300], r"capture\[0\] is"),
        (["layers.*.mlp.gate_up_proj"], None),
    ],
)
def test_capture_when_asked_for_then_known_or_refused_by_name(llm: LLM, capture: Any, message: str | None) -> None:
    if message is None:
        assert llm.generate([[5, 6]], GREEDY, capture=capture)[0].outputs[0].captured
        return
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate([[5, 6]], GREEDY, capture=capture)
    assert not llm.client.has_unfinished


def test_capture_when_it_takes_more_than_the_cap_then_refused_with_the_numbers(model: str) -> None:
    message = r"the activations take up to .* hidden_states_max_mb allows 1,000,000"
    with LLM(model, **{**BASE, "hidden_states_max_mb": 1}) as llm, pytest.raises(InvalidRequestError, match=message):
        llm.generate([[5] * 200], GREEDY, capture=["*", "layers.*", "layers.*.*", "layers.*.*.*"])
