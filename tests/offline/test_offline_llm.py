"""`LLM` and `EngineClient` as callers use them, on a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams
from pellucid.errors import EngineDeadError

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("llm"), "llama")


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(checkpoint, max_model_len=128, num_blocks=64, block_size=4, num_threads=1) as llm:
        yield llm


def test_one_text_when_generated_then_a_list_with_one_output_that_reads_as_a_mapping(llm: LLM) -> None:
    outputs = llm.generate("hello world", GREEDY)
    assert len(outputs) == 1
    output = outputs[0]
    assert output.finished
    assert output.prompt == "hello world"
    assert list(output) == ["request_id", "status", "finish_reason", "token_ids", "text", "usage"]
    assert output["status"] == "finished_length"
    assert output["finish_reason"] == "length"
    assert output["token_ids"] == output.outputs[0].token_ids
    prompt_tokens = len(llm.encode("hello world")[0])
    assert output["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 6,
        "total_tokens": prompt_tokens + 6,
    }
    assert json.loads(json.dumps(dict(output)))["text"] == output.outputs[0].text


def test_many_prompts_when_generated_then_outputs_stand_in_input_order(llm: LLM) -> None:
    prompts = [[5 + i, 9, 11] for i in range(20)]
    outputs = llm.generate(prompts, [SamplingParams(temperature=0, max_tokens=1 + i % 5) for i in range(20)])
    assert [output.prompt_token_ids for output in outputs] == prompts


def test_eos_when_sampled_then_stops_with_the_token_in_ids_and_not_in_text(llm: LLM) -> None:
    eos = llm.engine.eos_token_ids[0]
    forced = SamplingParams(temperature=0, max_tokens=9, allowed_token_ids=[eos])
    output = llm.generate([[5, 6]], forced)[0].outputs[0]
    assert (output.token_ids, output.text, output.finish_reason, output.stop_reason) == ([eos], "", "stop", None)
    ignored = llm.generate(
        [[5, 6]], SamplingParams(temperature=0, max_tokens=3, allowed_token_ids=[eos], ignore_eos=True)
    )
    assert ignored[0]["token_ids"] == [eos] * 3
    assert ignored[0]["finish_reason"] == "length"


def test_min_tokens_when_eos_is_likeliest_then_it_is_masked_until_then(llm: LLM) -> None:
    eos = llm.engine.eos_token_ids[0]
    biased = SamplingParams(temperature=0, max_tokens=9, min_tokens=3, logit_bias={eos: 100.0})
    output = llm.generate([[5, 6]], biased)[0].outputs[0]
    assert len(output.token_ids) == 4
    assert output.token_ids[-1] == eos
    assert eos not in output.token_ids[:3]


def test_stop_token_when_sampled_then_stop_reason_is_its_id(llm: LLM) -> None:
    first = llm.generate([[5, 6]], GREEDY)[0]["token_ids"][1]
    output = llm.generate([[5, 6]], SamplingParams(temperature=0, max_tokens=6, stop_token_ids=[first]))[0].outputs[0]
    assert output.finish_reason == "stop"
    assert output.stop_reason == first
    assert output.token_ids[-1] == first


def test_stop_string_when_it_appears_then_text_is_cut_before_it(llm: LLM) -> None:
    letters = [llm.get_tokenizer().token_to_id(letter) for letter in "abc"]
    params: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "allowed_token_ids": letters, "ignore_eos": True}
    whole = llm.generate([[5, 6]], SamplingParams(**params))[0]["text"]
    stop = whole[3:5]
    cut = llm.generate([[5, 6]], SamplingParams(**params, stop=stop))[0].outputs[0]
    assert cut.text == whole[: whole.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    kept = llm.generate([[5, 6]], SamplingParams(**params, stop=stop, include_stop_str_in_output=True))[0]["text"]
    assert kept == whole[: whole.index(stop) + len(stop)]


def test_stream_when_read_to_the_end_then_joins_to_the_generated_text(llm: LLM) -> None:
    params = SamplingParams(temperature=0.7, seed=5, max_tokens=12, ignore_eos=True, logprobs=1)
    expected = llm.generate([[5, 6, 7]], params)[0]
    chunks = list(llm.stream([5, 6, 7], params))
    assert "".join(chunk.text for chunk in chunks) == expected["text"]
    assert [token for chunk in chunks for token in chunk.token_ids] == expected["token_ids"]
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]
    assert chunks[-1].finish_reason == "length"


def test_stream_when_left_early_then_its_blocks_are_free(llm: LLM) -> None:
    for _ in llm.stream([5, 6, 7], SamplingParams(max_tokens=50, ignore_eos=True)):
        break
    assert llm.kv_cache_stats()["used_blocks"] == 0
    assert not llm.client.has_unfinished


def test_n_choices_when_drawn_then_share_the_prompts_blocks(checkpoint: Path) -> None:
    for caching in (True, False):
        with LLM(checkpoint, num_blocks=64, block_size=4, max_model_len=64, enable_prefix_caching=caching) as llm:
            params = SamplingParams(n=4, temperature=1.0, seed=11, max_tokens=4, ignore_eos=True)
            output = llm.generate([list(range(5, 25))], params)[0]
            assert [choice.index for choice in output.outputs] == [0, 1, 2, 3]
            assert len({tuple(choice.token_ids) for choice in output.outputs}) > 1
            # 5 blocks of prompt once, and at most 2 of each choice's own; not 4 x 6.
            assert llm.kv_cache_stats()["peak_used_blocks"] <= 5 + 4 * 2
            assert output["usage"]["completion_tokens"] == 16


def test_no_seed_when_sampled_then_the_drawn_seed_is_reported_and_reproduces(llm: LLM) -> None:
    free = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
    output = llm.generate([[5, 6, 7]], free)[0].outputs[0]
    assert output.seed is not None
    seeded = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, seed=output.seed)
    assert llm.generate([[5, 6, 7]], seeded)[0]["token_ids"] == output.token_ids


def test_score_when_compared_with_prompt_logprobs_and_greedy_logprobs_then_equal(llm: LLM) -> None:
    generated = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=5, logprobs=0, ignore_eos=True))[0]
    own = [
        row[token].logprob
        for row, token in zip(generated.outputs[0].logprobs or [], generated["token_ids"], strict=True)
    ]
    (scored,) = llm.score([[5, 6, 7]], [generated["token_ids"]])
    assert torch.equal(torch.tensor(scored), torch.tensor(own))


def test_prompt_logprobs_when_asked_with_a_warm_cache_then_every_position_but_the_first_has_a_row(llm: LLM) -> None:
    prompt = list(range(30, 50))
    llm.generate([prompt], GREEDY)
    output = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2))[0]
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(prompt)
    assert output.prompt_logprobs[0] is None
    assert all(token in (row or {}) for token, row in zip(prompt[1:], output.prompt_logprobs[1:], strict=True))


def test_chat_when_one_conversation_or_many_then_one_output_each(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hello"}]
    assert len(llm.chat(conversation, GREEDY)) == 1
    assert len(llm.chat([conversation, conversation], GREEDY)) == 2


def test_client_when_a_request_is_stepped_cancelled_and_collected_then_follows_the_contract(checkpoint: Path) -> None:
    with LLM(checkpoint, num_blocks=32, block_size=4, max_model_len=64) as llm:
        client = llm.client
        first = client.submit([5, 6, 7], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
        second = client.submit([8, 9], SamplingParams(max_tokens=30, ignore_eos=True))
        assert client.get_request_status(first) == "waiting"
        assert client.collect(first) is None
        assert client.step() == []
        assert client.get_request_status(first) == "running"
        assert client.cancel(second)
        finished = [output for _ in range(3) for output in client.step()]
        assert {output.request_id for output in finished} == {first, second}
        assert client.collect(second)["finish_reason"] == "abort"  # type: ignore[index]
        assert client.collect(first)["finish_reason"] == "length"  # type: ignore[index]
        assert client.get_request_history(first) == ["waiting", "running", "finished_length"]
        assert client.get_request_history(second) == ["waiting", "running", "finished_aborted"]
        assert client.is_finished(first)
        assert client.cancel(first)
        assert not client.cancel("nobody")
        assert client.get_request_status("nobody") is None
        with pytest.raises(KeyError, match="nobody"):
            client.collect("nobody")
        stats = client.kv_cache_stats()
        assert (stats["used_blocks"], stats["free_blocks"], stats["num_blocks"]) == (0, 32, 32)
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate([[5]])


def test_prefix_numbers_when_a_donor_is_shared_then_as_specified(checkpoint: Path) -> None:
    with LLM(checkpoint, num_blocks=8, block_size=4, max_model_len=32) as llm:
        one = SamplingParams(temperature=0, max_tokens=1)
        donor = list(range(10, 18))
        llm.generate([donor], one)
        output = llm.generate([[*donor, 99]], one)[0]
        assert output.num_cached_tokens == 8
        stats = llm.kv_cache_stats()
        assert (stats["prefix_hits"], stats["prefix_misses"], stats["prefix_saved_tokens"]) == (1, 1, 8)
        assert (stats["used_blocks"], stats["free_blocks"]) == (0, 8)
        assert llm.reset_prefix_cache()
        assert llm.generate([[*donor, 99]], one)[0].num_cached_tokens == 0


def test_aliases_when_given_then_are_the_fields_that_they_name(checkpoint: Path) -> None:
    with LLM(model_path=str(checkpoint), max_batch_size=3, tensor_parallel_size=1, num_blocks=8) as llm:
        assert llm.config.max_num_seqs == 3
        assert llm.config.model == str(checkpoint)


def test_packed_program_when_loaded_again_then_mapped_and_the_same_bits(checkpoint: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3, ignore_eos=True)
    with LLM(checkpoint, num_blocks=16) as llm:
        first = llm.generate([[5, 6, 7]], params)[0]
    with LLM(checkpoint, num_blocks=16) as llm:
        assert llm.engine.executor.model.from_cache
        again = llm.generate([[5, 6, 7]], params)[0]
    assert again.outputs[0].logprobs == first.outputs[0].logprobs
    assert again["token_ids"] == first["token_ids"]


def test_packed_program_when_damaged_then_made_again(checkpoint: Path) -> None:
    with LLM(checkpoint, num_blocks=16) as llm:
        path = llm.engine.executor.model.file.path
        expected = llm.generate([[5, 6, 7]], GREEDY)[0]["token_ids"]
    content = bytearray(path.read_bytes())
    content[16:40] = b"\0" * 24
    path.write_bytes(content)
    with LLM(checkpoint, num_blocks=16) as llm:
        assert not llm.engine.executor.model.from_cache
        assert llm.generate([[5, 6, 7]], GREEDY)[0]["token_ids"] == expected


def test_trace_when_a_path_is_given_then_one_json_line_a_step(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with LLM(checkpoint, num_blocks=16, trace_path=str(path)) as llm:
        llm.generate([[5, 6, 7]], GREEDY)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["tag"] for line in lines] == ["header", "submit", *["step"] * 6, "end"]
    steps = lines[2:-1]
    assert [line["kind"] for line in steps] == ["prefill", *["decode"] * 5]
    assert steps[0]["entries"][0][:3] == ["req-0", 0, 3]
    assert list(steps[-1]["finished"]) == ["req-0"]
