"""Qwen3: Llama with a norm on each head of q and k (Yang et al. 2025, arXiv:2505.09388)."""

from __future__ import annotations

from pellucid.models.config import ModelConfig
from pellucid.models.llama import LlamaAttention, LlamaForCausalLM


class Qwen3Attention(LlamaAttention):
    """q and k are normalised before they are rotated."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, qk_norm=True)


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Qwen3, dense."""

    attention_class = Qwen3Attention
