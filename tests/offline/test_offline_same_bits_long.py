"""The same bits at, below and above every boundary of the code: lengths, rows of a step, chunks; on 1, 2 and 3 threads."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from utils.core_attention import available_isas
from utils.same_bits import PRECISIONS, Bits, assert_same_bits, bits_of
from utils.tiny_gguf import MIXED_TYPES, build_tiny_gguf
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams

# Positions: a tile's group (16), a tile and a slab (64), a block of rows of a product (192), a span (1,024), two spans.
BOUNDARIES = (16, 64, 192, 1024, 2048)
LENGTHS = [boundary + off for boundary in BOUNDARIES for off in (-1, 0, 1)]
SPLIT_ROWS = 64  # up to so many rows of a step, long pasts are split among threads
MAX_TOKENS = 3
MAX_MODEL_LEN = 8192
ENGINE: dict[str, Any] = {
    "max_num_batched_tokens": 4096,
    "max_num_seqs": SPLIT_ROWS + 1,
    "num_blocks": 1024,
    "max_model_len": MAX_MODEL_LEN,
    "enable_prefix_caching": False,
}
CACHES = ("float32", "bfloat16", "int8")


def prompts(count: int = SPLIT_ROWS + 1) -> list[list[int]]:
    """The lengths above, then short ones."""
    generator = torch.Generator().manual_seed(11)
    lengths = [*LENGTHS, *(1 + i % 5 for i in range(SPLIT_ROWS))][:count]
    return [torch.randint(3, 280, (length,), generator=generator).tolist() for length in lengths]


def params(index: int) -> SamplingParams:
    """Greedy and drawn."""
    asked: dict[str, Any] = {"max_tokens": MAX_TOKENS, "ignore_eos": True, "logprobs": 2}
    return SamplingParams(temperature=0, **asked) if index % 2 else SamplingParams(seed=index, **asked)


def run(model: str, count: int = SPLIT_ROWS + 1, *, alone: bool = False, **config: Any) -> list[Bits]:
    """The first `count` prompts, together or one after another."""
    with LLM(model, **{**ENGINE, **config}) as llm:
        asked = list(zip(prompts(count), map(params, range(count)), strict=True))
        if alone:
            return [bits_of(llm.generate([prompt], one, use_tqdm=False)[0]) for prompt, one in asked]
        return [bits_of(output) for output in llm.generate(*map(list, zip(*asked, strict=True)), use_tqdm=False)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """By whether it is made of stored quantised types."""
    folder, length = tmp_path_factory.mktemp("long"), MAX_MODEL_LEN
    plain = build_tiny_checkpoint(folder / "plain", "llama", max_position_embeddings=length, num_hidden_layers=2)
    return {False: str(plain), True: str(build_tiny_gguf(folder, MIXED_TYPES, context_length=length))}


@pytest.fixture(scope="module")
def lone(models: dict[bool, str]) -> Any:
    """lone(precision, cache, isa): each request alone, whole, on one thread."""

    @cache
    def made(precision: str, kv: str, isa: str) -> list[Bits]:
        return run(models[precision == "stored types"], alone=True, num_threads=1, **settings(precision, kv, isa))

    return made


def settings(precision: str, kv: str, isa: str) -> dict[str, str]:
    """Of the engine."""
    return {**PRECISIONS[precision], "kv_cache_dtype": kv, "isa": isa}


TOGETHER: dict[str, dict[str, Any]] = {
    "1 thread": {"num_threads": 1},
    "2 threads": {"num_threads": 2},
    "3 threads, chunks of 193": {"num_threads": 3, "max_num_batched_tokens": 193},
}
MORE: dict[str, dict[str, Any]] = {
    "64 rows": {"num_threads": 2, "count": SPLIT_ROWS},
    "63 rows": {"num_threads": 3, "count": SPLIT_ROWS - 1},
    "3 threads": {"num_threads": 3},
    "chunks of 16": {"num_threads": 2, "max_num_batched_tokens": 16},
    "chunks of 64": {"num_threads": 2, "max_num_batched_tokens": 64},
    "chunks of 65": {"num_threads": 2, "max_num_batched_tokens": 65},
    "chunks of 192": {"num_threads": 2, "max_num_batched_tokens": 192},
    "chunks of 1,024": {"num_threads": 2, "max_num_batched_tokens": 1024},
    "plans ahead, slots": {"num_threads": 2, "async_scheduling": True, "kv_layout": "slot", "num_blocks": 16384},
    "few blocks": {"num_threads": 2, "num_blocks": 520, "enable_prefix_caching": True},
    "eager": {"num_threads": 2, "enforce_eager": True},
}


def check(models: dict[bool, str], lone: Any, precision: str, kv: str, isa: str, schedule: dict[str, Any]) -> None:
    expected = lone(precision, kv, isa)
    found = run(models[precision == "stored types"], **{**settings(precision, kv, isa), **schedule})
    assert_same_bits(found, expected[: len(found)])


def corner() -> list[tuple[str, str, str]]:
    """Every precision, every type of cache and every instruction set at least once."""
    best, *others = reversed(available_isas())
    made = [(precision, "auto", best) for precision in PRECISIONS]
    made += [("bfloat16", kv, best) for kv in CACHES]
    return made + [(precision, "auto", isa) for isa in others for precision in ("bfloat16", "int8")]


def everything() -> list[tuple[str, str, str]]:
    caches = ("auto", *CACHES)
    return [(precision, kv, isa) for precision in PRECISIONS for kv in caches for isa in available_isas()]


@pytest.mark.parametrize("schedule", TOGETHER)
@pytest.mark.parametrize(("precision", "kv", "isa"), corner())
def test_requests_about_every_boundary_when_together_then_as_alone(
    models: dict[bool, str], lone: Any, precision: str, kv: str, isa: str, schedule: str
) -> None:
    check(models, lone, precision, kv, isa, TOGETHER[schedule])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [*TOGETHER, *MORE])
@pytest.mark.parametrize(("precision", "kv", "isa"), everything())
def test_requests_about_every_boundary_when_scheduled_in_any_way_then_as_alone(
    models: dict[bool, str], lone: Any, precision: str, kv: str, isa: str, schedule: str
) -> None:
    check(models, lone, precision, kv, isa, {**TOGETHER, **MORE}[schedule])


def test_two_requests_when_one_stands_beyond_a_span_then_as_alone(models: dict[bool, str]) -> None:
    """Few rows and a long past: the spans of one row are split while the other row is already in the next product."""
    for first, second in ((4, 1020), (4, 1024), (4, 1500), (1030, 1031), (1, 4100)):
        generator = torch.Generator().manual_seed(first)
        pair = [torch.randint(3, 280, (length,), generator=generator).tolist() for length in (first, second)]
        asked = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
        for precision in ("bfloat16", "int8", "stored types"):
            model, config = models[precision == "stored types"], {**ENGINE, **PRECISIONS[precision]}
            with LLM(model, **config, num_threads=1) as llm:
                expected = [bits_of(llm.generate([prompt], asked, use_tqdm=False)[0]) for prompt in pair]
            for threads in (2, 3, 4):
                with LLM(model, **config, num_threads=threads) as llm:
                    assert_same_bits(list(map(bits_of, llm.generate(pair, asked, use_tqdm=False))), expected)
