"""The examples, on a tiny model: what they print, what they compare, how they end."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from utils.tiny_models import build_tiny_checkpoint

from pellucid.testing import Generated

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = ["--num-threads", "1", "--compare-with-cpu"]
CONTEXT = ["--max-prompt-len", "70", "--max-model-len", "148", "--max-tokens", "9", "--trunc-print-len", "30"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_checkpoint(tmp_path_factory.mktemp("examples"), "llama", num_hidden_layers=2))


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(request.param)


batching = pytest.mark.parametrize("example", ["continuous_batching"], indirect=True)
context = pytest.mark.parametrize("example", ["long_context"], indirect=True)


@batching
@pytest.mark.parametrize("policy", ["mixed", "prefill_first", "padded"])
def test_continuous_batching_when_results_match_then_it_says_so_and_ends_well(
    example: ModuleType, policy: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main(["--model", model, "--max-tokens", "5,12", "-n", "3", "--policy", policy, *SHORT]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("All results match!\n")
    assert printed.startswith("3 prompts, 22 tokens, ")
    assert "prompt 1: " in printed
    assert "generated (12 tokens): " in printed


@batching
def test_continuous_batching_when_a_token_differs_then_it_says_which_prompt_and_where(
    example: ModuleType, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = importlib.import_module("compared")
    follow = compared.follow_with_transformers

    def wrong(*arguments: object) -> list[Generated]:
        first, second, *rest = follow(*arguments)
        return [first, Generated([*second.token_ids[:2], second.token_ids[2] ^ 1], second.logprobs[:3]), *rest]

    monkeypatch.setattr(compared, "follow_with_transformers", wrong)
    assert example.main(["--model", model, "--max-tokens", "5", "-n", "3", *SHORT]) == 1
    printed = capsys.readouterr().out
    assert "prompt 1: token 2 is " in printed
    assert printed.endswith("Results differ: prompt 1\n")


@batching
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp", "2"], "tensor_parallel_size is 2; this version runs a model in one process: it must be 1"),
        (["--policy", "lifo"], "policy is 'lifo'; it must be one of: mixed, prefill_first, padded"),
        (["--max-tokens", "many"], "--max-tokens is 'many'; it must be numbers with commas"),
        (["--num-prompts", "0"], "must be at least 1"),
        (["--max-model-len", "100", "--policy", "padded", "--max-tokens", "90"], "max_model_len is 100"),
    ],
)
def test_continuous_batching_when_options_cannot_be_honoured_then_it_ends_with_2_and_the_reason(
    example: ModuleType, options: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = example.main(["--model", model, *options])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err


@context
@pytest.mark.parametrize("policy", ["mixed", "padded"])
def test_long_context_when_it_runs_then_prompts_are_cut_sources_and_results_match(
    example: ModuleType, policy: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", model, "--num-prompts", "2", "--policy", policy, *CONTEXT, *SHORT]
    assert example.main(options) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("All results match!\n")
    assert "prompt 0 (70 tokens): " in printed
    assert "prompt 1 (53 tokens): " in printed
    assert printed.count("generated (9 tokens): ") == 2
    assert all(len(line) < 90 for line in printed.splitlines() if line.startswith(("prompt", "generated")))


@context
def test_long_context_when_nothing_is_left_then_it_ends_with_2(
    example: ModuleType, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main(["--model", model, "--max-prompt-len", "70", "--max-model-len", "128"]) == 2
    assert "a prompt of 70 tokens leaves nothing of --max-model-len 128" in capsys.readouterr().err


@context
def test_long_context_without_a_cap_when_asked_then_the_tokens_are_what_is_left(example: ModuleType) -> None:
    assert example.tokens_left(70, 148, None) == 20
    assert example.tokens_left(64, 148, None) == 84
    assert example.tokens_left(64, 148, 9) == 9


@pytest.mark.slow
@pytest.mark.parametrize("example", ["continuous_batching", "long_context"], indirect=True)
def test_examples_on_the_real_model_when_they_run_then_results_match(example: ModuleType, real_model: Path) -> None:
    options = ["--model", str(real_model), "--policy", "padded", "--compare-with-cpu", "-n", "2"]
    assert example.main([*options, "--max-tokens", "12"]) == 0
