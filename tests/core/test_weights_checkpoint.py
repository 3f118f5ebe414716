"""Checkpoints of both formats: names, values and configuration as transformers has them.

The models are tiny and random. The GGUF files are written with the reference package's writer and names, the values
transformed as llama.cpp's converter does, and read by transformers for comparison.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from pellucid.errors import ModelNotFoundError, WeightFormatError
from pellucid.models.config import ModelConfig
from pellucid.weights.checkpoint import Checkpoint, open_checkpoint
from pellucid.weights.hub import is_pulled, packaged_path

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-5,
}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": (transformers.Gemma3TextConfig, {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}),
}


def tiny_model(family: str) -> Any:
    torch.manual_seed(0)
    kind, changes = FAMILIES[family]
    model = transformers.AutoModelForCausalLM.from_config(kind(**{**SIZES, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


def stored_as_gguf(family: str, name: str, values: np.ndarray) -> np.ndarray:
    """What llama.cpp's converter makes of a parameter."""
    heads = {"q_proj": SIZES["num_attention_heads"], "k_proj": SIZES["num_key_value_heads"]}.get(name.split(".")[-2])
    if family == "llama" and heads is not None:
        return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    if family == "gemma3" and name.endswith("norm.weight"):
        return values + np.float32(1)
    return values


def write_gguf(family: str, model: Any, path: Path, extra: dict[str, np.ndarray] | None = None) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if family in ("qwen3", "gemma3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if family == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    tokens = [f"t{index}" for index in range(config.vocab_size - 1)] + ["<end_of_turn>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (config.vocab_size - 1) + [3])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(gguf_name, stored_as_gguf(family, name, value.numpy()))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_equal_to(checkpoint: Checkpoint, state: dict[str, torch.Tensor], *, tied: bool) -> None:
    expected = {name for name in state if not (tied and name == "lm_head.weight")}
    assert set(checkpoint.names()) == expected
    for name, view in checkpoint.tensors():
        assert view.name == name
        assert torch.equal(torch.from_numpy(view.to_float32()), state[name].float()), name
        assert torch.equal(torch.from_numpy(checkpoint.tensor(name).to_float32()), state[name].float())


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_of_each_architecture_when_opened_then_equal_to_what_transformers_reads(
    tmp_path: Path, family: str
) -> None:
    model = tiny_model(family)
    write_gguf(family, model, tmp_path / "m.gguf")
    reference = load_gguf_checkpoint(str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=model)["tensors"]
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.format == "gguf"
    assert checkpoint.files == (tmp_path / "m.gguf",)
    assert checkpoint.gguf is not None
    assert_equal_to(checkpoint, reference, tied=model.config.tie_word_embeddings)
    if family != "gemma3":  # + 1 and - 1 round
        assert_equal_to(checkpoint, model.state_dict(), tied=model.config.tie_word_embeddings)


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_of_each_architecture_when_opened_then_config_is_that_of_the_original(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    write_gguf(family, model, tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path)
    original = ModelConfig.from_dict(model.config.to_dict() | {"architectures": [type(model).__name__]})
    config = ModelConfig.from_dict(checkpoint.config)
    for name, value in vars(original).items():
        if name not in ("raw", "layer_types"):
            assert getattr(config, name) == value, name
    layers = range(config.num_hidden_layers)
    assert [config.layer_window(layer) for layer in layers] == [original.layer_window(layer) for layer in layers]
    assert checkpoint.generation_config["eos_token_id"] == [2, SIZES["vocab_size"] - 1]


def test_gguf_with_rope_factors_when_opened_then_they_are_rope_scaling_and_no_parameter(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    write_gguf("llama", tiny_model("llama"), tmp_path / "m.gguf", {"rope_freqs.weight": factors})
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config["rope_scaling"] == {"rope_type": "factors", "factors": factors.tolist()}
    assert ModelConfig.from_dict(checkpoint.config).rope_scaling == checkpoint.config["rope_scaling"]
    assert not [name for name in checkpoint.names() if "rope" in name]


@pytest.mark.parametrize("quantised", ["Q8_0", "Q4_1"])
def test_quantised_q_and_k_of_llama_when_opened_then_rows_move_and_stay_quantised(
    tmp_path: Path, quantised: str
) -> None:
    kind = gguf.GGMLQuantizationType[quantised]
    original = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in (("context_length", 8), ("embedding_length", 64), ("block_count", 1), ("feed_forward_length", 8)):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(4)
    writer.add_vocab_size(8)
    writer.add_layer_norm_rms_eps(1e-5)
    stored = gguf.quants.quantize(stored_as_gguf("llama", "x.q_proj.weight", original), kind)
    writer.add_tensor("blk.0.attn_q.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ((name, view),) = open_checkpoint(tmp_path / "m.gguf").tensors()
    assert (name, view.dtype) == ("model.layers.0.self_attn.q_proj.weight", quantised)
    np.testing.assert_array_equal(view.data.reshape(64, -1), gguf.quants.quantize(original, kind))


@pytest.mark.parametrize("shard_size", ["1GB", "50KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folder_that_transformers_saved_when_opened_then_equal_tensors_and_config(
    tmp_path: Path, dtype: torch.dtype, shard_size: str
) -> None:
    model = tiny_model("qwen3").to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "safetensors"
    assert (len(checkpoint.files) > 1) == (shard_size == "50KB")
    assert checkpoint.gguf is None
    assert checkpoint.generation_config["eos_token_id"] == 2
    assert_equal_to(checkpoint, model.state_dict(), tied=True)
    config = ModelConfig.from_dict(checkpoint.config)
    assert (config.architecture, config.head_dim) == ("Qwen3ForCausalLM", 32)


def test_path_without_a_model_when_opened_then_error_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no model at .*absent: neither a folder nor"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(ModelNotFoundError, match=r"has no model\.safetensors, model\.safetensors\.index\.json or"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelNotFoundError, match=r"pytorch_model\.bin may run code when loaded and is never read"):
        open_checkpoint(tmp_path)
    with pytest.raises(WeightFormatError, match=r"must be .gguf"):
        open_checkpoint(tmp_path / "pytorch_model.bin")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelNotFoundError, match=r"2 files \*\.gguf \(a\.gguf, b\.gguf\); name the file itself"):
        open_checkpoint(tmp_path)


def test_folder_without_config_when_opened_then_error_names_it(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        open_checkpoint(tmp_path)


SMALL = "smollm2-135m-instruct"


@pytest.mark.skipif(not is_pulled(SMALL), reason=f"{SMALL} is not in the cache; `pellucid pull {SMALL}` puts it there")
def test_the_real_small_model_when_opened_then_its_known_shape() -> None:
    checkpoint = open_checkpoint(packaged_path(SMALL))
    config = ModelConfig.from_dict(checkpoint.config)
    assert (config.architecture, config.num_hidden_layers, config.hidden_size) == ("LlamaForCausalLM", 30, 576)
    assert (config.rms_norm_eps, config.rope_theta, config.tie_word_embeddings) == (1e-5, 100_000.0, True)
    assert config.eos_token_ids == (2,)
    assert len(checkpoint.names()) == 272
    assert checkpoint.tensor("model.embed_tokens.weight").dtype == "Q8_0"
