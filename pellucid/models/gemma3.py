"""Gemma 3, the text model (Gemma Team 2025, arXiv:2503.19786).

Differs from Llama by norms around both halves of a block, q/k norms, scaled embeddings, a GELU gate, and layers that alternate between
a sliding window with its own rotary base and full attention. Norm weights are stored as offsets from 1.
T tokens, D model width, H heads, G kv heads, E head width.
"""

from __future__ import annotations

import math
from typing import Any

from pellucid import ops
from pellucid.layers import (
    Attention,
    Embedding,
    FusedLinear,
    GatedMLP,
    Linear,
    Module,
    ModuleList,
    RMSNorm,
    RotaryTable,
    inverse_frequencies,
)
from pellucid.models.config import ModelConfig
from pellucid.models.llama import LlamaForCausalLM


class Gemma3Attention(Module):
    """Grouped-query attention with q/k norms; the scale comes from the config, not from the head width."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        self.qkv_proj = FusedLinear(config.hidden_size, widths, bias=config.attention_bias)
        self.o_proj = Linear(widths[0], config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps, offset=1.0, groups=heads)
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps, offset=1.0, groups=kv_heads)
        self.attn = Attention(
            layer,
            heads,
            kv_heads,
            head_dim,
            scale=1.0 / math.sqrt(config.query_pre_attn_scalar or head_dim),
            window=config.layer_window(layer) or 0,
            softcap=config.attn_logit_softcapping or 0.0,
        )

    def forward(self, x_TD: Any, table: Any) -> Any:
        """y_TD."""
        q, k, v = self.qkv_proj(x_TD)
        return self.o_proj(self.attn(self.q_norm(q), self.k_norm(k), v, table))


class Gemma3Block(Module):
    """One layer: each half is normalised before and behind."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(width, eps, offset=1.0)
        self.self_attn = Gemma3Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(width, eps, offset=1.0)
        self.pre_feedforward_layernorm = RMSNorm(width, eps, offset=1.0)
        self.mlp = GatedMLP(width, config.intermediate_size, config.hidden_act, bias=config.mlp_bias)
        self.post_feedforward_layernorm = RMSNorm(width, eps, offset=1.0)

    def forward(self, x_TD: Any, residual_TD: Any, table: Any) -> tuple[Any, Any]:
        """Gives (x, residual), whose sum is the residual stream."""
        if residual_TD is None:
            residual_TD, x_TD = x_TD, self.input_layernorm(x_TD)
        else:
            x_TD, residual_TD = self.input_layernorm(x_TD, residual_TD)
        x_TD = self.post_attention_layernorm(self.self_attn(x_TD, table))
        x_TD, residual_TD = self.pre_feedforward_layernorm(x_TD, residual_TD)
        return self.post_feedforward_layernorm(self.mlp(x_TD)), residual_TD

    def named_outputs(self, output: Any) -> dict[str, tuple[Any, ...]]:
        """The residual stream behind the layer."""
        return {"": output}


class Gemma3Model(Module):
    """Scaled embedding, layers, final norm. Two rotary tables: one for windowed layers, one for the others."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        scale = math.sqrt(config.hidden_size)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, scale=scale)
        positions = config.max_position_embeddings
        scaled = inverse_frequencies(config.rope_theta, config.head_dim, config.rope_scaling, positions)
        local_theta = config.rope_local_base_freq or config.rope_theta
        self.rotary = RotaryTable(*scaled)
        self.rotary_local = RotaryTable(*inverse_frequencies(local_theta, config.head_dim, None, positions))
        self.layers = ModuleList([Gemma3Block(config, i) for i in range(config.num_hidden_layers)])
        self.is_sliding = [config.layer_window(i) is not None for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, offset=1.0)

    def forward(self, input_ids: Any, positions: Any) -> Any:
        """hidden_TD."""
        x, residual = self.embed_tokens(input_ids), None
        table, local = self.rotary(positions), self.rotary_local(positions)
        for layer, is_sliding in zip(self.layers, self.is_sliding, strict=True):
            x, residual = layer(x, residual, local if is_sliding else table)
        return self.norm(x, residual)[0]


class Gemma3ForCausalLM(LlamaForCausalLM):
    """Gemma 3 without its vision tower."""

    def make_model(self, config: ModelConfig) -> Any:
        """Gemma's own blocks."""
        return Gemma3Model(config)

    def compute_logits(self, hidden_LD: Any) -> Any:
        """logits_LV, capped where the config says so."""
        logits = super().compute_logits(hidden_LD)
        cap = self.config.final_logit_softcapping
        return ops.softcap(logits, cap) if cap else logits
