"""Bytes that are no UTF-8 and values that JSON lacks, around the engine: names of folders, lines of files, pipes, results."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from utils.children import finished
from utils.http_server import running_server
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams
from pellucid.commands import bench
from pellucid.commands.jsonl import run_jsonl
from pellucid.config import EngineConfig
from pellucid.errors import ConfigError
from pellucid.server.http.settings import ServerSettings
from pellucid.service.async_engine import AsyncLLMEngine
from pellucid.trace.lines import Header, decode

SMALL: dict[str, Any] = {"max_model_len": 256, "num_blocks": 32, "num_threads": 1}
OPTIONS = (
    "--max-model-len",
    "64",
    "--num-blocks",
    "16",
    "--num-threads",
    "1",
    "--temperature",
    "0",
    "--max-tokens",
    "5",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("bytes"), "llama")


@pytest.fixture(scope="module")
def oddly_named(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same in a folder whose name is Latin-1."""
    folder = os.fsdecode(os.fsencode(tmp_path_factory.mktemp("odd")) + b"/caf\xe9")
    try:
        shutil.copytree(checkpoint, folder)
    except OSError:
        pytest.skip("the file system takes UTF-8 alone")
    return folder


def _strict(text: str | bytes) -> Any:
    return json.loads(text, parse_constant=lambda constant: pytest.fail(constant))


# ---- names of folders -------------------------------------------------------------------------------------------------


def test_given_model_in_such_a_folder_when_traced_then_its_name_is_shown_as_it_can_be(
    oddly_named: str, tmp_path: Path
) -> None:
    trace = tmp_path / "t.jsonl"
    with LLM(oddly_named, trace_path=str(trace), **SMALL) as llm:
        assert llm.generate("a", SamplingParams(max_tokens=2, ignore_eos=True))[0]["usage"]["completion_tokens"] == 2
    header, *rest = [decode(line) for line in trace.read_bytes().splitlines()]
    assert isinstance(header, Header)
    assert header.model.name == "caf\ufffd"
    assert rest


def test_given_model_in_such_a_folder_when_served_then_every_answer_can_be_sent(oddly_named: str) -> None:
    asked = {"prompt": "a", "max_tokens": 2}
    with running_server(oddly_named) as server, httpx.Client(base_url=server.url, timeout=300) as client:
        for path, body in (
            ("/v1/models", None),
            ("/v1/models/caf%EF%BF%BD", None),
            ("/metrics", None),
            ("/debug/live", None),
            ("/v1/completions", asked),
            ("/v1/completions", {**asked, "stream": True}),
            ("/v1/responses", {"input": "a", "max_output_tokens": 2}),
        ):
            answer = client.get(path) if body is None else client.post(path, json=body)
            assert answer.status_code == 200, (path, answer.text)
            assert "caf\ufffd" in answer.content.decode()


def test_given_model_in_such_a_folder_when_an_engine_process_is_asked_for_then_it_is_told_why_not(
    oddly_named: str,
) -> None:
    with pytest.raises(ConfigError, match=r"model is '.*caf\\udce9'; .* UTF-8"):
        AsyncLLMEngine.start(EngineConfig.from_kwargs(oddly_named, SMALL), engine_process=True)


def test_given_names_of_a_server_that_cannot_be_sent_when_set_then_they_are_refused() -> None:
    for name in ("served_model_name", "allowed_origins"):
        with pytest.raises(ConfigError, match=f"{name} is .*UTF-8"):
            ServerSettings(**{name: ("a", "b\udce9")})


# ---- lines of a file --------------------------------------------------------------------------------------------------

