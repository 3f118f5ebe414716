"""A trace runs again bit by bit; one that was damaged is refused, or its first difference is named."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from utils.async_engines import build_model
from utils.tiny_models import build_tiny_checkpoint
from utils.traced import record

from pellucid import LLM, SamplingParams
from pellucid.api.hidden_states import HiddenStatesParams
from pellucid.api.request_options import RequestOptions
from pellucid.errors import PellucidError, TraceError
from pellucid.replay import ReplayReport, replay


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server_run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 requests against an engine on a thread."""
    path = tmp_path_factory.mktemp("trace") / "t.jsonl"
    asyncio.run(record(path, model, "thread", 200))
    return path


def again(path: Path, **overrides: Any) -> ReplayReport:
    report = replay(str(path), **overrides)
    assert report.difference is None, str(report.difference)
    assert report.cut_off == ""
    return report


# ---- equal ------------------------------------------------------------------------------------------------------------


def test_server_run_of_200_requests_when_replayed_then_every_step_is_equal(server_run: Path) -> None:
    report = again(server_run)
    assert report.compares_plans
    assert report.num_requests == 200
    assert report.num_cancelled > 10
    assert report.num_preempted > 10
    assert report.num_tokens > 1000
    assert report.num_logits >= report.num_tokens
    assert "a secret" not in server_run.read_text()


@pytest.mark.parametrize(
    ("overrides", "compares_plans"),
    [
        ({"num_threads": 2}, True),
        ({"enforce_eager": True}, True),
        ({"max_num_batched_tokens": 5}, False),
        ({"max_num_batched_tokens": 512, "num_blocks": 4000, "block_size": 16, "max_num_seqs": 32}, False),
        ({"enable_prefix_caching": False, "policy": "prefill_first", "max_num_batched_tokens": 128}, False),
        ({"async_scheduling": True, "kv_layout": "slot", "block_size": 1, "num_blocks": 300}, False),
        ({"speculative_method": "ngram", "prompt_lookup_min": 1, "speculative_max_num_seqs": 8}, False),
    ],
    ids=["threads", "eager", "small chunks", "room for all", "no cache, whole prompts", "ahead, slots", "drafts"],
)
def test_server_run_when_replayed_under_other_settings_then_tokens_and_logits_are_equal(
    server_run: Path, overrides: dict[str, Any], compares_plans: bool
) -> None:
    report = again(server_run, **overrides)
    assert report.compares_plans is compares_plans
    assert report.num_requests == 200
    assert report.num_tokens > 1000
    assert report.num_logits >= report.num_tokens


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("process", {}),
        ("thread", {"async_scheduling": True}),
        ("thread", {"async_scheduling": True, "speculative_method": "ngram", "prompt_lookup_min": 1}),
        ("thread", {"policy": "prefill_first", "max_num_batched_tokens": 128}),
        ("thread", {"kv_layout": "slot", "block_size": 1, "num_blocks": 240}),
    ],
    ids=["process", "plans ahead", "plans ahead with drafts", "prefill first", "slots"],
)
def test_each_kind_of_engine_when_recorded_then_every_step_is_equal(
    model: Path, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    path = tmp_path / "t.jsonl"
    asyncio.run(record(path, model, kind, 60, **settings))
    report = again(path)
    assert report.compares_plans
    assert report.num_requests == 60
    again(path, max_num_batched_tokens=128, num_blocks=2000, async_scheduling=False)


def test_inline_run_when_requests_want_states_structure_and_choices_then_it_replays(
    model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "t.jsonl"
    with LLM(model, num_blocks=64, block_size=4, max_num_batched_tokens=16, num_threads=1, trace_path=str(path)) as llm:
        prompt = list(range(5, 45))
        llm.generate([prompt, prompt[:20]], SamplingParams(max_tokens=6))
        llm.generate([prompt], return_hidden_states=True, hidden_states_for_tokens=[3, -1])
        llm.generate([prompt], SamplingParams(max_tokens=3), capture=["layers.*.mlp"])
        llm.generate(
            [prompt], SamplingParams(n=3, max_tokens=5, prompt_logprobs=1, bad_words=["ab"], logit_bias={9: 2})
        )
        llm.generate([prompt], SamplingParams(max_tokens=20, structured_outputs={"regex": "[ab]{3}"}))
        vector = np.linspace(-3, 3, llm.engine.checker.hidden_states.steerable["layers.0"], dtype=np.float32)  # type: ignore[union-attr]
        llm.generate([prompt, prompt[:20]], SamplingParams(max_tokens=6), steering={"layers.0": vector})
        for _ in zip(llm.stream(prompt), range(2), strict=False):  # left early: cancelled
            pass
        llm.client.step()  # nothing to do
        assert llm.reset_prefix_cache()
        llm.client.submit(
            prompt, options=RequestOptions(hidden_states=HiddenStatesParams((0,)))
        )  # the engine is closed while it waits
    report = again(path)
    assert (report.num_requests, report.num_cancelled) == (10, 1)
    assert not report.compares_logits
    again(path, max_num_batched_tokens=64, num_threads=2)


@pytest.mark.slow
def test_the_real_model_when_replayed_in_other_chunks_and_threads_then_equal(tmp_path: Path, real_model: Path) -> None:
    path = tmp_path / "t.jsonl"
    settings: dict[str, Any] = {
        "num_blocks": 16,
        "max_model_len": 256,
        "max_num_batched_tokens": 64,
        "trace_logits": True,
    }
    with LLM(str(real_model), num_threads=2, trace_path=str(path), **settings) as llm:
        texts = ["The capital of France is", "Once upon a time " * 20, "A list of numbers: 1, 2, 3," * 4, "Why? " * 30]
        llm.generate(texts, SamplingParams(max_tokens=24, temperature=0.8, ignore_eos=True))
    assert again(path).num_preempted > 0
    assert again(path, num_threads=1, max_num_batched_tokens=16).num_logits == 4 * 24
    assert again(path, enforce_eager=True).compares_plans


def test_model_when_it_lies_elsewhere_then_it_replays_from_there(model: Path, tmp_path: Path) -> None:
    path, moved = tmp_path / "t.jsonl", tmp_path / "moved"
    with LLM(model, num_blocks=64, num_threads=1, trace_path=str(path)) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4))
    moved.mkdir()
    for file in model.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    again(path, model=str(moved))
    assert len(path.read_bytes()) > 0, "the replay wrote over the trace"


