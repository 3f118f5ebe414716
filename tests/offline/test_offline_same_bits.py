"""The same bits, whatever the schedule: tokens and log-probabilities compared with `torch.equal` between schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from utils.same_bits import PRECISIONS, Bits, assert_same_bits, bits_of
from utils.tiny_gguf import MIXED_TYPES, build_tiny_gguf
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams

LENGTHS = (1, 2, 7, 15, 16, 17, 31, 33, 48, 64, 90, 130)
MAX_TOKENS = 20
BASE: dict[str, Any] = {
    "max_num_batched_tokens": 512,
    "max_num_seqs": 16,
    "block_size": 16,
    "num_blocks": 256,
    "max_model_len": 256,
    "enable_prefix_caching": False,
    "num_threads": 2,
}


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    shared = torch.randint(3, vocab_size, (40,), generator=generator).tolist()
    made = []
    for index, length in enumerate(LENGTHS):
        own = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        made.append((shared[: length // 2] + own[length // 2 :]) if index % 2 else own)
    return made


def params(index: int) -> SamplingParams:
    """Every third request is greedy; the others draw with a seed, some through the whole chain. Some stammer: they say the
    same few tokens again and again, so that guesses at them come true."""
    asked: dict[str, Any] = {"max_tokens": MAX_TOKENS, "ignore_eos": True, "logprobs": 4}
    if index % 4 == 2:
        asked["allowed_token_ids"] = (10, 20)
    if index % 4 == 3:
        asked["prompt_logprobs"] = 2
    if index % 3 == 0:
        return SamplingParams(temperature=0, **asked)
    chain = {"top_p": 0.9, "top_k": 20, "repetition_penalty": 1.2} if index % 3 == 2 else {}
    return SamplingParams(temperature=0.8, seed=100 + index, **chain, **asked)


def run(model: str, order: list[int] | None = None, *, alone: bool = False, **config: Any) -> tuple[list[Bits], LLM]:
    with LLM(model, **{**BASE, **config}) as llm:
        all_prompts = prompts(llm.engine.vocab_size)
        order = list(range(len(all_prompts))) if order is None else order
        if alone:
            outputs = [llm.generate([all_prompts[i]], params(i))[0] for i in order]
        else:
            outputs = llm.generate([all_prompts[i] for i in order], [params(i) for i in order])
        by_index = dict(zip(order, map(bits_of, outputs), strict=True))
        return [by_index[i] for i in range(len(all_prompts))], llm


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama"))


@pytest.fixture(scope="module", params=PRECISIONS)
def reference(
    request: pytest.FixtureRequest, tiny_model: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, str], list[Bits]]:
    precision, model = PRECISIONS[request.param], tiny_model
    if not precision:
        model = str(build_tiny_gguf(tmp_path_factory.mktemp("gguf"), MIXED_TYPES))
    found, llm = run(model, **precision)
    assert all(len(bits.tokens) == MAX_TOKENS for bits in found)
    assert max(len(record.running) for record in llm.engine.trace.records) == len(LENGTHS)
    return model, precision, found


SCHEDULES: dict[str, dict[str, Any]] = {
    "alone": {"alone": True},
    "another order": {"order": [5, 0, 11, 3, 8, 1, 10, 2, 7, 4, 9, 6]},
    "chunks of 16": {"max_num_batched_tokens": 16},
    "chunks of 64": {"max_num_batched_tokens": 64},
    "three at once": {"max_num_seqs": 3},
    "blocks of 8": {"block_size": 8, "num_blocks": 512},
    "blocks of 64": {"block_size": 64, "num_blocks": 64},
    "blocks of 7": {"block_size": 7, "num_blocks": 512},
    "slots": {"kv_layout": "slot", "num_blocks": 4096},
    "slots, prefix cache": {"kv_layout": "slot", "num_blocks": 4096, "enable_prefix_caching": True},
    "slots, chunks of 16": {"kv_layout": "slot", "num_blocks": 4096, "max_num_batched_tokens": 16},
    "prefill first": {"policy": "prefill_first"},
    "padded": {"policy": "padded"},
    "one thread": {"num_threads": 1},
    "sixteen threads": {"num_threads": 16},
    "prefix cache": {"enable_prefix_caching": True},
    "eager": {"enforce_eager": True},
    "plans ahead": {"async_scheduling": True},
    "plans ahead, chunks of 16": {"async_scheduling": True, "max_num_batched_tokens": 16},
}
NGRAM: dict[str, Any] = {"speculative_method": "ngram", "prompt_lookup_min": 1, "speculative_max_num_seqs": 16}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_twelve_requests_when_scheduled_otherwise_then_same_bits(
    reference: tuple[str, dict[str, str], list[Bits]], schedule: str
) -> None:
    model, precision, expected = reference
    found, _ = run(model, **precision, **SCHEDULES[schedule])
    assert_same_bits(found, expected)


@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"alone": True, "num_threads": 1},
        {"num_speculative_tokens": 7, "enable_prefix_caching": True, "block_size": 8, "num_blocks": 512},
        {"async_scheduling": True, "speculative_max_num_seqs": 4, "max_num_seqs": 5, "max_num_batched_tokens": 32},
        {"enforce_eager": True, "kv_layout": "slot", "num_blocks": 4096},
    ],
    ids=["together", "alone", "long drafts", "plans ahead with many", "eager, slots"],
)
def test_twelve_requests_when_drafts_are_verified_then_some_stand_and_same_bits(
    reference: tuple[str, dict[str, str], list[Bits]], schedule: dict[str, Any]
) -> None:
    model, precision, expected = reference
    found, llm = run(model, **precision, **{**NGRAM, **schedule})
    assert sum(record.n_accepted_tokens for record in llm.engine.trace.records) > 0
    assert_same_bits(found, expected)


@pytest.mark.parametrize(
    "ahead", [{}, {"async_scheduling": True}, NGRAM], ids=["step by step", "plans ahead", "drafts"]
)
@pytest.mark.parametrize("policy", ["mixed", "prefill_first"])
@pytest.mark.parametrize("caching", [False, True])
def test_twelve_requests_when_blocks_are_few_then_preempted_and_same_bits(
    reference: tuple[str, dict[str, str], list[Bits]], policy: str, caching: bool, ahead: dict[str, Any]
) -> None:
    model, precision, expected = reference
    found, llm = run(model, num_blocks=26, policy=policy, enable_prefix_caching=caching, **precision, **ahead)
    assert any(record.preempted for record in llm.engine.trace.records), "no request was preempted"
    assert_same_bits(found, expected)


def test_twelve_requests_when_run_again_on_a_warm_prefix_cache_then_hits_and_same_bits(
    reference: tuple[str, dict[str, str], list[Bits]],
) -> None:
    model, precision, expected = reference
    with LLM(model, **{**BASE, **precision, "enable_prefix_caching": True, "block_size": 8}) as llm:
        asked = prompts(llm.engine.vocab_size), [params(i) for i in range(len(LENGTHS))]
        assert_same_bits([bits_of(output) for output in llm.generate(*asked)], expected)
        hits = llm.kv_cache_stats()["prefix_hits"]
        # Three times at once: requests that share full blocks recompute only their last token.
        again = llm.generate(asked[0] * 3, asked[1] * 3)
        assert llm.kv_cache_stats()["prefix_hits"] > hits
        assert_same_bits([bits_of(output) for output in again], expected * 3)


@pytest.mark.parametrize("precision", ["bfloat16", "int8, int8 cache", "int4"])
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_each_instruction_set_when_alone_chunked_or_together_then_same_bits(
    tiny_model: str, isa: str, precision: str
) -> None:
    from pellucid.core import abi

    if abi.ISA_CODES[isa] > abi.ISA_CODES[abi.cpu_info().best_isa]:
        pytest.skip(f"this machine has no {isa}")
    as_asked = {**PRECISIONS[precision], "isa": isa}
    expected, _ = run(tiny_model, **as_asked)
    assert_same_bits(run(tiny_model, **as_asked, alone=True)[0], expected)
    chunked, _ = run(tiny_model, **as_asked, max_num_batched_tokens=16, block_size=8, num_threads=1)
    assert_same_bits(chunked, expected)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma3"])
def test_each_family_when_chunked_and_preempted_then_same_bits(family: str, tmp_path: Path) -> None:
    model = str(build_tiny_checkpoint(tmp_path, family))
    expected, _ = run(model, dtype="bfloat16")
    found, llm = run(model, dtype="bfloat16", max_num_batched_tokens=24, num_blocks=26, enable_prefix_caching=True)
    assert any(record.preempted for record in llm.engine.trace.records)
    assert_same_bits(found, expected)
    assert_same_bits(run(model, dtype="bfloat16", enforce_eager=True)[0], expected)


def test_n_choices_when_asked_together_or_as_the_first_of_fewer_then_same_bits(tiny_model: str) -> None:
    prompt = list(range(5, 45))
    for caching in (False, True):
        with LLM(tiny_model, **{**BASE, "enable_prefix_caching": caching}) as llm:
            many = llm.generate([prompt], SamplingParams(n=4, temperature=0.9, seed=3, max_tokens=12, logprobs=2))[0]
            few = llm.generate([prompt], SamplingParams(n=2, temperature=0.9, seed=3, max_tokens=12, logprobs=2))[0]
        assert len({tuple(choice.token_ids) for choice in many.outputs}) > 1
        for one, other in zip(few.outputs, many.outputs[:2], strict=True):
            assert torch.equal(torch.tensor(one.token_ids), torch.tensor(other.token_ids))
            assert one.logprobs == other.logprobs


@pytest.mark.parametrize(
    "precision", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("float32", "bfloat16")), "stored types"]
)
def test_the_real_model_when_alone_chunked_preempted_or_cached_then_same_bits(precision: str, real_model: Path) -> None:
    model, as_asked = str(real_model), PRECISIONS[precision]
    expected, _ = run(model, **as_asked)
    variants: list[dict[str, Any]] = [
        {"alone": True, "num_threads": 1},
        {"max_num_batched_tokens": 64, "num_blocks": 26},
        {"enable_prefix_caching": True, "block_size": 8, "policy": "prefill_first"},
        {"async_scheduling": True, **NGRAM, "speculative_max_num_seqs": 4, "kv_layout": "slot", "num_blocks": 4096},
    ]
    for variant in variants:
        assert_same_bits(run(model, **as_asked, **variant)[0], expected)
