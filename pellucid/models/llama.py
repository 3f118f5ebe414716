"""Llama and the families that differ from it by a bias or a norm (Touvron et al. 2023, arXiv:2302.13971).

T tokens, D model width, H heads, G kv heads, E head width, F ffn width. Activations are float32 [T, width]; heads lie side by side.
"""

from __future__ import annotations

from typing import Any

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
from pellucid.models.base import CausalLM
from pellucid.models.config import ModelConfig


class LlamaAttention(Module):
    """Grouped-query attention; q, k and v are one matrix. `qk_norm` normalises each head of q and k before the rotation."""

    def __init__(self, config: ModelConfig, layer: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        self.qkv_proj = FusedLinear(config.hidden_size, widths, bias=config.attention_bias)
        self.o_proj = Linear(widths[0], config.hidden_size, bias=self.output_bias(config))
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps, groups=heads) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps, groups=kv_heads) if qk_norm else None
        self.attn = Attention(layer, heads, kv_heads, head_dim, window=config.layer_window(layer) or 0)

    def output_bias(self, config: ModelConfig) -> bool:
        """Whether the output projection has a bias too."""
        return config.attention_bias

    def forward(self, x_TD: Any, table: Any) -> Any:
        """y_TD."""
        q, k, v = self.qkv_proj(x_TD)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(self.attn(q, k, v, table))


class LlamaBlock(Module):
    """One layer: the residual stream goes through attention and MLP, each behind a norm."""

    def __init__(self, config: ModelConfig, layer: int, attention: Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act, bias=config.mlp_bias)

    def forward(self, x_TD: Any, residual_TD: Any, table: Any) -> tuple[Any, Any]:
        """The layer's last addition is left to the next norm: gives (x, residual), whose sum is the residual stream."""
        if residual_TD is None:
            residual_TD, x_TD = x_TD, self.input_layernorm(x_TD)
        else:
            x_TD, residual_TD = self.input_layernorm(x_TD, residual_TD)
        x_TD = self.self_attn(x_TD, table)
        x_TD, residual_TD = self.post_attention_layernorm(x_TD, residual_TD)
        return self.mlp(x_TD), residual_TD

    def named_outputs(self, output: Any) -> dict[str, tuple[Any, ...]]:
        """The residual stream behind the layer."""
        return {"": output}


class LlamaModel(Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: ModelConfig, make_attention: Any) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        rope = inverse_frequencies(
            config.rope_theta, config.head_dim, config.rope_scaling, config.max_position_embeddings
        )
        self.rotary = RotaryTable(*rope)
        blocks = [LlamaBlock(config, i, make_attention(config, i)) for i in range(config.num_hidden_layers)]
        self.layers = ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Any, positions: Any) -> Any:
        """hidden_TD: the exact input of the language-model head."""
        x, residual, table = self.embed_tokens(input_ids), None, self.rotary(positions)
        for layer in self.layers:
            x, residual = layer(x, residual, table)
        return self.norm(x, residual)[0]


class LlamaForCausalLM(CausalLM):
    """Llama 2 and 3, SmolLM2, Mistral (sliding window)."""

    attention_class: Any = LlamaAttention

    def __init__(self, config: ModelConfig, prefix: str = "") -> None:
        super().__init__(config, prefix)
        self.model = self.make_model(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def make_model(self, config: ModelConfig) -> Any:
        """What lies between token ids and hidden states; families with other blocks put theirs here."""
        return LlamaModel(config, self.attention_class)

    def forward(self, input_ids: Any, positions: Any) -> Any:
        """hidden_TD."""
        return self.model(input_ids, positions)

    def compute_logits(self, hidden_LD: Any) -> Any:
        """logits_LV."""
        return self.lm_head(hidden_LD)
