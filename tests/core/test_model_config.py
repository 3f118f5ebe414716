"""ModelConfig against transformers' configuration classes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from pellucid.errors import ConfigError
from pellucid.models.config import ARCHITECTURES, DEFAULTS, ModelConfig, architecture_of

CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma3_text": transformers.Gemma3TextConfig,
}
SAME_NAMES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
]
BASE: dict[str, Any] = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


def assert_same(config: ModelConfig, reference: Any) -> None:
    for name in SAME_NAMES:
        assert getattr(config, name) == getattr(reference, name), name
    assert config.head_dim == getattr(reference, "head_dim", reference.hidden_size // reference.num_attention_heads)
    assert config.sliding_window == getattr(reference, "sliding_window", None)
    assert config.eos_token_ids == (() if reference.eos_token_id is None else (reference.eos_token_id,))
    layer_types = getattr(reference, "layer_types", None)
    if layer_types is not None:
        windows = [reference.sliding_window if kind == "sliding_attention" else None for kind in layer_types]
        assert [config.layer_window(layer) for layer in range(config.num_hidden_layers)] == windows
    rope = reference.rope_parameters
    assert config.rope_theta == rope.get("full_attention", rope)["rope_theta"]
    if "sliding_attention" in rope:
        assert config.rope_local_base_freq == rope["sliding_attention"]["rope_theta"]


@pytest.mark.parametrize("model_type", CLASSES)
def test_only_a_model_type_when_read_then_defaults_are_those_of_transformers(model_type: str) -> None:
    config = ModelConfig.from_dict({"model_type": model_type})
    assert_same(config, CLASSES[model_type]())
    assert config.hidden_act == ("gelu_pytorch_tanh" if model_type == "gemma3_text" else "silu")
    assert set(DEFAULTS) == set(CLASSES)


@pytest.mark.parametrize("model_type", CLASSES)
def test_config_that_transformers_wrote_when_read_then_the_same_values(model_type: str) -> None:
    reference = CLASSES[model_type](
        vocab_size=100,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=99,
        rope_theta=123.0,
        bos_token_id=3,
        eos_token_id=4,
    )
    config = ModelConfig.from_dict(reference.to_dict())
    assert_same(config, reference)
    assert config.rope_scaling is None
    assert config.raw["vocab_size"] == 100


def test_window_of_qwen_when_switched_on_then_late_layers_slide_as_in_transformers() -> None:
    given = {"sliding_window": 8, "max_window_layers": 2, "num_hidden_layers": 4, "use_sliding_window": True}
    assert_same(ModelConfig.from_dict({"model_type": "qwen2", **given}), transformers.Qwen2Config(**given))
    off = ModelConfig.from_dict({"model_type": "qwen3", **given, "use_sliding_window": False})
    assert [off.layer_window(layer) for layer in range(4)] == [None] * 4


def test_window_of_mistral_when_read_then_all_layers_slide_and_null_means_none() -> None:
    assert ModelConfig.from_dict({"model_type": "mistral", "sliding_window": 8}).layer_window(31) == 8
    assert ModelConfig.from_dict({"model_type": "mistral", "sliding_window": None}).layer_window(0) is None


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
OLDER_LLAMA3 = {"type" if key == "rope_type" else key: value for key, value in LLAMA3.items()}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {
            "rope_theta": 5e5,
            "rope_scaling": OLDER_LLAMA3,
        },
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    ],
    ids=["rope_scaling", "older type", "rope_parameters"],
)
def test_rotary_scaling_of_each_spelling_when_read_then_the_same(spelling: dict[str, Any]) -> None:
    config = ModelConfig.from_dict({**BASE, **spelling})
    assert config.rope_theta == 5e5
    assert config.rope_scaling == LLAMA3


def test_rotary_of_gemma_per_layer_type_when_read_then_both_bases() -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 7.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5.0},
    }
    config = ModelConfig.from_dict({"model_type": "gemma3_text", "rope_parameters": rope})
    assert (config.rope_theta, config.rope_local_base_freq) == (7.0, 5.0)
    assert config.rope_scaling == {"rope_type": "linear", "factor": 8.0}


def test_biases_per_family_when_read_then_qwen2_always_has_them() -> None:
    assert ModelConfig.from_dict({"model_type": "qwen2", "attention_bias": False}).attention_bias
    assert not ModelConfig.from_dict({"model_type": "qwen3"}).attention_bias
    assert ModelConfig.from_dict({**BASE, "attention_bias": True, "mlp_bias": True}).mlp_bias


def test_list_of_eos_ids_when_read_then_kept_in_order_without_repeats() -> None:
    assert ModelConfig.from_dict({**BASE, "eos_token_id": [5, 2, 5]}).eos_token_ids == (5, 2)
    assert ModelConfig.from_dict({**BASE, "eos_token_id": None}).eos_token_ids == ()


def test_unknown_family_when_it_gives_its_sizes_then_accepted_else_refused() -> None:
    given = {"model_type": "my_model", "architectures": ["MyModelForCausalLM"], **BASE, "vocab_size": 10}
    config = ModelConfig.from_dict({**given, "model_type": "my_model"})
    assert (config.architecture, config.intermediate_size, config.head_dim) == ("MyModelForCausalLM", 256, 16)
    with pytest.raises(ConfigError, match="vocab_size is None; model_type 'my_model' needs"):
        ModelConfig.from_dict({**BASE, "model_type": "my_model"})


def test_multimodal_config_when_read_then_its_text_part() -> None:
    inner = {"model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 3}
    config = ModelConfig.from_dict(
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": inner,
            "dtype": "float16",
        }
    )
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("gemma3_text", 640, 3)
    assert config.architecture == "Gemma3ForConditionalGeneration"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "64"}, "hidden_size is '64'; it must be an integer"),
    ({"hidden_size": True}, "hidden_size is True; it must be an integer"),
    ({"hidden_size": 64.0}, "hidden_size is 64.0; it must be an integer"),
    ({"hidden_size": 0}, "hidden_size is 0; it must be from 1 to"),
    ({"hidden_size": -64}, "hidden_size is -64; it must be from 1"),
    ({"hidden_size": None}, "hidden_size is None; model_type 'llama' needs"),
    ({"hidden_size": 66}, "hidden_size is 66; without head_dim it must be a multiple of the 4 heads"),
    ({"hidden_size": 10**30}, "hidden_size is 1000"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000; it must be from 1 to 2048"),
    ({"num_key_value_heads": 3}, "num_attention_heads is 4; it must be a multiple of num_key_value_heads, 3"),
    ({"head_dim": 7}, "head_dim is 7; it must be even"),
    ({"vocab_size": 2**31}, "vocab_size is 2147483648; it must be from 1 to 16777216"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0; it must be finite and positive"),
    ({"rms_norm_eps": 1e-46}, "rms_norm_eps is 1e-46; it must be finite and positive in float32"),
    ({"rms_norm_eps": 5e-324}, "rms_norm_eps is 5e-324; it must be finite and positive in float32"),
    ({"rms_norm_eps": 1e39}, r"rms_norm_eps is 1e\+39; it must be finite and positive in float32"),
    ({"rope_theta": 1e-50}, "rope_theta is 1e-50; it must be finite and positive in float32"),
    ({"final_logit_softcapping": 1e-46}, "final_logit_softcapping is 1e-46; it must be finite and positive in float32"),
    (
        {"attn_logit_softcapping": 1e300},
        r"attn_logit_softcapping is 1e\+300; it must be finite and positive in float32",
    ),
    ({"query_pre_attn_scalar": 1e-300}, "query_pre_attn_scalar is 1e-300; it must be finite and positive in float32"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 1e-60}}, "rope_scaling.factor is 1e-60; it must be finite"),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1e300}},
        r"rope_scaling.attention_factor is 1e\+300; it must be finite in float32",
    ),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; it must be a number"),
    ({"rope_theta": float("inf")}, "rope_theta is inf; it must be finite"),
    ({"rope_theta": 10**400}, "rope_theta is 1000.*; it must be finite"),
    ({"rope_scaling": [1]}, r"rope_scaling is \[1\]; it must be an object or null"),
    ({"rope_scaling": {"rope_type": 3}}, "rope_scaling.rope_type is 3"),
    ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "rope_scaling.factor is -1.0"),
    ({"layer_types": ["full_attention"]}, "layer_types is .* list of 2 entries"),
    ({"layer_types": ["full_attention", "odd"]}, "layer_types is 'odd'; known are"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
    ({"hidden_act": 3}, "hidden_act is 3"),
    ({"eos_token_id": "2"}, "eos_token_id is '2'; it must be an integer or a list of integers"),
    ({"eos_token_id": [1, [2]]}, r"eos_token_id is \[1, \[2\]\]; it must be an integer or a list"),
    ({"eos_token_id": [1, None]}, r"eos_token_id is \[1, None\]; it must be an integer or a list"),
    ({"eos_token_id": True}, "eos_token_id is True; it must be an integer or a list"),
    ({"eos_token_id": 2.0}, "eos_token_id is 2.0; it must be an integer or a list"),
    ({"bos_token_id": [1]}, r"bos_token_id is \[1\]; it must be an integer"),
    ({"pad_token_id": "<pad>"}, "pad_token_id is '<pad>'; it must be an integer"),
    ({"rms_norm_eps": 1e39}, r"rms_norm_eps is 1e\+39; it must be finite and positive in float32"),
    ({"rms_norm_eps": 1e-50}, "rms_norm_eps is 1e-50; it must be finite and positive in float32"),
    ({"architectures": [3]}, r"architectures is \[3\]"),
    ({"model_type": 5}, "model_type is 5; it must be a string"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True; only causal"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_config_with_one_bad_field_when_read_then_error_names_field_value_and_limit(
    change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{words}"):
        ModelConfig.from_dict({**BASE, **change})


def test_config_that_is_no_object_when_read_then_refused() -> None:
    with pytest.raises(ConfigError, match="config is 3"):
        ModelConfig.from_dict(3)  # type: ignore[arg-type]


def test_ids_outside_the_vocabulary_when_read_then_they_are_told_apart_and_left_out() -> None:
    given = {"vocab_size": 10, "eos_token_id": [2, 10, -1, 2**31, 10**30, 2, 9], "bos_token_id": 99, "pad_token_id": -1}
    config = ModelConfig.from_dict({**BASE, **given})
    assert (config.eos_token_ids, config.bos_token_id) == ((2, 9), None)
    outside = {"eos_token_id": (10, -1, 2**31, 10**30), "bos_token_id": (99,), "pad_token_id": (-1,)}
    assert config.foreign_tokens == outside
    assert ModelConfig.from_dict({**BASE, "vocab_size": 2}).foreign_tokens == {}  # the family's own defaults


def test_every_model_type_when_no_class_is_named_then_it_decides_as_in_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    assert {name: NAMES[name] for name in DEFAULTS} == ARCHITECTURES
    for absent in ({}, {"architectures": None}, {"architectures": []}):
        assert architecture_of({"model_type": "qwen2", **absent}) == "Qwen2ForCausalLM"
        assert architecture_of({"text_config": {"model_type": "gemma3_text"}, **absent}) == "Gemma3ForCausalLM"
    assert architecture_of({"model_type": "gpt2"}) == "gpt2"
    assert architecture_of({"model_type": "llama", "architectures": ["MyForCausalLM"]}) == "MyForCausalLM"
    assert architecture_of({}) == ""
