"""The gated feed-forward network: down(act(gate x) * up x)."""

from __future__ import annotations

from typing import Any

from pellucid import ops
from pellucid.layers.linear import Linear
from pellucid.layers.module import Module
from pellucid.ops.spec import activation_name


class GatedMLP(Module):
    """gate and up are one matrix [2F, D], gate first.

    Raises:
        UnsupportedModelError: there is no activation `act`.
    """

    def __init__(self, width: int, ffn_width: int, act: str, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = Linear(width, 2 * ffn_width, bias=bias)
        self.down_proj = Linear(ffn_width, width, bias=bias)
        self.act = activation_name(act)

    def forward(self, x_TD: Any) -> Any:
        """y_TD."""
        return self.down_proj(ops.act_and_mul(self.gate_up_proj(x_TD), self.act))
