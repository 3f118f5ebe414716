"""A model's configuration: one frozen shape for what config.json says in many spellings.

Defaults per family are those of the transformers configuration classes; both spellings of rotary parameters
(`rope_theta` + `rope_scaling`, and `rope_parameters`) are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pellucid.errors import ConfigError
from pellucid.float32 import FINITE, POSITIVE

FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"
LAYER_TYPES = (FULL_ATTENTION, SLIDING_ATTENTION)

# Greatest accepted values: above every known model, and small enough that sizes multiplied together stay in 64 bits.
LIMITS: dict[str, int] = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2_048,
    "num_attention_heads": 8_192,
    "num_key_value_heads": 8_192,
    "head_dim": 8_192,
    "max_position_embeddings": 2**31 - 1,
    "sliding_window": 2**31 - 1,
    "max_window_layers": 2_048,
    "sliding_window_pattern": 2_048,
}

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2_048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10_000.0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA: dict[str, Any] = {
    **_COMMON,
    "vocab_size": 32_000,
    "hidden_size": 4_096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN: dict[str, Any] = {
    **_COMMON,
    "vocab_size": 151_936,
    "hidden_size": 4_096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "sliding_window": 4_096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {
        **_LLAMA,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4_096,
    },
    "qwen2": {**_QWEN, "attention_bias": True},
    "qwen3": {**_QWEN, "head_dim": 128},
    "gemma3_text": {
        **_COMMON,
        "vocab_size": 262_208,
        "hidden_size": 2_304,
        "intermediate_size": 9_216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4_096,
        "sliding_window_pattern": 6,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
}
# The class of a config that names none: as in transformers, its family decides.
ARCHITECTURES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
# Fields that a family's classes fix, whatever the file says.
_FIXED: dict[str, dict[str, Any]] = {"qwen2": {"attention_bias": True, "mlp_bias": False}}
# Other spellings, tried in this order.
_SPELLINGS: dict[str, tuple[str, ...]] = {"hidden_act": ("hidden_activation", "hidden_act")}
# Families whose sliding window is off unless use_sliding_window.
_OPTIONAL_WINDOW = frozenset({"qwen2", "qwen3"})
TOKEN_KEYS = ("eos_token_id", "bos_token_id", "pad_token_id")
_ROPE_NUMBERS = {
    *("factor", "rope_theta", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("beta_fast", "beta_slow", "attention_factor", "partial_rotary_factor", "mscale", "mscale_all_dim"),
}
_MAX_TEXT = 200


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _bad(name: str, value: object, limit: str) -> ConfigError:
    return ConfigError(f"{name} is {_shown(value)}; {limit}")


class _Fields:
    """Typed access to a config dictionary with a family's defaults behind it."""

    def __init__(self, config: Mapping[str, Any], model_type: str) -> None:
        self.config = config
        self.model_type = model_type
        self.defaults = DEFAULTS.get(model_type, _COMMON)

    def get(self, name: str) -> Any:
        """The value, with the default only where the key is absent: an explicit null stays None."""
        fixed = _FIXED.get(self.model_type, {})
        if name in fixed:
            return fixed[name]
        for spelling in _SPELLINGS.get(name, (name,)):
            if spelling in self.config:
                return self.config[spelling]
        return self.defaults.get(name)

    def optional_size(self, name: str, least: int = 1) -> int | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise _bad(name, value, "it must be an integer")
        if not least <= value <= LIMITS[name]:
            raise _bad(name, value, f"it must be from {least} to {LIMITS[name]}")
        return value

    def size(self, name: str) -> int:
        value = self.optional_size(name)
        if value is None:
            raise _bad(name, None, f"model_type {self.model_type!r} needs an integer from 1 to {LIMITS[name]}")
        return value

    def optional_real(self, name: str, *, positive: bool = True) -> float | None:
        return None if self.get(name) is None else _real(name, self.get(name), positive=positive)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise _bad(name, value, "it must be true or false")
        return value

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT:
            raise _bad(name, value, f"it must be a string of 1 to {_MAX_TEXT} characters")
        return value


