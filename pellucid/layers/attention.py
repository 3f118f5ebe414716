"""Attention over the paged cache."""

from __future__ import annotations

from typing import Any

from pellucid import ops
from pellucid.layers.module import Module


class Attention(Module):
    """Rotates q and k by the step's table, caches k and v, attends. Holds no parameters."""

    def __init__(
        self,
        layer: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        scale: float | None = None,
        window: int = 0,
        softcap: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer, self.num_heads, self.num_kv_heads, self.head_dim = layer, num_heads, num_kv_heads, head_dim
        self.scale, self.window, self.softcap = scale, window, softcap

    def forward(self, q_THE: Any, k_TGE: Any, v_TGE: Any, table: Any) -> Any:
        """[T, H * E]; heads lie side by side in a row."""
        return ops.attention(
            ops.rotary(q_THE, table, self.head_dim),
            ops.rotary(k_TGE, table, self.head_dim),
            v_TGE,
            layer=self.layer,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
        )