def test_trace_whose_beginning_is_gone_then_it_is_refused(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with LLM(model, num_blocks=64, num_threads=1, trace_path=str(path), trace_max_mb=1) as llm:
        for _ in range(8):
            llm.generate([list(range(3, 203))] * 400, SamplingParams(max_tokens=1))
    with pytest.raises(TraceError, match="the beginning of the trace is gone.*trace_max_mb \\(it was 1\\)"):
        replay(str(path))


# ---- damaged ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A short run with chunks, preemption and a cancel, as the lines of its trace."""
    path = tmp_path_factory.mktemp("small") / "t.jsonl"
    settings: dict[str, Any] = {"block_size": 4, "num_blocks": 16, "max_num_batched_tokens": 16, "num_threads": 1}
    with LLM(model, trace_path=str(path), trace_logits=True, max_model_len=256, **settings) as llm:
        client = llm.client
        for index in range(4):
            client.submit(
                [3 + index] * (8 + index), SamplingParams(max_tokens=20, ignore_eos=True), request_id=f"r{index}"
            )
        for _ in range(12):
            client.step()
        client.cancel("r1")
        while client.has_unfinished:
            client.step()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert any(line.get("preempted") for line in lines)
    return lines


Lines = list[dict[str, Any]]


def _first(lines: Lines, tag: str, **having: Any) -> dict[str, Any]:
    return next(line for line in lines if line["tag"] == tag and all(line.get(k) == v for k, v in having.items()))


def _swap(lines: Lines, one: int, other: int) -> None:
    lines[one], lines[other] = lines[other], lines[one]


def _steps(lines: Lines) -> list[int]:
    return [index for index, line in enumerate(lines) if line["tag"] == "step"]


def _set(line: dict[str, Any], **values: Any) -> None:
    line.update(values)


def _token(lines: Lines) -> None:
    line = [line for line in lines if line["tag"] == "step" and line["kind"] == "decode"][3]
    line["new_token_ids"][0][0] += 1


def _logit(lines: Lines) -> None:
    line = [line for line in lines if line["tag"] == "step" and line["kind"] == "decode"][3]
    line["logits"][0][0] ^= 1


def _drop_step(lines: Lines) -> None:
    del lines[_steps(lines)[5]]


def _double_step(lines: Lines) -> None:
    lines.insert(_steps(lines)[5], lines[_steps(lines)[5]])


def _submit_later(lines: Lines) -> None:
    """The first request comes behind the others of its turn."""
    _swap(lines, 1, 2)


def _drop_cancel(lines: Lines) -> None:
    lines.remove(_first(lines, "cancel"))


def _extra_cancel(lines: Lines) -> None:
    lines.insert(lines.index(_first(lines, "cancel")), {**_first(lines, "cancel"), "request_id": "nobody"})


def _cancel_of_other(lines: Lines) -> None:
    _first(lines, "cancel")["request_id"] = "r2"


def _double_submit(lines: Lines) -> None:
    lines.insert(2, lines[1])


def _ending(lines: Lines) -> None:
    line = next(line for line in lines if line.get("finished"))
    name = next(iter(line["finished"]))
    line["finished"][name] = ["stop", 5]


def _entry_of_nobody(lines: Lines) -> None:
    lines[_steps(lines)[6]]["entries"][0][0] = "nobody"


EDITS: dict[str, tuple[Callable[[Lines], Any], str]] = {
    # what is done to the lines, and what is said of it: by the refusal or by the difference
    "no header": (lambda lines: lines.pop(0), "a trace begins with a header; this is a submit"),
    "header of another format": (lambda lines: _set(lines[0], format=99), "format 99; this version reads format 1"),
    "header twice": (lambda lines: lines.insert(3, lines[0]), "line 4: it is a second header"),
    "header without a model": (lambda lines: lines[0].pop("model"), "no header.*model"),
    "another model": (lambda lines: lines[0]["contract"].update(weights="00"), "is of model .* with weights 00"),
    "another recipe": (lambda lines: lines[0]["contract"].update(recipe=2), "is of model .* with recipe 2; .* has 1"),
    "another tokenizer": (lambda lines: lines[0]["contract"].update(tokenizer="00"), "is of model .* with tokenizer 00"),
    "a contract that is none": (lambda lines: lines[0].update(contract={}), "no header.*recipe"),
    "an unknown setting": (lambda lines: lines[0]["config"].update(colour="red"), "settings.*'colour'"),
    "a setting out of range": (lambda lines: lines[0]["config"].update(max_num_seqs=0), "settings.*max_num_seqs is 0"),
    "blocks beyond memory": (lambda lines: lines[0]["resolved"].update(num_blocks=2**29), "num_blocks|block|memory|bytes"),
    "blocks beyond numbers": (lambda lines: lines[0]["resolved"].update(num_blocks=10**30), "no header"),
    "two steps exchanged": (lambda lines: _swap(lines, *_steps(lines)[5:7]), "step .*: the plan's step"),
    "a step missing": (_drop_step, "step|turn"),
    "a step twice": (_double_step, "stands before it"),
    "two arrivals exchanged": (_submit_later, "entries"),
    "an arrival much later": (lambda lines: _set(lines[4], turn=10**18, step=10**18), "the trace has a submit at turn 1000"),
    "an arrival twice": (_double_submit, "cannot be queued: request_id 'r0' is in use"),
    "an arrival missing": (lambda lines: lines.pop(1), "entries"),
    "an id out of the vocabulary": (lambda lines: lines[1]["prompt_token_ids"].append(10**6), "cannot be queued.*token ids"),
    "an id that is a text": (lambda lines: lines[1]["prompt_token_ids"].append("x"), "line 2.*Expected `int`"),
    "an unknown parameter": (lambda lines: lines[1]["params"].update(colour="red"), "cannot be queued.*colour"),
    "a parameter of another type": (lambda lines: lines[1]["params"].update(n="many"), "cannot be queued.*n is 'many'"),
    "choices without end": (lambda lines: lines[1]["params"].update(n=10**9), "cannot be queued.*n is 1000000000"),
    "another prompt": (lambda lines: lines[1]["prompt_token_ids"].__setitem__(0, 99), "checksums of the logits"),
    "another seed": (lambda lines: lines[1]["params"].update(seed=1), "request r0: tokens"),
    "another token": (_token, "request r.: tokens from position"),
    "another checksum": (_logit, "request r.: checksums of the logits from position"),
    "another plan": (lambda lines: lines[_steps(lines)[4]]["entries"][1].__setitem__(2, 9), "request r1: the plan's entries"),
    "an entry of nobody": (_entry_of_nobody, "nobody: the plan's entries"),
    "entries without tokens": (lambda lines: lines[_steps(lines)[4]].update(new_token_ids=[]), "0 lists beside"),
    "another reason": (lambda lines: _first(lines, "step")["entries"].clear() or lines[5].update(new_token_ids=[], logits=[]), "entries"),
    "another end": (_ending, "its end: the trace has \\('stop', 5\\)"),
    "no cancel": (_drop_cancel, "step|entries"),
    "a cancel of nobody": (_extra_cancel, "cancels 'nobody', which was never submitted"),
    "a cancel of another": (_cancel_of_other, "entries|cancel|preempted"),
    "a tag of nothing": (lambda lines: _set(lines[6], tag="leap"), "line 7.*leap"),
    "a negative step": (lambda lines: _set(lines[_steps(lines)[3]], step=-1), ">= 0"),
    "a step beyond numbers": (lambda lines: _set(lines[_steps(lines)[3]], step=10**40), "line"),
    "something behind the end": (lambda lines: lines.append(lines[-2]), "behind the end"),
    "a list for a line": (lambda lines: lines.__setitem__(7, [1, 2]), "line 8.*Expected `object`"),
}  # fmt: skip


def _said(path: Path, **overrides: Any) -> str:
    """The refusal or the difference, in words; empty when all was equal."""
    try:
        report = replay(str(path), **overrides)
    except PellucidError as error:
        return str(error)
    return str(report.difference or report.cut_off)


@pytest.mark.parametrize("edit", EDITS)
def test_damaged_trace_when_replayed_then_refused_or_the_first_difference_is_named(
    small_run: list[dict[str, Any]], tmp_path: Path, edit: str
) -> None:
    change, said = EDITS[edit]
    lines = json.loads(json.dumps(small_run))
    change(lines)
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = _said(path)
    assert re.search(said, found), found
    _said(path, max_num_batched_tokens=7)  # compared request by request it may be equal, but nothing breaks


def test_trace_of_a_version_without_contracts_when_replayed_then_equal(
    small_run: list[dict[str, Any]], tmp_path: Path
) -> None:
    lines = json.loads(json.dumps(small_run))
    del lines[0]["contract"]
    lines[0]["model"]["digest"] = "00"  # which it had in its place
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert replay(str(path)).is_equal


def _text(lines: Lines) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda text: b"", "is empty"),
    "rubbish": (lambda text: bytes(range(256)) * 50, "no header"),
    "rubbish in the middle": (lambda text: _at_line(text, 9, b"\xff\x00\x9c{{{\n"), "line 9"),
    "zeros in the middle": (lambda text: _at_line(text, 9, b"\0" * 5000 + b"\n"), "line 9"),
    "brackets without end": (lambda text: _at_line(text, 9, b"[" * 100_000 + b"\n"), "line 9"),
    "nested parameters": (
        lambda text: text.replace(b'"stop": []', b'"stop": ' + b"[" * 5000 + b"]" * 5000, 1),
        "line 2",
    ),
    "an empty line": (lambda text: _at_line(text, 9, b"\n"), "line 9"),
    "cut off in the header": (lambda text: text[:100], "no header"),
    "cut off in a line": (lambda text: text[:-40], "cut off"),
    "cut off between lines": (lambda text: b"".join(text.splitlines(keepends=True)[:-1]), "no end line"),
    "two lines joined": (lambda text: text.replace(b"\n", b"", 9).replace(b"", b"", 0), "no header"),
    "twice": (lambda text: text + text, "behind the end"),
    "numbers that are none": (lambda text: text.replace(b'"at": ', b'"at": NaN', 1), "line 2"),
    "a number of a million digits": (lambda text: text.replace(b'"at": ', b'"at": ' + b"9" * 10**6, 1), "line 2"),
    "utf-16": (lambda text: text.decode().encode("utf-16"), "no header"),
}


def _at_line(text: bytes, number: int, line: bytes) -> bytes:
    lines = text.splitlines(keepends=True)
    return b"".join([*lines[: number - 1], line, *lines[number - 1 :]])


@pytest.mark.parametrize("damage", BYTES)
def test_trace_of_damaged_bytes_when_replayed_then_refused_by_line(
    small_run: list[dict[str, Any]], tmp_path: Path, damage: str
) -> None:
    change, said = BYTES[damage]
    path = tmp_path / "t.jsonl"
    path.write_bytes(change(_text(small_run)))
    found = _said(path)
    assert re.search(said, found), found[:500]


def test_other_weights_when_a_trace_is_replayed_on_them_then_refused(small_run: Lines, tmp_path: Path) -> None:
    other = build_tiny_checkpoint(tmp_path / "other", "llama", seed=1, max_position_embeddings=16384)
    path = tmp_path / "t.jsonl"
    path.write_bytes(_text(small_run))
    assert "is of model" in _said(path, model=str(other))
    assert "is of model" in _said(path, quantization="int8")


def test_trace_that_cannot_be_opened_then_refused(tmp_path: Path) -> None:
    assert "cannot be read" in _said(tmp_path / "missing.jsonl")
    assert "cannot be read" in _said(tmp_path)
