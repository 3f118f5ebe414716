"""The command line as people use it, on a tiny random model: output, exit status, one-line errors."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from utils.children import finished
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM
from pellucid.commands import jsonl

SMALL = ("--max-model-len", "64", "--num-blocks", "16", "--num-threads", "1")
FIXED = ("--temperature", "0", "--max-tokens", "5", "--ignore-eos")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_checkpoint(tmp_path_factory.mktemp("cli"), "llama"))


def pellucid(*arguments: str, stdin: str = "", **environment: str) -> CompletedProcess[str]:
    command = [sys.executable, "-m", "pellucid.cli", *arguments]
    return finished(command, input=stdin, env={**os.environ, **environment})


def test_info_when_asked_for_activations_then_names_and_widths_in_order(checkpoint: str) -> None:
    lines = pellucid("info", checkpoint, "--activations").stdout.splitlines()
    assert lines[0].split() == ["embed_tokens", "64"]
    assert lines[-1].split() == ["norm", "64"]
    assert ["layers.1.mlp", "64"] in [line.split() for line in lines]


def test_version_and_help_when_asked_then_status_zero() -> None:
    assert pellucid("--version").stdout.startswith("pellucid 0.")
    text = pellucid("generate", "--help").stdout
    for option in (
        "--max-num-seqs",
        "--temperature",
        "--enable-prefix-caching",
        "--no-enable-prefix-caching",
        "--dtype",
    ):
        assert option in text


def test_generate_when_given_a_prompt_or_standard_input_then_the_same_text(checkpoint: str) -> None:
    first = pellucid("generate", "hello", "-m", checkpoint, *SMALL, *FIXED)
    assert first.returncode == 0, first.stderr
    piped = pellucid("generate", "-m", checkpoint, *SMALL, *FIXED, stdin="hello")
    assert piped.stdout == first.stdout
    many = pellucid("generate", "hello", "world", "-m", checkpoint, *SMALL, *FIXED)
    assert many.stdout.startswith("hello" + first.stdout.rstrip("\n"))


def test_chat_when_piped_then_answers_each_line_and_says_its_speed(checkpoint: str) -> None:
    lines = "hello\n/system be brief\nhello\n/reset\n/nonsense\n\n/exit\nnever read\n"
    done = pellucid("chat", "-m", checkpoint, *SMALL, *FIXED, stdin=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 2
    assert "(system message: be brief)" in done.stderr
    assert "unknown command /nonsense" in done.stderr
    assert "10 tokens," in done.stderr
    assert "tokens/s, first token after" in done.stderr


def test_chat_when_the_conversation_outgrows_the_model_then_says_so_and_goes_on(checkpoint: str) -> None:
    done = pellucid("chat", "-m", checkpoint, *SMALL, *FIXED, stdin="x" * 300 + "\nhello\n")
    assert done.returncode == 0
    assert "max_model_len is 64; /reset begins anew" in done.stderr
    assert "5 tokens," in done.stderr


def test_run_when_a_line_is_bad_then_the_others_run_in_order_and_the_status_is_one(
    checkpoint: str, tmp_path: Path
) -> None:
    lines = [
        {"prompt": "hello", "max_tokens": 3},
        {"prompt": [5, 6, 7], "max_tokens": 2, "logprobs": 1},
        {"messages": [{"role": "user", "content": "hello"}]},
        {"prompt": "x", "temperature": -1},
        {"prompt": "x", "colour": "red"},
        {"prompt": 7},
        {"prompt": "x", "messages": []},
        ["not an object"],
        {"prompt": "hello", "n": 2, "max_tokens": 2, "temperature": 1.0, "seed": 3},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)) + "\n{broken\n\n")
    options = ("--temperature", "0", "--max-tokens", "4", "--ignore-eos")
    done = pellucid("run", str(source), "-o", str(target), "-m", checkpoint, *SMALL, *options)
    assert done.returncode == 1
    assert "6 lines were refused or failed" in done.stderr
    results = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(results) == 10
    assert [len(result.get("token_ids", ())) for result in results] == [3, 2, 4, 0, 0, 0, 0, 0, 2, 0]
    assert results[0]["usage"]["completion_tokens"] == 3
    assert "temperature is -1" in results[3]["error"]
    assert results[3]["line"] == 4
    assert "colour" in results[4]["error"]
    assert len(results[8]["choices"]) == 2
    assert len(results[1]["logprobs"]) == 2


def test_run_when_a_line_is_no_utf8_then_it_alone_is_refused(checkpoint: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"prompt": "hello"}\n{"prompt": "\xff"}\n{"prompt": "\\ud800"}\n{"prompt": [5]}\n')
    done = pellucid("run", str(source), "-m", checkpoint, *SMALL, *FIXED, PYTHONIOENCODING="ascii")
    assert done.returncode == 1
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result.get("line") for result in results] == [None, 2, 3, None]
    assert "can't decode byte 0xff" in results[1]["error"]


def test_run_when_a_line_has_no_end_then_it_is_refused_and_the_file_ends_there(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 40)
    lines = b'{"prompt": [5], "max_tokens": 1}\n' + b" " * 60 + b'\n{"prompt": [5]}\n'
    target = io.StringIO()
    with LLM(checkpoint, num_blocks=8, num_threads=1) as llm:
        assert jsonl.run_jsonl(llm, io.BytesIO(lines), target.write, {}, lambda: None) == 1
    results = [json.loads(line) for line in target.getvalue().splitlines()]
    assert [result.get("line") for result in results] == [None, 2]
    assert results[1]["error"] == "the line has more than 40 bytes: nothing behind it is read"


def test_run_when_the_output_is_the_input_then_refused_and_the_file_is_whole(checkpoint: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "hello"}\n')
    done = pellucid("run", str(source), "-o", str(source), "-m", checkpoint, *SMALL)
    assert done.returncode == 2
    assert "is the input too" in done.stderr
    assert source.read_text() == '{"prompt": "hello"}\n'


def test_run_when_from_and_to_a_pipe_then_one_result_a_line(checkpoint: str) -> None:
    stdin = "".join(json.dumps({"prompt": [5, i]}) + "\n" for i in range(3, 40))
    done = pellucid("run", "-", "-m", checkpoint, *SMALL, *FIXED, stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 37


def test_info_when_of_the_machine_or_a_model_then_says_what_was_chosen(checkpoint: str) -> None:
    machine = pellucid("info", "--num-threads", "1").stdout
    for word in ("processor", "chosen", "kernels on 1 threads", "dispatch", "cache folder"):
        assert word in machine
    tables = json.loads(pellucid("info", checkpoint, "--json", "--num-blocks", "16").stdout)
    assert tables[checkpoint]["architecture"] == "LlamaForCausalLM"
    assert tables[checkpoint]["layers"] == "3"
    assert tables["memory"]["KV per token"] == "768 B (float32)"
    assert tables["memory"]["KV cache here"].endswith("16 blocks, 256 tokens")


def test_plan_when_asked_for_then_every_op_with_its_weight_and_the_totals(checkpoint: str) -> None:
    lines = pellucid("info", checkpoint, "--program", "--quantization", "int8").stdout.splitlines()
    head = next(i for i, line in enumerate(lines) if line.strip().startswith("op "))
    kinds = [line.split()[1] for line in lines[head + 2 :] if line[:4].strip().isdigit()]
    assert kinds[:3] == ["embedding", "rope_table", "rms_norm"]
    assert kinds[-2:] == ["gather_rows", "linear"]
    assert kinds.count("attention") == 3
    down = next(line for line in lines if "layers.0.mlp.down_proj" in line)
    assert "[64, 96] Q8_0" in down
    assert f"{2 * 64 * 96:,}" in down
    assert any(line.startswith("weights  in all") for line in lines)


@pytest.mark.slow
def test_compiled_model_when_generated_with_then_the_text_of_its_checkpoint(checkpoint: str, tmp_path: Path) -> None:
    target = str(tmp_path / "tiny.pld")
    assert "bytes" in pellucid("compile", checkpoint, "-o", target).stdout
    asked = ("--temperature", "0", "--max-tokens", "6")
    assert (
        pellucid("generate", "hello", "--model", target, *asked).stdout
        == pellucid("generate", "hello", "--model", checkpoint, *asked).stdout
    )
    refused = pellucid("compile", checkpoint, "-o", str(tmp_path / "tiny.bin"))
    assert refused.returncode == 2
    assert "ends in .pld" in refused.stderr


def test_pull_when_listing_then_names_the_packaged_models() -> None:
    listed = pellucid("pull", "--list").stdout
    assert "smollm2-135m-instruct" in listed
    assert "gemma-3-270m" in listed


BAD_INVOCATIONS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "unknown verb": (("dance",), 2, "No such command"),
    "unknown option": (("generate", "x", "--colour", "red"), 2, "No such option"),
    "not a number": (("generate", "x", "--max-tokens", "many"), 2, "Invalid value for '--max-tokens'"),
    "temperature below zero": (("generate", "x", "MODEL", "--temperature", "-1"), 2, "temperature is -1.0; it must be"),
    "top_p above one": (("generate", "x", "MODEL", "--top-p", "1.5"), 2, "top_p is 1.5; it must be in (0, 1]"),
    "no tokens": (("generate", "x", "MODEL", "--max-tokens", "0"), 2, "max_tokens is 0; it must be"),
    "min above max": (("generate", "x", "MODEL", "--min-tokens", "99", "--max-tokens", "9"), 2, "min_tokens is 99"),
    "empty prompt": (("generate", "", "MODEL"), 2, "the prompt is empty"),
    "prompt too long": (("generate", "x" * 99, "MODEL"), 2, "max_model_len is 64"),
    "block size": (("generate", "x", "MODEL", "--block-size", "0"), 2, "block_size is 0; it must be an integer from 1"),
    "policy": (("generate", "x", "MODEL", "--policy", "lifo"), 2, "policy is 'lifo'; it must be one of"),
    "dtype": (("chat", "MODEL", "--dtype", "int3"), 2, "dtype is 'int3'; it must be one of"),
    "isa": (("generate", "x", "MODEL", "--isa", "mmx"), 2, "isa is 'mmx'; it must be one of"),
    "threads": (("info", "--num-threads", "999"), 2, "num_threads is 999; it must be an integer from 0 to 256"),
    "no such model": (("generate", "x", "-m", "./no-such-folder"), 2, "no-such-folder"),
    "no such file": (("run", "no-such.jsonl", "MODEL"), 2, "no-such.jsonl cannot be read: No such file"),
    "a folder for a file": (("run", ".", "MODEL"), 2, ". cannot be read: Is a directory"),
    "a folder for results": (("run", os.devnull, "MODEL", "-o", "."), 2, ". cannot be written: Is a directory"),
    "no folder for results": (
        ("run", os.devnull, "MODEL", "-o", "no/such/x"),
        2,
        "no/such/x cannot be written: No such",
    ),
    "a file for a folder": (
        ("capture", os.devnull, "MODEL", "-c", "norm", "-o", os.devnull),
        2,
        "cannot be used: File exists",
    ),
    "a bad option for all lines": (
        ("run", os.devnull, "MODEL", "--top-p", "0"),
        2,
        "top_p is 0.0; it must be in (0, 1]",
    ),
    "more positions than the model has": (("info", "MODEL0", "--max-model-len", "9999"), 2, "max_model_len is 9,999"),
    "pull of nonsense": (("pull", "no such name!"), 2, "no such name!"),
}


@pytest.mark.parametrize("case", BAD_INVOCATIONS)
def test_bad_invocation_when_run_then_one_line_with_value_and_limit(checkpoint: str, case: str) -> None:
    arguments, status, message = BAD_INVOCATIONS[case]
    model = ("-m", checkpoint, *SMALL)
    words = {"MODEL": model, "MODEL0": (checkpoint,)}
    command = [part for word in arguments for part in words.get(word, (word,))]
    done = pellucid(*command, HF_HUB_OFFLINE="1")
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") <= 1
