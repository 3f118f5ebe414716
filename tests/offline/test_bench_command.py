"""`pellucid bench` on a tiny random model: every verb runs, counts what it made, and refuses what cannot be measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from utils.children import finished
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM
from pellucid.bench.limits import step_cost
from pellucid.bench.offline import decode_steps
from pellucid.bench.workload import Workload, run
from pellucid.errors import InvalidRequestError

SMALL: dict[str, Any] = {"max_model_len": 128, "num_blocks": 64, "num_threads": 1}
FLAGS = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_checkpoint(tmp_path_factory.mktemp("bench"), "llama"))


def bench(*arguments: str) -> CompletedProcess[str]:
    command = [sys.executable, "-m", "pellucid.cli", "bench", *arguments]
    return finished(command, timeout=180)


def report_of(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    target = tmp_path / "report.json"
    done = bench(*arguments, "--output-json", str(target), *FLAGS)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(target.read_text())
    return found, done.stdout


def test_latency_when_run_then_counts_its_iterations_and_shows_the_host(checkpoint: str, tmp_path: Path) -> None:
    arguments = ("--input-len", "9", "--output-len", "5", "--batch-size", "3", "--num-iters", "2")
    report, text = report_of(tmp_path, "latency", "-m", checkpoint, *arguments, "--num-iters-warmup", "1")
    assert report["latency_seconds"]["count"] == 2
    assert report["time_to_first_token_seconds"]["count"] == 2 * 3
    assert report["time_per_output_token_seconds"]["count"] == 2 * 3
    steps = report["steps"]
    assert steps["steps"] == 2 * 5  # a prefill step brings the first token, four decode steps the others
    assert 0 < steps["execute"] < steps["wall"]
    assert steps["sample"] > 0
    assert report["conditions"]["engine"]["enable_prefix_caching"] is False
    assert report["conditions"]["num_threads"] == 1
    for part in ("schedule", "execute", "sample", "output", "host's share", "output tokens/s"):
        assert part in text


def test_throughput_when_lengths_vary_then_rates_follow_from_tokens_and_seconds(
    checkpoint: str, tmp_path: Path
) -> None:
    arguments = ("--num-prompts", "6", "--input-len", "10", "--output-len", "8", "--random-range-ratio", "0.5")
    report, text = report_of(tmp_path, "throughput", "-m", checkpoint, *arguments)
    again, _ = report_of(tmp_path, "throughput", "-m", checkpoint, *arguments)
    assert 6 * 5 <= report["prompt_tokens"] <= 6 * 15
    assert (report["prompt_tokens"], report["output_tokens"]) == (again["prompt_tokens"], again["output_tokens"])
    assert report["output_tokens_per_second"] == pytest.approx(report["output_tokens"] / report["seconds"])
    total = report["prompt_tokens"] + report["output_tokens"]
    assert report["total_tokens_per_second"] == pytest.approx(total / report["seconds"])
    assert "requests/s" in text


def test_startup_when_run_then_parts_make_the_whole_and_memory_is_told(checkpoint: str, tmp_path: Path) -> None:
    report, text = report_of(tmp_path, "startup", "-m", checkpoint, "--num-iters", "2")
    for one in (report["first_start"]["seconds"],):
        parts = [one[name] for name in ("interpreter", "imports", "load", "first_token")]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(one["total"])
    assert report["seconds"]["total"]["count"] == 2
    assert 10 * MEGABYTE < report["peak_bytes"] < 2000 * MEGABYTE
    assert "peak memory" in text


def test_batch_curve_when_run_then_each_size_has_its_steps_and_a_limit(checkpoint: str, tmp_path: Path) -> None:
    arguments = ("--batch-sizes", "1,4", "--input-len", "8", "--num-steps", "3")
    report, text = report_of(tmp_path, "batch-curve", "-m", checkpoint, *arguments)
    assert [point["batch_size"] for point in report["points"]] == [1, 4]
    for point in report["points"]:
        assert point["step_seconds"]["count"] == 3
        assert 8 < point["context"] < 20
        assert point["reached"] == pytest.approx(point["limit_seconds"] / point["step_seconds"]["median"])
    assert "limits of this machine" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("latency", "--num-iters", "0"), "num_iters is 0; it must be at least 1"),
        (("latency", "--batch-size", "0"), "batch_size is 0"),
        (("latency", "--input-len", "100", "--output-len", "29"), "100 + 29 tokens; max_model_len is 128"),
        (("latency", "--output-len", "0"), "both must be at least 1"),
        (("throughput", "--num-prompts", "0"), "num_prompts is 0"),
        (("throughput", "--random-range-ratio", "1"), "random_range_ratio is 1.0"),
        (("startup", "--num-iters", "0"), "num_iters is 0"),
        (("startup", "--dtype", "int3"), "dtype is 'int3'"),
        (("batch-curve", "--batch-sizes", "1,x"), "batch_sizes has 'x'"),
        (("batch-curve", "--batch-sizes", "8", "--max-num-seqs", "4"), "batch_sizes has 8; max_num_seqs is 4"),
        (("throughput", "--output-json", "no/such/folder/x.json"), "its folder does not exist"),
    ],
)
def test_bench_when_an_option_is_out_of_range_then_one_line_and_status_two(
    checkpoint: str, arguments: tuple[str, ...], message: str
) -> None:
    done = bench(*arguments, "-m", checkpoint, *FLAGS)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_run_when_the_workload_is_done_then_every_step_has_a_record_and_nothing_is_left(checkpoint: str) -> None:
    with LLM(checkpoint, **SMALL, enable_prefix_caching=False) as llm:
        workload = Workload.random([5, 20], [4, 7], llm.engine.vocab_size, seed=3)
        measured = run(llm, workload)
        assert (measured.prompt_tokens, measured.output_tokens) == (25, 11)
        assert len(measured.records) == len(measured.step_seconds) == 7
        assert measured.recorded_seconds == measured.seconds
        assert len(measured.first_token) == len(measured.between_tokens) == 2
        assert llm.engine.block_manager.num_used_blocks == 0
        assert workload == Workload.random([5, 20], [4, 7], llm.engine.vocab_size, seed=3)


def test_decode_steps_when_prompts_take_several_steps_then_only_whole_batches_count(checkpoint: str) -> None:
    with LLM(checkpoint, **SMALL, max_num_batched_tokens=16, enable_prefix_caching=False) as llm:
        prompts = Workload.random([20] * 4, [1] * 4, llm.engine.vocab_size, seed=1).prompts
        seconds, context = decode_steps(llm, prompts, 5)
        assert len(seconds) == 5
        full = [record for record in llm.engine.trace.records if len(record.tokens) == 4 and record.kind == "decode"]
        assert len(full) >= 6
        assert context > 20
        assert llm.engine.block_manager.num_used_blocks == 0


def test_decode_steps_when_the_cache_is_too_small_then_says_how_much_it_holds(checkpoint: str) -> None:
    with LLM(checkpoint, max_model_len=64, num_blocks=5, num_threads=1) as llm:
        prompts = Workload.random([30] * 4, [1] * 4, llm.engine.vocab_size, seed=1).prompts
        with pytest.raises(InvalidRequestError, match="the cache holds 80 tokens"):
            decode_steps(llm, prompts, 5)
        assert llm.engine.block_manager.num_used_blocks == 0


def test_step_cost_when_float32_then_counts_every_matrix_of_the_model_once(checkpoint: str) -> None:
    with LLM(checkpoint, **SMALL) as llm:
        config = llm.engine.executor.model.config
        cost = step_cost(llm.engine.executor.model, llm.engine.executor.kv_cache.bytes_per_token)
    width, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    layer = width * (2 * width + 2 * kv) + 3 * width * config.intermediate_size
    matrices = config.num_hidden_layers * layer + config.vocab_size * width
    assert cost is not None
    assert cost.operations == {"float32": 2 * matrices}
    assert cost.weight_bytes >= 4 * matrices  # panels are padded
    assert cost.kv_bytes_per_token == 2 * config.num_hidden_layers * kv * 4
