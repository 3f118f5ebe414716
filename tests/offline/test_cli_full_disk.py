"""What the command line writes beside programs: results, shards, figures, pictures; on full disks, killed, under a umask."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from utils.children import finished
from utils.disks import kill_when, names, pellucid, pellucid_limited, small_disk
from utils.tiny_models import build_tiny_checkpoint

SETTINGS = ("--num-blocks", "256", "--num-threads", "1", "--max-num-seqs", "8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_checkpoint(tmp_path_factory.mktemp("disk"), "llama"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """400 lines, every fortieth of which cannot be run."""
    path = tmp_path_factory.mktemp("prompts") / "in.jsonl"
    lines = [{"prompt": "" if number % 40 == 0 else f"hello {number} " * 6} for number in range(1, 401)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def run(checkpoint: str, prompts: str, output: Path) -> tuple[str, ...]:
    return ("run", prompts, "--model", checkpoint, "-o", str(output), "--max-tokens", "4", *SETTINGS)


def capture(checkpoint: str, prompts: str, folder: Path) -> tuple[str, ...]:
    return (
        "capture",
        prompts,
        "--model",
        checkpoint,
        "-o",
        str(folder),
        "-c",
        "layers.*",
        "--shard-mb",
        "1",
        *SETTINGS,
    )


def numbers(path: Path) -> list[int]:
    """The lines that a file of errors names."""
    return [json.loads(line)["line"] for line in path.read_text().splitlines()]


def test_results_when_the_disk_is_full_then_one_line_says_so_and_what_is_written_is_whole(
    checkpoint: str, prompts: str, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 32) as disk:
        done = pellucid(*run(checkpoint, prompts, disk / "out.jsonl"))
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {disk / 'out.jsonl'} cannot be written: No space left on device; ")
        assert done.stderr.count("\n") == 1
        content = (disk / "out.jsonl").read_text()
    assert content.endswith("\n")
    assert all(isinstance(json.loads(line), dict) for line in content.splitlines())
    assert len(content.splitlines()) > 10


def test_results_when_a_limit_on_files_is_met_then_the_same(checkpoint: str, prompts: str, tmp_path: Path) -> None:
    pellucid(*run(checkpoint, prompts, tmp_path / "all.jsonl"))  # packs: that needs more
    limit = (tmp_path / "all.jsonl").stat().st_size // 2
    done = pellucid_limited(limit, *run(checkpoint, prompts, tmp_path / "out.jsonl"))
    assert done.returncode == 1
    assert "out.jsonl cannot be written: File too large; " in done.stderr
    whole, cut = (tmp_path / "all.jsonl").read_text(), (tmp_path / "out.jsonl").read_text()
    assert len(cut.splitlines()) > 10
    assert [json.loads(line).get("text") for line in cut.splitlines()] == [
        json.loads(line).get("text") for line in whole.splitlines()[: len(cut.splitlines())]
    ]


def test_results_when_their_folder_is_missing_then_typed(checkpoint: str, prompts: str, tmp_path: Path) -> None:
    done = pellucid(*run(checkpoint, prompts, tmp_path / "no" / "out.jsonl"))
    assert done.returncode == 2
    assert "out.jsonl cannot be written: No such file or directory" in done.stderr


@pytest.mark.parametrize("verb", ["info", "run"])
def test_standard_output_when_full_then_one_line_and_status_1(checkpoint: str, prompts: str, verb: str) -> None:
    arguments = ("info",) if verb == "info" else ("run", prompts, "--model", checkpoint, "--max-tokens", "2", *SETTINGS)
    command = "import os, sys; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); from pellucid.cli import main; main()"
    done = finished([sys.executable, "-c", command, *arguments])
    assert done.returncode == 1
    assert done.stderr == "error: [Errno 28] No space left on device\n"


def test_capture_when_the_disk_is_full_then_it_goes_on_elsewhere_where_it_stopped(
    checkpoint: str, prompts: str, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    assert pellucid(*capture(checkpoint, prompts, whole)).returncode == 1, "some lines cannot be run"
    assert len(names(whole)) > 3
    with small_disk(tmp_path / "disk", 1500) as disk:
        done = pellucid(*capture(checkpoint, prompts, disk / "out"))
        assert done.returncode == 1
        assert "shard-00001.safetensors cannot be written: No space left on device; " in done.stderr
        assert "bytes are needed in" in done.stderr
        assert names(disk / "out") == ["errors.jsonl", "shard-00000.safetensors"]
        (tmp_path / "moved").mkdir()
        for path in (disk / "out").iterdir():
            (tmp_path / "moved" / path.name).write_bytes(path.read_bytes())
    assert pellucid(*capture(checkpoint, prompts, tmp_path / "moved")).returncode == 1
    check_same(whole, tmp_path / "moved")


def check_same(whole: Path, other: Path) -> None:
    """Two runs captured the same lines, and told the same errors once."""
    assert names(whole) == names(other)
    for path in whole.glob("shard-*"):
        one, two = load_file(path), load_file(other / path.name)
        assert one.keys() == two.keys()
        assert all((one[name] == two[name]).all() for name in one)
    assert numbers(whole / "errors.jsonl") == numbers(other / "errors.jsonl") == list(range(40, 401, 40))


def test_capture_when_killed_while_it_writes_then_it_goes_on_and_leaves_nothing_else(
    checkpoint: str, prompts: str, tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "out"
    pellucid(*capture(checkpoint, prompts, whole))
    command = [sys.executable, "-m", "pellucid.cli", *capture(checkpoint, prompts, folder)]
    kill_when(command, lambda: folder.is_dir() and (folder / "shard-00001.safetensors").exists())
    (folder / "shard-00002.safetensors.0123.part").touch()  # as if it had been killed in a shard
    with open(folder / "errors.jsonl", "a") as file:
        file.write('{"line": 399, "err')  # and in a line
    assert pellucid(*capture(checkpoint, prompts, folder)).returncode == 1
    check_same(whole, folder)


def bench(checkpoint: str, target: Path) -> tuple[str, ...]:
    sizes = (
        "--input-len",
        "4",
        "--output-len",
        "2",
        "--batch-size",
        "1",
        "--num-iters",
        "1",
        "--num-iters-warmup",
        "0",
    )
    return ("bench", "latency", "--model", checkpoint, *sizes, *SETTINGS, "--output-json", str(target))


def test_figures_when_the_disk_is_full_then_they_are_shown_and_the_file_before_stays(
    checkpoint: str, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 8) as disk:
        (disk / "figures.json").write_text("before")
        (disk / "full").write_bytes(bytes(4096))
        done = pellucid(*bench(checkpoint, disk / "figures.json"))
        assert done.returncode == 1
        assert "figures.json cannot be written: No space left on device" in done.stderr
        assert "latency" in done.stdout
        assert (disk / "figures.json").read_text() == "before"
        assert names(disk) == ["figures.json", "full"]


@pytest.mark.slow
def test_files_when_written_under_a_umask_then_their_modes_are_what_it_leaves(
    checkpoint: str, prompts: str, tmp_path: Path
) -> None:
    before = os.umask(0o027)
    try:
        trace = tmp_path / "trace.jsonl"
        for command in (
            ("compile", checkpoint, "-o", str(tmp_path / "m.pld")),
            (*run(checkpoint, prompts, tmp_path / "out.jsonl"), "--trace", str(trace)),
            capture(checkpoint, prompts, tmp_path / "shards"),
            bench(checkpoint, tmp_path / "figures.json"),
            ("trace", "show", str(trace), "-o", str(tmp_path / "trace.svg")),
        ):
            done = pellucid(*command, PELLUCID_CACHE=str(tmp_path / "cache"))
            assert not done.stderr.startswith("error"), (command, done.stderr)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".pld"]) == 2
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in files}
    assert modes.pop("trace.jsonl") == 0o600, "it holds what was asked and answered"
    assert set(modes.values()) == {0o640}, modes
