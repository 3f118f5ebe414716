"""GGUF metadata -> the config.json and generation_config.json that Hugging Face would have for the model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pellucid.errors import UnsupportedModelError, WeightFormatError
from pellucid.weights.gguf import GGUFFile
from pellucid.weights.gguf_names import ARCHITECTURES, ROPE_FACTORS, ArchitectureNames
from pellucid.weights.json_files import format_error

_MAX_LAYERS = 10_000
_MAX_SIZE = 2**31 - 1
_GEMMA3_SLIDING_WINDOW_PATTERN = 6
_GEMMA3_LOCAL_ROPE_THETA = 10_000.0
_GEMMA3_27B_LAYERS = 62  # the one size whose attention is scaled by hidden_size / heads instead of the head width
_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type

# Control tokens that end a turn; converters often record only one end-of-sequence id.
_END_OF_TURN_TOKENS = ("<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>")


class _Fields:
    """Typed access to `<architecture>.<key>`."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.prefix = file.architecture

    def bad(self, key: str, value: object, limit: str) -> WeightFormatError:
        return format_error(self.file.path, key, value, limit)

    def get(self, key: str) -> object:
        return self.file.metadata.get(f"{self.prefix}.{key}")

    def optional_size(self, key: str, limit: int = _MAX_SIZE) -> int | None:
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise self.bad(f"{self.prefix}.{key}", value, f"it must be an integer from 1 to {limit}")
        return value

    def size(self, key: str, limit: int = _MAX_SIZE) -> int:
        value = self.optional_size(key, limit)
        if value is None:
            raise self.bad(f"{self.prefix}.{key}", None, "the key is required")
        return value

    def optional_real(self, key: str) -> float | None:
        """A float32 as the shortest decimal that names it, so that 1e-5 stays 1e-5."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.bad(f"{self.prefix}.{key}", value, "it must be a finite number")
        return float(str(np.float32(value)))

    def real(self, key: str) -> float:
        value = self.optional_real(key)
        if value is None:
            raise self.bad(f"{self.prefix}.{key}", None, "the key is required")
        return value

    def token(self, key: str) -> int | None:
        """An optional `tokenizer.ggml.<key>` id; whether it is one of the vocabulary is for others to say."""
        value = self.file.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.bad(f"tokenizer.ggml.{key}", value, "it must be an integer")
        return value


def architecture_names(file: GGUFFile) -> ArchitectureNames:
    """The name table of a file; UnsupportedModelError, listing what is known, when there is none."""
    names = ARCHITECTURES.get(file.architecture)
    if names is None:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModelError(f"{file.path.name}: architecture {file.architecture!r}; supported are {known}")
    split = file.metadata.get("split.count", 0)
    if isinstance(split, int) and split > 1:
        raise UnsupportedModelError(f"{file.path.name}: one of {split} parts; merge them into one file first")
    return names


def _rope_scaling(fields: _Fields, head_dim: int) -> dict[str, Any] | None:
    """`rope_scaling` as in config.json; "factors" divides each frequency by its own factor (llama3 as converted)."""
    factors = fields.file.tensors.get(ROPE_FACTORS)
    if factors is not None:
        values = factors.to_float32().reshape(-1)
        if values.size != head_dim // 2 or not np.isfinite(values).all() or (values <= 0).any():
            limit = f"it must be {head_dim // 2} finite positive values"
            raise fields.bad(ROPE_FACTORS, values[:4].tolist(), limit)
        return {"rope_type": "factors", "factors": values.tolist()}
    kind = fields.get("rope.scaling.type")
    factor = fields.optional_real("rope.scaling.factor") or fields.optional_real("rope.scale_linear")
    if kind is None:
        kind = "linear" if factor not in (None, 1.0) else "none"
    if kind == "none" or (kind == "linear" and factor in (None, 1.0)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor is not None:
        scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
        original = fields.optional_size("rope.scaling.original_context_length")
        if original is not None:
            scaling["original_max_position_embeddings"] = original
        return scaling
    raise UnsupportedModelError(
        f"{fields.file.path.name}: rope.scaling.type {kind!r} with factor {factor}; supported are none, linear, yarn"
    )


def _vocab_size(fields: _Fields) -> int:
    """Rows of the embedding, which is what the logits have."""
    embedding = fields.file.tensors.get("token_embd.weight")
    if embedding is not None:
        return embedding.rows
    return fields.size("vocab_size")


def _gemma3(fields: _Fields, config: dict[str, Any]) -> dict[str, Any]:
    """What Gemma3TextConfig has beyond the common fields and GGUF does not store."""
    plain = config["hidden_size"] // config["num_attention_heads"]
    scalar = plain if config["num_hidden_layers"] == _GEMMA3_27B_LAYERS else config["head_dim"]
    return {
        "query_pre_attn_scalar": scalar,
        "sliding_window_pattern": _GEMMA3_SLIDING_WINDOW_PATTERN,
        "rope_local_base_freq": fields.optional_real("rope.freq_base_swa") or _GEMMA3_LOCAL_ROPE_THETA,
        "hidden_activation": config["hidden_act"],
        "attn_logit_softcapping": fields.optional_real("attn_logit_softcapping"),
        "final_logit_softcapping": fields.optional_real("final_logit_softcapping"),
    }


_EXTRA = {"gemma3": _gemma3}


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """A config.json dictionary made from the metadata of `file`.

    Raises WeightFormatError when a key is absent or out of range, UnsupportedModelError for what Pellucid lacks.
    """
    names = architecture_names(file)
    fields = _Fields(file)
    if fields.get("expert_count"):
        raise UnsupportedModelError(f"{file.path.name}: {fields.get('expert_count')} experts; GGUF must be dense")
    heads = fields.size("attention.head_count", 65_536)
    hidden_size = fields.size("embedding_length", 2**24)
    head_dim = fields.optional_size("attention.key_length", 65_536) or hidden_size // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if (fields.optional_size(key) or head_dim) != head_dim:
            raise UnsupportedModelError(f"{file.path.name}: {key} is {fields.get(key)}; it must equal {head_dim}")
    config: dict[str, Any] = {
        "architectures": [names.hf_architecture],
        "model_type": names.hf_model_type,
        "vocab_size": _vocab_size(fields),
        "hidden_size": hidden_size,
        "intermediate_size": fields.size("feed_forward_length", 2**24),
        "num_hidden_layers": fields.size("block_count", _MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.optional_size("attention.head_count_kv", 65_536) or heads,
        "head_dim": head_dim,
        "hidden_act": names.hidden_act,
        "max_position_embeddings": fields.size("context_length"),
        "rms_norm_eps": fields.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.optional_real("rope.freq_base") or 10_000.0,
        "rope_scaling": _rope_scaling(fields, head_dim),
        "sliding_window": fields.optional_size("attention.sliding_window"),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": fields.token("bos_token_id"),
        "eos_token_id": fields.token("eos_token_id"),
        "pad_token_id": fields.token("padding_token_id"),
    }
    if fields.prefix in _EXTRA:
        config.update(_EXTRA[fields.prefix](fields, config))
    return config


def gguf_generation_config(file: GGUFFile) -> dict[str, Any]:
    """bos and pad ids, and as `eos_token_id` every id that ends a turn, the recorded one first."""
    fields = _Fields(file)
    ends = [fields.token(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    kinds = file.metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(kinds, list) and len(tokens) == len(kinds):
        positions = {token: index for index, token in enumerate(tokens)} if tokens else {}
        found = [positions[token] for token in _END_OF_TURN_TOKENS if token in positions]
        ends += [index for index in found if kinds[index] == _CONTROL_TOKEN]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    return {
        "bos_token_id": fields.token("bos_token_id"),
        "pad_token_id": fields.token("padding_token_id"),
        "eos_token_id": unique,
    }