@dataclass(frozen=True)
class GivenTokens:
    """Token ids that a file gives: those of the vocabulary, and those that lie outside of it."""

    known: tuple[int, ...]
    outside: tuple[int, ...]

    @classmethod
    def read(cls, name: str, value: object, vocab_size: int) -> GivenTokens:
        """From the value of a key: None, an integer, or a list of integers where there may be several.

        Raises:
            ConfigError: it is anything else.
        """
        may_be_list = name == "eos_token_id"
        values = value if isinstance(value, list) and may_be_list else [] if value is None else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in values):
            raise _bad(name, value, "it must be an integer" + (" or a list of integers" if may_be_list else ""))
        ids = dict.fromkeys(values)
        known = tuple(token for token in ids if 0 <= token < vocab_size)
        return cls(known, tuple(token for token in ids if token not in known))


def _real(name: str, value: object, *, positive: bool = True) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _bad(name, value, "it must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    limits = POSITIVE if positive else FINITE
    if not limits.holds(number):
        raise _bad(name, value, f"it must be {limits.text}")
    return number


@dataclass(frozen=True)
class _Rope:
    theta: float
    scaling: dict[str, Any] | None
    local_theta: float | None


def _normal_scaling(name: str, value: object) -> dict[str, Any]:
    """A rotary dictionary with `rope_type` (older: `type`) checked; numbers must be finite."""
    if not isinstance(value, dict):
        raise _bad(name, value, "it must be an object or null")
    scaling = dict(value)
    kind = scaling.pop("type", None)
    kind = scaling.setdefault("rope_type", kind if kind is not None else "default")
    if not isinstance(kind, str) or not kind:
        raise _bad(f"{name}.rope_type", kind, "it must be a non-empty string")
    for key, entry in scaling.items():
        if (isinstance(entry, (int, float)) and not isinstance(entry, bool)) or (
            key in _ROPE_NUMBERS and entry is not None
        ):
            _real(f"{name}.{key}", entry, positive=key in ("factor", "rope_theta"))
    return scaling


def _rope(fields: _Fields) -> _Rope:
    """Rotary parameters of either spelling. As in transformers, `rope_scaling` goes before `rope_parameters`."""
    parameters = fields.config.get("rope_parameters")
    local_theta = fields.optional_real("rope_local_base_freq")
    if isinstance(parameters, dict) and FULL_ATTENTION in parameters:
        local = _normal_scaling("rope_parameters.sliding_attention", parameters.get(SLIDING_ATTENTION) or {})
        if local["rope_type"] != "default":
            raise _bad("rope_parameters.sliding_attention.rope_type", local["rope_type"], "only default is supported")
        if "rope_theta" in local:
            local_theta = _real("rope_parameters.sliding_attention.rope_theta", local["rope_theta"])
        parameters = parameters[FULL_ATTENTION]
    name = "rope_scaling" if fields.config.get("rope_scaling") else "rope_parameters"
    value = fields.config.get("rope_scaling") or parameters or {}
    scaling = _normal_scaling(name, value)
    theta = scaling.pop("rope_theta", None)
    if theta is None and isinstance(parameters, dict):
        theta = parameters.get("rope_theta")
    if theta is None:
        theta = fields.get("rope_theta")
    if theta is None:
        theta = fields.defaults["rope_theta"]
    default = scaling["rope_type"] == "default" and scaling.get("partial_rotary_factor", 1.0) == 1.0
    return _Rope(_real("rope_theta", theta), None if default else scaling, local_theta)


def _layer_types(fields: _Fields, layers: int, sliding_window: int | None) -> tuple[str, ...] | None:
    """One entry a layer, or None when the family has no mixture."""
    given = fields.config.get("layer_types")
    if given is not None:
        if not isinstance(given, list) or len(given) != layers:
            raise _bad("layer_types", given, f"it must be a list of {layers} entries, one a layer")
        for kind in given:
            if kind not in LAYER_TYPES:
                raise _bad("layer_types", kind, f"known are {', '.join(LAYER_TYPES)}")
        return tuple(given)
    pattern = fields.optional_size("sliding_window_pattern")
    if pattern is not None:
        return tuple(SLIDING_ATTENTION if (layer + 1) % pattern else FULL_ATTENTION for layer in range(layers))
    first = fields.optional_size("max_window_layers", least=0)
    if fields.model_type in _OPTIONAL_WINDOW and sliding_window is not None and first is not None:
        return tuple(SLIDING_ATTENTION if layer >= first else FULL_ATTENTION for layer in range(layers))
    return None


def architecture_of(config: Mapping[str, Any]) -> str:
    """The model class that a config.json dictionary names, else that of its `model_type`, else the `model_type`; it may be "".

    Raises:
        ConfigError: one of the two is of another type.
    """
    value = config.get("architectures")
    names = value if isinstance(value, list) else [] if value is None else [value]
    if names:
        if not isinstance(names[0], str) or len(names[0]) > _MAX_TEXT:
            raise _bad("architectures", value, "it must be a list of class names")
        return names[0]
    model_type = _model_type(_text_config(config))
    return ARCHITECTURES.get(model_type, model_type)


def _model_type(config: Mapping[str, Any]) -> str:
    value = config.get("model_type")
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise _bad("model_type", value, "it must be a string")
    return value


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that says what the language model is; the whole unless there are models of other things beside it."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    return text


@dataclass(frozen=True)
class ModelConfig:
    """What a model class needs to know about a checkpoint. Names are those of config.json.

    `layer_types` is None when all layers are alike: sliding when `sliding_window` is set, else full. `rope_scaling` is
    None for plain rotary; its `rope_type` is one of transformers' or "factors" (each frequency divided by its own of
    `factors`, as GGUF stores llama3's). `attention_bias` of qwen2 means q, k and v alone. Ids outside the vocabulary stand in
    `foreign_tokens` alone, by key. `raw` is the whole file.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    sliding_window: int | None
    layer_types: tuple[str, ...] | None
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    hidden_act: str
    query_pre_attn_scalar: float | None
    rope_local_base_freq: float | None
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    foreign_tokens: dict[str, tuple[int, ...]] = field(repr=False, compare=False)
    raw: dict[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_dict(cls, hf_config: Mapping[str, Any]) -> ModelConfig:
        """Reads a config.json dictionary. ConfigError names the field, its value and the limit.

        A `model_type` that is not in DEFAULTS is accepted when it gives its sizes itself; the registry decides whether
        there is a model for it. Of a multimodal configuration the `text_config` is read.
        """
        if not isinstance(hf_config, Mapping):
            raise _bad("config", hf_config, "it must be an object")
        config = _text_config(hf_config)
        model_type = _model_type(config)
        fields = _Fields(config, model_type)
        if config.get("use_bidirectional_attention"):
            raise _bad("use_bidirectional_attention", True, "only causal attention is supported")
        hidden_size = fields.size("hidden_size")
        heads = fields.size("num_attention_heads")
        kv_heads = fields.optional_size("num_key_value_heads") or heads
        if heads % kv_heads:
            raise _bad("num_attention_heads", heads, f"it must be a multiple of num_key_value_heads, {kv_heads}")
        head_dim = fields.optional_size("head_dim")
        if head_dim is None:
            if hidden_size % heads:
                raise _bad("hidden_size", hidden_size, f"without head_dim it must be a multiple of the {heads} heads")
            head_dim = hidden_size // heads
        if head_dim % 2:
            raise _bad("head_dim", head_dim, "it must be even for rotary embeddings")
        layers = fields.size("num_hidden_layers")
        sliding_window = fields.optional_size("sliding_window")
        if model_type in _OPTIONAL_WINDOW and not fields.flag("use_sliding_window"):
            sliding_window = None
        eps = fields.optional_real("rms_norm_eps")
        vocab_size = fields.size("vocab_size")
        tokens = {name: GivenTokens.read(name, fields.get(name), vocab_size) for name in TOKEN_KEYS}
        rope = _rope(fields)
        return cls(
            architecture=architecture_of(hf_config),
            model_type=model_type,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=fields.optional_size("intermediate_size") or 4 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=fields.size("max_position_embeddings"),
            rms_norm_eps=_COMMON["rms_norm_eps"] if eps is None else eps,
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            sliding_window=sliding_window,
            layer_types=_layer_types(fields, layers, sliding_window),
            attention_bias=fields.flag("attention_bias"),
            mlp_bias=fields.flag("mlp_bias"),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            hidden_act=fields.text("hidden_act"),
            query_pre_attn_scalar=fields.optional_real("query_pre_attn_scalar"),
            rope_local_base_freq=rope.local_theta,
            attn_logit_softcapping=fields.optional_real("attn_logit_softcapping"),
            final_logit_softcapping=fields.optional_real("final_logit_softcapping"),
            bos_token_id=next(iter(tokens["bos_token_id"].known), None),
            eos_token_ids=tokens["eos_token_id"].known,
            foreign_tokens={name: given.outside for name, given in tokens.items() if name in config and given.outside},
            raw=dict(hf_config),
        )

    def layer_window(self, layer: int) -> int | None:
        """Positions that layer `layer` sees, its own included; None: all."""
        if self.layer_types is None or self.layer_types[layer] == SLIDING_ATTENTION:
            return self.sliding_window
        return None
