"""GGUF tensor names -> Hugging Face parameter names, one table per architecture, and what must be undone on the way.

Names: the tensor list of the GGUF specification; the transformations: llama.cpp's conversion, which permutes the rows
of q and k for neighbouring-pair rotary in architecture `llama` and stores Gemma's norm weights with 1 added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_BASE_MODEL: dict[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BASE_BLOCK: dict[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS: dict[str, str] = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA3_BLOCK: dict[str, str] = {
    **_BASE_BLOCK,
    **_QK_NORMS,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class ArchitectureNames:
    """One GGUF architecture: its Hugging Face class and type, its names, and the transformations to undo."""

    hf_architecture: str
    hf_model_type: str
    block: Mapping[str, str]
    hidden_act: str = "silu"
    permuted_qk: bool = False
    norms_plus_one: bool = False


ARCHITECTURES: dict[str, ArchitectureNames] = {
    "llama": ArchitectureNames("LlamaForCausalLM", "llama", _BASE_BLOCK, permuted_qk=True),
    "qwen2": ArchitectureNames("Qwen2ForCausalLM", "qwen2", _BASE_BLOCK),
    "qwen3": ArchitectureNames("Qwen3ForCausalLM", "qwen3", {**_BASE_BLOCK, **_QK_NORMS}),
    "gemma3": ArchitectureNames(
        "Gemma3ForCausalLM", "gemma3_text", _GEMMA3_BLOCK, hidden_act="gelu_pytorch_tanh", norms_plus_one=True
    ),
}

# Tensors that carry no parameter; rope_freqs is read into config["rope_scaling"].
ROPE_FACTORS = "rope_freqs.weight"
NOT_PARAMETERS = frozenset({ROPE_FACTORS})


def hugging_face_name(name: str, names: ArchitectureNames) -> str | None:
    """The parameter name of a GGUF tensor, or None when the architecture has no such tensor."""
    stem, _, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
        return None
    if stem in _BASE_MODEL:
        return f"{_BASE_MODEL[stem]}.{suffix}"
    prefix, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if prefix != "blk" or not (layer.isascii() and layer.isdigit()) or part not in names.block:
        return None
    return f"model.layers.{int(layer)}.{names.block[part]}.{suffix}"
