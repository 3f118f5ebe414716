"""Bad input to `LLM`: a table of what is given, the error that it must get, and the words with value and limit in it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams
from pellucid.errors import (
    ConfigError,
    InvalidRequestError,
    ModelNotFoundError,
    UnsupportedModelError,
    WeightFormatError,
)

LONG = 10**5000  # Python does not write it
Case = tuple[Callable[[LLM], Any], type[Exception], str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("bad_input"), "llama")


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(checkpoint, max_model_len=64, num_blocks=8, block_size=4, max_num_seqs=2, num_threads=1) as llm:
        yield llm


def ask(**params: Any) -> Callable[[LLM], Any]:
    return lambda llm: llm.generate([[5, 6, 7]], SamplingParams(**{"max_tokens": 2, **params}))


REQUESTS: dict[str, Case] = {
    "flat list of ids": (lambda m: m.generate([1, 2, 3]), TypeError, r"inputs must be str, list\[str\], or list"),
    "number": (lambda m: m.generate(5), TypeError, "inputs must be str"),
    "bytes": (lambda m: m.generate(b"abc"), TypeError, "inputs must be str"),
    "mapping": (lambda m: m.generate({"prompt": "x"}), TypeError, "inputs must be str"),
    "text among ids": (lambda m: m.generate(["a", [1]]), TypeError, "inputs must be str"),
    "empty text": (lambda m: m.generate([[]]), InvalidRequestError, "prompt is empty"),
    "id too great": (lambda m: m.generate([[1, 10**6]]), InvalidRequestError, r"prompt\[1\] is 1,000,000.*\[0, "),
    "negative id": (lambda m: m.generate([[-1]]), InvalidRequestError, r"prompt\[0\] is -1"),
    "float id": (lambda m: m.generate([[1.5]]), InvalidRequestError, r"prompt\[0\] is 1.5; token ids are integers"),
    "boolean id": (lambda m: m.generate([[True]]), InvalidRequestError, r"prompt\[0\] is True"),
    "prompt too long": (
        lambda m: m.generate([[5] * 64]),
        InvalidRequestError,
        "prompt has 64 tokens and needs room for 1 more; max_model_len is 64",
    ),
    "more blocks than exist": (
        lambda m: m.generate([[5] * 40]),
        InvalidRequestError,
        "prompt of 40 tokens . 1 needs 11 blocks of 4 tokens; 8 exist",
    ),
    "too few params": (
        lambda m: m.generate([[5], [6]], [SamplingParams()]),
        ValueError,
        "sampling_params has 1 entries; there are 2 inputs",
    ),
    "no priorities": (
        lambda m: m.generate([[5]], priority=[]),
        InvalidRequestError,
        "priority has 0 entries; there are 1 inputs",
    ),
    "priority that is no integer": (
        lambda m: m.generate([[5]], priority=1.5),
        InvalidRequestError,
        "priority is 1.5; it must be one int",
    ),
    "params of another type": (lambda m: m.generate([[5]], {"n": 1}), TypeError, "it must be one SamplingParams"),
    "chat template's end that is no flag": (
        lambda m: m.chat([{"role": "user", "content": "a"}], add_generation_prompt=np.zeros(0)),  # type: ignore[arg-type]
        InvalidRequestError,
        "add_generation_prompt is array",
    ),
    "tools that are no list": (
        lambda m: m.chat([{"role": "user", "content": "a"}], tools=np.array(5)),  # type: ignore[arg-type]
        InvalidRequestError,
        r"tools is array\(5\); it must be a list of functions",
    ),
    "variables of a template that are no mapping": (
        lambda m: m.chat([{"role": "user", "content": "a"}], chat_template_kwargs=np.zeros(2)),  # type: ignore[arg-type]
        InvalidRequestError,
        "chat_template_kwargs is array.*it must map names",
    ),
    "messages of a mapping": (
        lambda m: m.chat({"a": 1}),
        InvalidRequestError,
        "messages is {'a': 1}; it must be a list",
    ),
    "continuations of a text": (lambda m: m.score(["a"], "b"), InvalidRequestError, "continuations is 'b'; it must be"),
    "texts of a number": (lambda m: m.encode(5), InvalidRequestError, "texts is 5; it must be a list of texts"),
    "stop of an array without a dimension": (ask(stop=np.array(5)), InvalidRequestError, r"stop is array\(5\)"),
    "stop without an end": (ask(stop=itertools.cycle("a")), InvalidRequestError, "stop has more than 32 entries"),
    "structure of an array": (ask(structured_outputs={"regex": np.zeros(2)}), InvalidRequestError, "regex is array"),
    "progress that is no flag": (lambda m: m.generate("a", use_tqdm=np.zeros(2)), TypeError, "use_tqdm is array"),
    "unknown generate keyword": (lambda m: m.generate([[5]], top_q=1), TypeError, "top_q"),
    "unknown sampling keyword": (lambda m: SamplingParams(top_q=1), TypeError, "top_q"),
    "negative temperature": (ask(temperature=-0.1), InvalidRequestError, r"temperature is -0.1.*\[0, 100\]"),
    "temperature NaN": (ask(temperature=math.nan), InvalidRequestError, "temperature is nan"),
    "temperature infinite": (ask(temperature=math.inf), InvalidRequestError, "temperature is inf"),
    "top_p zero": (ask(top_p=0.0), InvalidRequestError, r"top_p is 0.0.*\(0, 1\]"),
    "top_p above one": (ask(top_p=1.5), InvalidRequestError, r"top_p is 1.5.*\(0, 1\]"),
    "min_p above one": (ask(min_p=2), InvalidRequestError, r"min_p is 2.*\[0, 1\]"),
    "top_k negative": (ask(top_k=-5), InvalidRequestError, "top_k is -5"),
    "n zero": (ask(n=0), InvalidRequestError, r"n is 0.*\[1, 128\]"),
    "n too great": (ask(n=1000), InvalidRequestError, r"n is 1,?000.*\[1, 128\]"),
    "n boolean": (ask(n=True), InvalidRequestError, "n is True"),
    "max_tokens zero": (ask(max_tokens=0), InvalidRequestError, "max_tokens is 0"),
    "min above max tokens": (ask(min_tokens=9), InvalidRequestError, "min_tokens is 9.*max_tokens, 2"),
    "too many logprobs": (ask(logprobs=101), InvalidRequestError, r"logprobs is 101.*\[0, 100\]"),
    "empty stop": (ask(stop=[""]), InvalidRequestError, "stop"),
    "too many stops": (ask(stop=["x"] * 33), InvalidRequestError, "33.*32"),
    "bias out of range": (ask(logit_bias={5: 101.0}), InvalidRequestError, r"101.*\[-100, 100\]"),
    "bias on unknown id": (ask(logit_bias={10**6: 1.0}), InvalidRequestError, "1,?000,?000"),
    "stop id out of vocabulary": (ask(stop_token_ids=[10**6]), InvalidRequestError, "1,?000,?000"),
    "allowed tokens of which none begins the structure": (
        ask(allowed_token_ids=[5], structured_outputs={"choice": ["yes"]}),
        InvalidRequestError,
        "no token can be sampled: all 300 are excluded by allowed_token_ids, structured_outputs$",
    ),
    "allowed tokens that end too early": (
        ask(allowed_token_ids=[2], min_tokens=2),
        InvalidRequestError,
        "no token can be sampled: all 300 are excluded by allowed_token_ids, min_tokens$",
    ),
    "nothing allowed": (ask(allowed_token_ids=[]), InvalidRequestError, "allowed_token_ids is empty"),
    "penalty too great": (ask(presence_penalty=3.0), InvalidRequestError, r"presence_penalty is 3.0.*\[-2, 2\]"),
    "repetition zero": (ask(repetition_penalty=0.0), InvalidRequestError, r"repetition_penalty is 0.0.*\[1e-06, 10\]"),
    "seed too great": (ask(seed=2**64), InvalidRequestError, "seed is"),
    "surrogate in a prompt": (
        lambda m: m.generate("a\ud800"),
        InvalidRequestError,
        r"prompt holds .* U\+D800 at position 1",
    ),
    "surrogate in one of many": (
        lambda m: m.generate(["a", "\udfff"]),
        InvalidRequestError,
        r"prompt holds .* U\+DFFF",
    ),
    "surrogate in a text": (lambda m: m.encode(["a", "\ud800"]), InvalidRequestError, "texts holds"),
    "surrogate in a streamed prompt": (lambda m: list(m.stream("\ud800")), InvalidRequestError, "prompt holds"),
    "surrogate in a continuation": (lambda m: m.score(["a"], ["\ud800"]), InvalidRequestError, "continuations holds"),
    "surrogate in a scored prompt": (lambda m: m.score(["\ud800"], ["a"]), InvalidRequestError, "prompts holds"),
    "surrogate in a message": (
        lambda m: m.chat([{"role": "user", "content": "a\ud83d"}]),
        InvalidRequestError,
        r"messages\[0\]\.content holds",
    ),
    "surrogate in a part": (
        lambda m: m.chat([{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}]),
        InvalidRequestError,
        r"messages\[0\]\.content\[0\]\.text holds",
    ),
    "surrogate in a tool": (
        lambda m: m.chat([{"role": "user", "content": "a"}], tools=[{"name": "\ud83d"}]),
        InvalidRequestError,
        r"tools\[0\]\.name holds",
    ),
    "surrogate in a template's variable": (
        lambda m: m.chat([{"role": "user", "content": "a"}], chat_template_kwargs={"a": {"\ud83d": 1}}),
        InvalidRequestError,
        r"template_kwargs\.a holds",
    ),
    "surrogate in a salt": (lambda m: m.generate("a", cache_salt="\ud800"), InvalidRequestError, "cache_salt holds"),
    "surrogate in a stop": (ask(stop=["a", "\ud800"]), InvalidRequestError, "stop holds"),
    "surrogate in a bad word": (ask(bad_words="\ud800"), InvalidRequestError, "bad_words holds"),
    "surrogate in a regex": (ask(structured_outputs={"regex": "\ud800"}), InvalidRequestError, "regex holds"),
    "surrogate in a schema": (
        ask(structured_outputs={"json": '{"const": "\\ud800"}'}),
        InvalidRequestError,
        "json holds",
    ),
    "surrogate in a choice": (
        ask(structured_outputs={"choice": ["\ud800"]}),
        InvalidRequestError,
        r"choice\[0\] holds",
    ),
    "surrogate in a name of an activation": (
        lambda m: m.generate("a", capture=["\ud800"]),
        InvalidRequestError,
        "capture",
    ),
    "schema of NaN": (ask(structured_outputs={"json": {"const": math.nan}}), InvalidRequestError, "json is no JSON"),
    "schema of a long number": (
        ask(structured_outputs={"json": {"const": LONG}}),
        InvalidRequestError,
        "json is no JSON",
    ),
    "long id": (lambda m: m.generate([[LONG]]), InvalidRequestError, r"prompt\[0\] is a number of too many digits"),
    "long ids to be told": (lambda m: m.get_tokenizer().decode([LONG]), InvalidRequestError, "too many digits"),
    "long seed": (ask(seed=LONG), InvalidRequestError, "seed is a number of too many digits"),
    "long temperature": (ask(temperature=LONG), InvalidRequestError, "temperature is a number of too many digits"),
    "long n": (ask(n=-LONG), InvalidRequestError, "n is a number of too many digits"),
    "long stop": (ask(stop=[LONG]), InvalidRequestError, r"stop\[0\] is a number of too many digits"),
    "long biased id": (ask(logit_bias={LONG: 1.0}), InvalidRequestError, "logit_bias is a number of too many digits"),
    "long priority": (
        lambda m: m.generate("a", priority=LONG),
        InvalidRequestError,
        "priority is a number of too many",
    ),
    "long position": (
        lambda m: m.generate("a b", return_hidden_states=True, hidden_states_for_tokens=[LONG]),
        InvalidRequestError,
        "hidden_states_for_tokens.* a number of too many digits",
    ),
    "long parameters": (lambda m: m.generate("a", LONG), TypeError, "sampling_params is a number of too many digits"),
    "score of unequal lists": (lambda m: m.score(["a"], []), InvalidRequestError, "1 prompts and 0 continuations"),
    "chat without role": (lambda m: m.chat([{"content": "x"}]), InvalidRequestError, r"messages\[0\]"),
}

CONFIGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown keyword": ({"max_seqs": 4}, TypeError, "unknown keyword argument 'max_seqs'"),
    "alias twice": ({"max_num_seqs": 4, "max_batch_size": 4}, TypeError, "'max_num_seqs' twice"),
    "block size zero": ({"block_size": 0}, ConfigError, "block_size is 0; .* 1 to 256"),
    "block size text": ({"block_size": "16"}, ConfigError, "block_size is '16'"),
    "dtype unknown": ({"dtype": "float8"}, ConfigError, "dtype is 'float8'; .*auto, float32, bfloat16"),
    "policy unknown": ({"policy": "lifo"}, ConfigError, "policy is 'lifo'; .*mixed, prefill_first"),
    "no sequences": ({"max_num_seqs": 0}, ConfigError, "max_num_seqs is 0"),
    "too many threads": ({"num_threads": 1000}, ConfigError, "num_threads is 1000; .*256"),
    "two workers": ({"tensor_parallel_size": 2}, ConfigError, "tensor_parallel_size is 2"),
    "longer than the model": ({"max_model_len": 10**6}, ConfigError, "max_model_len is 1,000,000; the model has"),
    "caching as text": ({"enable_prefix_caching": "yes"}, ConfigError, "enable_prefix_caching is 'yes'"),
    "a long number": ({"num_blocks": LONG}, ConfigError, "num_blocks is a number of too many digits"),
    "gpu": ({"device": "cuda"}, ConfigError, "device is 'cuda'; .*cpu"),
    "speculation of an unknown kind": (
        {"speculative_method": "draft"},
        ConfigError,
        "speculative_method is .draft.; .*ngram",
    ),
    "too many drafts": ({"num_speculative_tokens": 17}, ConfigError, "num_speculative_tokens is 17; .*16"),
    "tails that end before they begin": (
        {"prompt_lookup_min": 5, "prompt_lookup_max": 3},
        ConfigError,
        "prompt_lookup_min is 5; it must be at most prompt_lookup_max, 3",
    ),
    "plans ahead as text": ({"async_scheduling": "yes"}, ConfigError, "async_scheduling is .yes."),
    "layout unknown": ({"kv_layout": "paged"}, ConfigError, "kv_layout is .paged.; .*block, slot"),
    "slots of sixteen tokens": (
        {"kv_layout": "slot", "block_size": 32},
        ConfigError,
        "block_size is 32; with kv_layout .slot.",
    ),
    "trace into nowhere": ({"trace_path": "/nonexistent/folder/t.jsonl"}, ConfigError, "trace file"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_bad_request_when_submitted_then_typed_error_with_value_and_limit(llm: LLM, case: str) -> None:
    call, kind, message = REQUESTS[case]
    with pytest.raises(kind, match=message):
        call(llm)
    assert llm.kv_cache_stats()["used_blocks"] == 0
    assert not llm.client.has_unfinished
    assert len(llm.generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True))[0]["token_ids"]) == 2


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_config_when_loading_then_typed_error_with_value_and_limit(checkpoint: Path, case: str) -> None:
    kwargs, kind, message = CONFIGS[case]
    with pytest.raises(kind, match=message):
        LLM(checkpoint, **kwargs)


def test_bad_request_among_good_ones_when_generating_then_none_is_left_behind(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError):
        llm.generate([[5, 6], [7, 8], []], SamplingParams(max_tokens=4))
    assert not llm.client.has_unfinished
    assert llm.kv_cache_stats()["used_blocks"] == 0


def test_no_model_at_a_path_when_loading_then_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nothing-here"):
        LLM(tmp_path / "nothing-here")
    with pytest.raises(ModelNotFoundError, match="no model.safetensors"):
        LLM(tmp_path)


def test_unknown_architecture_when_loading_then_lists_the_known(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["OtherForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match="'OtherForCausalLM'; known: .*LlamaForCausalLM"):
        LLM(tmp_path)


def test_checkpoint_of_another_size_than_its_config_when_loading_then_names_the_parameter(
    checkpoint: Path, tmp_path: Path
) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    wider = {**config, "intermediate_size": config["intermediate_size"] * 2}
    (tmp_path / "config.json").write_text(json.dumps(wider))
    with pytest.raises(WeightFormatError, match="gate_up_proj.weight' has shape"):
        LLM(tmp_path)