# A line, and what is said of it; None: it runs.
LINES: list[tuple[bytes, str | None]] = [
    (b'{"prompt": "a\\ud83d\\ude00"}', None),
    (b'{"prompt": "a\\u0000"}', None),
    (b'{"prompt": "a\\ud83d"}', "prompt holds the lone surrogate U+D83D at position 1"),
    (b'{"messages": [{"role": "user", "content": "\\udc00"}]}', "messages[0].content holds the lone surrogate U+DC00"),
    (b'{"prompt": "a", "stop": ["\\udc00"]}', "stop[0] holds the lone surrogate U+DC00"),
    (b'{"prompt": "a", "\\udc00": 1}', "the line holds the lone surrogate U+DC00"),
    (b'{"prompt": "a", "temperature": NaN}', "temperature is nan"),
    (b'{"prompt": "a", "temperature": 1e999}', "temperature is inf"),
    (b'{"prompt": "a", "structured_outputs": {"json": {"const": -Infinity}}}', "structured_outputs.json.const is -inf"),
    (b'{"prompt": "a", "seed": 1%s}' % (b"0" * 5000), "the line holds a number of too many digits"),
    (b'{"prompt": [1%s]}' % (b"0" * 4000), "prompt[0] is 1"),
    (b'{"prompt": "a\xff"}', "can't decode byte 0xff"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"prompt": "a", "logprobs": 2, "prompt_logprobs": 1}', None),
]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_given_lines_when_run_then_each_has_a_result_that_can_be_read(
    checkpoint: Path, tmp_path: Path, encoding: str
) -> None:
    source, written = tmp_path / "in.jsonl", list[str]()
    source.write_bytes(b"\n".join(line for line, _ in LINES) + b"\n")
    with LLM(checkpoint, **SMALL) as llm, open(source, "rb") as file:
        failed = run_jsonl(llm, file, written.append, {"max_tokens": 2}, lambda: None, ascii_only=encoding == "ascii")
    results = [_strict(line) for line in written]
    assert encoding == "utf-8" or "".join(written).isascii()
    assert failed == sum(said is not None for _, said in LINES)
    assert len(results) == len(LINES)
    for number, (result, (_, said)) in enumerate(zip(results, LINES, strict=True), start=1):
        if said is None:
            assert "error" not in result
        else:
            assert said in result["error"]
            assert result["line"] == number


# ---- pipes ------------------------------------------------------------------------------------------------------------


def _piped(checkpoint: Path, verb: str, *arguments: bytes | str, stdin: bytes = b"") -> tuple[int, str, str]:
    command = [sys.executable, "-m", "pellucid.cli", verb, *arguments, "-m", str(checkpoint), *OPTIONS]
    done = finished(command, input=stdin, text=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_given_turns_that_are_no_utf8_when_piped_to_chat_then_they_alone_are_refused(checkpoint: Path) -> None:
    status, out, errors = _piped(checkpoint, "chat", stdin=b"hello\n\xff\xfe\nhello\n")
    assert status == 0, errors
    assert errors.count("messages[2].content holds the lone surrogate U+DCFF") == 1
    assert "10 tokens," in errors
    assert out


@pytest.mark.parametrize(("arguments", "stdin"), [((), b"a\xff"), ((b"a\xff",), b"")], ids=["piped", "argument"])
def test_given_prompt_that_is_no_utf8_when_completed_then_one_line_says_so(
    checkpoint: Path, arguments: tuple[bytes, ...], stdin: bytes
) -> None:
    status, out, errors = _piped(checkpoint, "generate", *arguments, stdin=stdin)
    assert (status, out) == (2, "")
    assert errors.startswith("error: prompt holds the lone surrogate U+DCFF at position 1")
    assert errors.count("\n") == 1


# ---- results ----------------------------------------------------------------------------------------------------------


def test_given_figures_that_json_lacks_when_written_then_they_are_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = {"benchmark": "latency", "seconds": {"a": math.nan, "b": [math.inf, 1.5]}, "name": "\udce9"}
    target = tmp_path / "out.json"
    monkeypatch.setattr("pellucid.bench.show.text_of", lambda report: "")
    bench._finish(report, "m\udce9", {}, target)
    found = _strict(target.read_text(encoding="utf-8"))
    assert (found["seconds"], found["name"]) == ({"a": None, "b": [None, 1.5]}, "\ufffd")
