"""Qwen2: Llama with a bias on q, k and v alone (Yang et al. 2024, arXiv:2407.10671)."""

from __future__ import annotations

from pellucid.models.config import ModelConfig
from pellucid.models.llama import LlamaAttention, LlamaForCausalLM


class Qwen2Attention(LlamaAttention):
    """The output projection has no bias."""

    def output_bias(self, config: ModelConfig) -> bool:
        """Never."""
        return False


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2 and Qwen2.5."""

    attention_class = Qwen2Attention
