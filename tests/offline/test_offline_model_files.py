"""Models from elsewhere: what their files say of tokens, sampling and storage is used, left out with a word, or refused by name."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from utils.text_tokenizers import byte_level_metadata
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams
from pellucid.api.sampling_params import model_defaults
from pellucid.errors import (
    ConfigError,
    ModelNotFoundError,
    PellucidError,
    TokenizerError,
    UnsupportedModelError,
    WeightFormatError,
)

SETTINGS: dict[str, Any] = {"num_threads": 1, "num_blocks": 16, "max_num_seqs": 2}
CHOICE = SamplingParams(max_tokens=9, structured_outputs={"choice": ["ab"]})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("files"), "llama", num_hidden_layers=1)


@pytest.fixture
def tiny(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def change(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    found = json.loads(path.read_text()) if path.exists() else {}
    found.update(values)
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def tokens_of(folder: Path, **settings: Any) -> list[int]:
    with LLM(folder, **SETTINGS, **settings) as llm:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        return list(llm.generate([[5, 6, 7]], params, use_tqdm=False)[0]["token_ids"])


# ---- token ids --------------------------------------------------------------------------------------------------------

OUTSIDE = "the vocabulary has 300 tokens: it is left out"
IDS: dict[str, tuple[dict[str, dict[str, Any]], tuple[int, ...], list[str]]] = {
    "beyond the vocabulary": (
        {"generation_config.json": {"eos_token_id": [2, 999]}},
        (2,),
        [f"tiny/generation_config.json: eos_token_id names token 999; {OUTSIDE}"],
    ),
    "the first beyond": ({"generation_config.json": {"eos_token_id": 300}}, (2,), ["eos_token_id names token 300;"]),
    "the last within": ({"generation_config.json": {"eos_token_id": [299]}}, (299, 2), []),
    "negative": ({"generation_config.json": {"eos_token_id": [-1, 2]}}, (2,), ["generation_config.json: eos_token_id names token -1;"]),
    "2^31 and beyond": (
        {"generation_config.json": {"eos_token_id": [2, 2**31, 2**32, 2**63, 2**64, 10**30]}},
        (2,),
        ["generation_config.json: eos_token_id names token 2147483648, 4294967296, 9223372036854775808,"],
    ),
    "of the model's configuration": (
        {"generation_config.json": {"eos_token_id": None}, "config.json": {"eos_token_id": [2, 777]}},
        (2,),
        [f"tiny/config.json: eos_token_id names token 777; {OUTSIDE}"],
    ),
    "twice beyond": (
        {"generation_config.json": {"eos_token_id": 999}, "config.json": {"eos_token_id": 888}},
        (2,),
        ["tiny/config.json: eos_token_id names token 888;", "tiny/generation_config.json: eos_token_id names token 999;"],
    ),
    "what begins and pads": (
        {"generation_config.json": {"bos_token_id": 300, "pad_token_id": -1}, "config.json": {"bos_token_id": 301}},
        (2,),
        ["config.json: bos_token_id names token 301;", "bos_token_id names token 300;", "pad_token_id names token -1;"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IDS)
def test_ids_outside_the_vocabulary_when_loaded_then_left_out_with_one_warning_and_structures_work(
    tiny: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    files, ends, expected = IDS[case]
    for file, values in files.items():
        change(tiny, file, **values)
    for _ in range(2):  # packed, and from the cache
        caplog.clear()
        with LLM(tiny, **SETTINGS) as llm:
            assert llm.engine.eos_token_ids == ends
            assert llm.generate("a", CHOICE, use_tqdm=False)[0]["text"] == "ab"
            params = SamplingParams(max_tokens=3, min_tokens=2, logit_bias={ends[0]: 100.0}, temperature=0)
            output = llm.generate([[5]], params, use_tqdm=False)[0]
            assert (output["finish_reason"], output["token_ids"][-1]) == ("stop", ends[0])
        found = warnings_of(caplog)
        assert len(found) == len(expected)
        assert all(words in text for words, text in zip(expected, found, strict=True))


BAD_IDS: tuple[Any, ...] = ("2", True, 2.0, [2, "3"], [[2]], [None], {"id": 2}, [2.5], [False])


@pytest.mark.parametrize("value", BAD_IDS, ids=str)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_end_that_is_no_id_when_loaded_then_refused_by_file_and_key(tiny: Path, file: str, value: Any) -> None:
    change(tiny, file, eos_token_id=value)
    with pytest.raises(PellucidError, match=rf"tiny/{file}: eos_token_id is .*; it must be an integer or a list of"):
        LLM(tiny, **SETTINGS)


@pytest.mark.parametrize("key", ["bos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", ["0", [0], 1.5, True])
def test_begin_or_padding_that_is_no_id_when_loaded_then_refused_by_file_and_key(
    tiny: Path, key: str, value: Any
) -> None:
    change(tiny, "generation_config.json", **{key: value})
    with pytest.raises(ConfigError, match=f"^tiny/generation_config.json: {key} is .*; it must be an integer"):
        LLM(tiny, **SETTINGS)


def test_end_token_of_a_tokenizer_beyond_the_embedding_when_loaded_then_left_out_and_the_rest_works(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = Backend.from_file(str(tiny / "tokenizer.json"))
    backend.add_special_tokens([f"<x{i}>" for i in range(20)])  # 290 to 309
    backend.save(str(tiny / "tokenizer.json"))
    change(tiny, "tokenizer_config.json", eos_token="<x19>")
    with LLM(tiny, **SETTINGS) as llm:
        assert llm.engine.eos_token_ids == (2,)
        assert llm.generate("a", CHOICE, use_tqdm=False)[0]["text"] == "ab"
        assert llm.generate("a <x3>", SamplingParams(max_tokens=1), use_tqdm=False)[0]["finish_reason"]
    assert warnings_of(caplog) == [f"tiny/tokenizer.json: eos_token names token 309; {OUTSIDE}"]


def write_tiny_gguf(path: Path, **changes: Any) -> Path:
    """A Llama with 704 rows of embedding and a vocabulary of some 670 tokens."""
    metadata = {**byte_level_metadata(), **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 64),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
    ):
        add(value)
    for key, value in metadata.items():
        if key != "general.architecture":
            add_value = {bool: writer.add_bool, str: writer.add_string, list: writer.add_array}.get(type(value))
            add_value(key, value) if add_value else writer.add_uint32(key, value % 2**32)
    draw = np.random.default_rng(0)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", draw.normal(0, 0.2, (64, 64)).astype(np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
    writer.add_tensor("token_embd.weight", draw.normal(0, 0.2, (704, 64)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_ids_of_a_gguf_file_outside_the_vocabulary_when_loaded_then_left_out_with_a_warning_as_in_llama_cpp(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tiny_gguf(tmp_path / "a.gguf", eos_token_id=900, eot_token_id=7, bos_token_id=2**32 - 1)
    with LLM(path, **SETTINGS) as llm:
        assert llm.engine.eos_token_ids[0] == 7
        assert not [token for token in llm.engine.eos_token_ids if token >= 704]
        assert llm.generate("a", CHOICE, use_tqdm=False)[0]["text"] == "ab"
    left_out = "the vocabulary has 704 tokens: it is left out"
    assert warnings_of(caplog) == [
        f"a.gguf: eos_token_id names token 900; {left_out}",
        f"a.gguf: bos_token_id names token 4294967295; {left_out}",
    ]


@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id", "padding_token_id", "eot_token_id"])
@pytest.mark.parametrize("value", ["2", True])
def test_id_of_a_gguf_file_that_is_none_when_loaded_then_refused_by_file_and_key(
    tmp_path: Path, key: str, value: Any
) -> None:
    path = write_tiny_gguf(tmp_path / "a.gguf", **{key: value})
    with pytest.raises(PellucidError, match=rf"^a.gguf: tokenizer.ggml.{key} is {value!r}; it must be an integer"):
        LLM(path, **SETTINGS)


# ---- sampling ---------------------------------------------------------------------------------------------------------

SAMPLING: dict[str, tuple[Any, str]] = {
    "temperature": (500, r"temperature is 500; it must be in [0, 100]"),
    "top_p": (0, r"top_p is 0; it must be in (0, 1]"),
    "top_k": (-7, "top_k is -7; it must be at least 1, or 0 or -1 for all"),
    "min_p": ("0.5", "min_p is '0.5'; it must be a number in [0, 1]"),
    "repetition_penalty": (float("nan"), "repetition_penalty is nan; it must be in [1e-06, 10]"),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_value_out_of_range_when_loaded_then_left_out_with_a_warning_that_names_file_and_key(
    tiny: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    value, words = SAMPLING[name]
    change(tiny, "generation_config.json", **{"do_sample": True, "temperature": 0.25, "top_p": 0.75, name: value})
    with LLM(tiny, **SETTINGS) as llm:
        found = model_defaults(llm.engine.executor.model.generation_config)
    assert found == {key: kept for key, kept in {"temperature": 0.25, "top_p": 0.75}.items() if key != name}
    assert warnings_of(caplog) == [f"tiny/generation_config.json: {words}: it is left out"]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), True, [0.5], {}, "hot", 10**400, 1e308])
def test_temperature_of_any_other_kind_when_loaded_then_left_out_with_a_warning(
    tiny: Path, caplog: pytest.LogCaptureFixture, value: Any
) -> None:
    change(tiny, "generation_config.json", temperature=value, do_sample=True)
    with LLM(tiny, **SETTINGS) as llm:
        assert model_defaults(llm.engine.executor.model.generation_config) == {}
    (warning,) = warnings_of(caplog)
    assert warning.startswith("tiny/generation_config.json: temperature is ")


def test_sampling_values_of_a_model_that_does_not_sample_when_loaded_then_nobody_minds(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(tiny, "generation_config.json", temperature=500, do_sample=False, max_length="x", x=10**30)
    tokens_of(tiny)
    assert warnings_of(caplog) == []


# ---- activations, architectures, quantised checkpoints ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "same"), [("swish", "silu"), ("gelu_new", "gelu_pytorch_tanh"), ("gelu_fast", "gelu_new")]
)
def test_activation_with_several_names_when_loaded_then_each_gives_the_same_tokens(
    tiny: Path, name: str, same: str
) -> None:
    found = []
    for one in (name, same):
        change(tiny, "config.json", hidden_act=one)
        found.append(tokens_of(tiny))
    assert found[0] == found[1]


def test_activation_that_is_unknown_when_loaded_then_the_error_lists_the_known(tiny: Path) -> None:
    change(tiny, "config.json", hidden_act="xielu")
    with pytest.raises(
        UnsupportedModelError, match="^tiny/config.json: activation is 'xielu'; known are .*silu.*gelu_new"
    ):
        LLM(tiny, **SETTINGS)


@pytest.mark.parametrize("value", [..., None, []], ids=["absent", "null", "empty"])
def test_architectures_not_given_when_loaded_then_the_model_type_decides(tiny: Path, value: Any) -> None:
    expected = tokens_of(tiny)
    change(tiny, "config.json", architectures=value)
    assert tokens_of(tiny) == expected
    assert tokens_of(tiny, enforce_eager=True) == expected


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "another family": (
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 64, "hidden_size": ...},
        "unsupported model type 'GPT2LMHeadModel'; known: .*LlamaForCausalLM",
    ),
    "another family without a class": (
        {"model_type": "gpt2", "architectures": ..., "hidden_size": ...},
        "unsupported model type 'gpt2'; known",
    ),
    "nothing is said": ({"model_type": ..., "architectures": None}, "the config names no model type; known"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config 'gptq': quantised matrices"),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config 'awq'"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config 'fp8'"),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantization_config 'bits"),
    "a method without a name": ({"quantization_config": {"bits": 4}}, "quantization_config: quantised matrices"),
    "compressed tensors": ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config 'compressed-t"),
    "not even an object": ({"quantization_config": "gptq"}, "quantization_config 'gptq'"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_checkpoint_of_another_kind_when_loaded_then_refused_by_what_it_is(tiny: Path, case: str) -> None:
    values, words = UNSUPPORTED[case]
    change(tiny, "config.json", **values)
    with pytest.raises(UnsupportedModelError, match=f"^tiny/config.json: {words}"):
        LLM(tiny, **SETTINGS)


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_checkpoint_that_an_older_tool_quantised_when_loaded_then_refused_by_its_file(tiny: Path, file: str) -> None:
    change(tiny, file, bits=4)
    with pytest.raises(UnsupportedModelError, match=f"^tiny/{file}: quantised matrices"):
        LLM(tiny, **SETTINGS)


@pytest.mark.parametrize("value", [None, {}, False])
def test_checkpoint_that_says_it_is_not_quantised_when_loaded_then_it_loads(tiny: Path, value: Any) -> None:
    change(tiny, "config.json", quantization_config=value)
    assert len(tokens_of(tiny)) == 4


# ---- files ------------------------------------------------------------------------------------------------------------


def test_pointers_of_a_clone_without_lfs_when_loaded_then_it_says_so(tiny: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for file, kind in (("tokenizer.json", TokenizerError), ("model.safetensors", WeightFormatError)):
        (tiny / file).write_text(pointer)
        with pytest.raises(kind, match=f"{file}: this is a Git LFS pointer"):
            LLM(tiny, **SETTINGS)
    (tiny / "model.gguf").write_text(pointer)
    with pytest.raises(WeightFormatError, match="^model.gguf: this is a Git LFS pointer"):
        LLM(tiny / "model.gguf", **SETTINGS)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_byte_order_mark_when_loaded_then_as_without(tiny: Path, file: str) -> None:
    expected = tokens_of(tiny)
    (tiny / file).write_bytes(b"\xef\xbb\xbf" + (tiny / file).read_bytes())
    assert tokens_of(tiny) == expected


def test_shards_without_an_index_when_loaded_then_the_error_says_what_is_missing(tiny: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "model-00001-of-00002.safetensors")
    shutil.copy(tiny / "model-00001-of-00002.safetensors", tiny / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelNotFoundError) as caught:
        LLM(tiny, **SETTINGS)
    assert "2 files *.safetensors (model-00001-of-00002.safetensors, " in str(caught.value)
    assert "no model.safetensors.index.json: it belongs to the model" in str(caught.value)
    assert "name the file" not in str(caught.value)


def test_tokenizer_with_an_id_that_no_model_has_when_loaded_then_refused(tiny: Path) -> None:
    vocabulary = json.loads((tiny / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["<x>"] = 4_000_000_000
    (tiny / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(
        TokenizerError, match=r"tokenizer.json: token '<x>' has id 4000000000; ids must be below 16777216"
    ):
        LLM(tiny, **SETTINGS)


def test_tokenizer_that_would_not_be_the_same_again_when_loaded_then_refused(tiny: Path) -> None:
    vocabulary = json.loads((tiny / "tokenizer.json").read_text())
    merged = vocabulary["model"]["merges"][0]
    vocabulary["model"]["vocab"][merged[0]] = vocabulary["model"]["vocab"][merged[1]]
    (tiny / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(
        TokenizerError, match="tokenizer.json: two tokens have one id, and without one of them it is not a usable"
    ):
        LLM(tiny, **SETTINGS)


def test_names_that_cannot_be_paths_when_loaded_then_typed() -> None:
    for name in ("x" * 5_000, "a\0b", "~nobody-has-this-name/x"):
        with pytest.raises(ModelNotFoundError, match="no model"):
            LLM(name)
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        LLM(tokenizer="/nowhere/at/all")


# ---- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["int8", "int8_channel", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weight_that_is_not_finite_when_rounded_to_integers_then_refused_by_tensor_and_place(
    tiny: Path, quantization: str, value: float, dtype: torch.dtype
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(tiny / "model.safetensors").items()}
    tensors[name][3, 70] = value
    save_file(tensors, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        WeightFormatError, match=rf"^tiny: tensor '{name}': value 70 of row 3 is {value}; it must be finite"
    ):
        LLM(tiny, quantization=quantization, **SETTINGS)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_weight_that_is_not_finite_when_it_stays_a_float_then_the_request_ends_with_an_error(
    tiny: Path, name: str, quantization: str | None
) -> None:
    if quantization is not None and not name.endswith("norm.weight"):
        pytest.skip("it is rounded to integers")
    tensors = load_file(tiny / "model.safetensors")
    tensors[name].view(-1)[70 % tensors[name].numel()] = float("nan")
    save_file(tensors, tiny / "model.safetensors", metadata={"format": "pt"})
    with LLM(tiny, quantization=quantization, **SETTINGS) as llm:
        output = llm.generate([[5, 6]], SamplingParams(max_tokens=2), use_tqdm=False)[0]
    assert output["finish_reason"] == "error"
    assert "not finite" in str(output.outputs[0].error)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "linear", "factor": "2"}, "rope_scaling.factor is '2'; it must be a number"),
        ({"rope_type": "linear", "factor": {}}, "rope_scaling.factor is {}; it must be a number"),
        ({"rope_type": "linear"}, "lacks 'factor'"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": -1.0}, "has a value that cannot be used"),
        ({"rope_type": "yarn", "factor": 4.0, "attention_factor": float("inf")}, "it must be finite"),
        ({"rope_type": "factors", "factors": [1.0, 2.0, 3.0]}, "has a value that cannot be used"),
        ({"rope_type": "factors", "factors": [0.0] * 8}, "its 8 frequencies and their factor must be finite in float32"),
    ],
)  # fmt: skip
def test_rotary_scaling_that_cannot_be_computed_when_loaded_then_refused_by_name(
    tiny: Path, scaling: Any, words: str
) -> None:
    change(tiny, "config.json", rope_scaling=scaling, rope_parameters=...)
    with pytest.raises(ConfigError, match=f"^tiny/config.json: .*{words}"):
        LLM(tiny, **SETTINGS)
