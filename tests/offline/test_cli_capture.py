"""`pellucid capture`: shards whose rows stand beside their tokens, that go on where they were stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from utils.children import finished
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams
from pellucid.commands.capture import ShardWriter
from pellucid.errors import ConfigError
from pellucid.weights.safetensors import write_safetensors

PROMPTS = [f"{'the quick brown fox ' * (i % 5 + 1)}{i}" for i in range(30)]
SETTINGS = ("--num-blocks", "256", "--num-threads", "1", "--max-num-seqs", "8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("capture"), "llama")


def capture(checkpoint: Path, source: Path, folder: Path, *options: str) -> CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pellucid.cli",
        "capture",
        str(source),
        "--model",
        str(checkpoint),
        "-o",
        str(folder),
    ]
    return finished([*command, *SETTINGS, *options])


def written(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def shards(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[Any]:
    with LLM(checkpoint, num_blocks=256, num_threads=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=1)
        return llm.generate(PROMPTS, params, capture=["layers.*.mlp", "norm"])


def test_prompts_when_captured_then_rows_are_those_of_llm_and_stand_beside_their_tokens(
    checkpoint: Path, expected: list[Any], tmp_path: Path
) -> None:
    source = written(tmp_path / "in.jsonl", [{"prompt": text} for text in PROMPTS])
    done = capture(checkpoint, source, tmp_path / "out", "-c", "layers.*.mlp", "-c", "norm", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    (shard,) = shards(tmp_path / "out")
    assert shard["lines"].tolist() == list(range(1, len(PROMPTS) + 1))
    for index, output in enumerate(expected):
        begin, end = shard["offsets"][index : index + 2].tolist()
        assert shard["token_ids"][begin:end].tolist() == output.prompt_token_ids
        for name, rows in output.outputs[0].captured.items():
            assert torch.equal(shard[name][begin:end], rows)


def test_run_when_stopped_between_shards_then_it_goes_on_and_ends_with_the_same_rows(
    checkpoint: Path, expected: list[Any], tmp_path: Path
) -> None:
    lines: list[Any] = [{"prompt": text} for text in PROMPTS * 20]
    options = (
        "-c",
        "layers.*.mlp",
        "-c",
        "layers.*.mlp.gate_up_proj",
        "-c",
        "layers.*",
        "--temperature",
        "0",
        "--shard-mb",
        "1",
    )
    half, folder = written(tmp_path / "half.jsonl", lines[:400]), tmp_path / "out"
    assert capture(checkpoint, half, folder, *options).returncode == 0
    before = sorted(folder.glob("shard-*"))
    assert len(before) > 1
    before[-1].unlink()  # as if it had been stopped while that was filled
    kept = {path: path.stat().st_mtime_ns for path in before[:-1]}
    whole = written(tmp_path / "whole.jsonl", lines)
    assert capture(checkpoint, whole, folder, *options).returncode == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    found = shards(folder)
    assert torch.cat([shard["lines"] for shard in found]).tolist() == list(range(1, len(lines) + 1))
    rows = torch.cat([shard["layers.1.mlp"] for shard in found])
    assert torch.equal(rows, torch.cat([output.outputs[0].captured["layers.1.mlp"] for output in expected * 20]))


def test_folder_when_of_another_run_then_refused_by_what_differs(checkpoint: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [{"prompt": "hello"}])
    assert capture(checkpoint, source, tmp_path / "out", "-c", "norm").returncode == 0
    for options, name in ((("-c", "layers.0"), "activations"), (("-c", "norm", "--capture-dtype", "float16"), "dtype")):
        done = capture(checkpoint, source, tmp_path / "out", *options)
        assert done.returncode == 2
        assert f"has {name} " in done.stderr
        assert "choose another folder" in done.stderr


@pytest.mark.parametrize(
    "lines", [None, np.zeros(0, np.int64), np.zeros(3, np.float32), np.array([[3]]), np.array([0]), np.array([-7])]
)
def test_shard_that_does_not_say_which_lines_it_is_of_when_gone_on_behind_then_refused_by_name(
    tmp_path: Path, lines: np.ndarray | None
) -> None:
    path = tmp_path / "shard-00000.safetensors"
    write_safetensors(path, {} if lines is None else {"lines": lines}, {"a": "b", "dtype": "float32"})
    with pytest.raises(ConfigError, match=f"^{path} does not say which lines it is of"):
        ShardWriter(tmp_path, {"a": "b"}, "float32", 64)


def test_lines_when_some_are_bad_then_the_others_are_captured_and_the_errors_named(
    checkpoint: Path, tmp_path: Path
) -> None:
    lines = [
        {"prompt": "hello"},
        "{broken",
        {"prompt": ""},
        {"prompt": [5, 10**9]},
        {"messages": []},
        {"prompt": "fox"},
    ]
    done = capture(checkpoint, written(tmp_path / "in.jsonl", lines), tmp_path / "out", "-c", "norm")
    assert done.returncode == 1
    (shard,) = shards(tmp_path / "out")
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert 1 in shard["lines"].tolist()
    assert shard["lines"].tolist()[-1] == 6
    assert sorted([*shard["lines"].tolist(), *(error["line"] for error in errors)]) == [1, 2, 3, 4, 5, 6]
    assert all(error["error"] for error in errors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-c", "layers.77"), "no such activation"),
        (("-c", "norm", "--capture-dtype", "int4"), "capture dtype is 'int4'"),
        (("-c", "norm", "--no-hidden-states"), "an engine that hands out hidden states"),
    ],
)
def test_option_when_it_cannot_be_honoured_then_refused_by_name(
    checkpoint: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    source = written(tmp_path / "in.jsonl", [{"prompt": "hello"}])
    done = capture(checkpoint, source, tmp_path / "out", *options)
    assert done.returncode == 2
    assert message in done.stderr
