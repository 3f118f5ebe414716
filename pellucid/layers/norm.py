"""RMSNorm, with the residual addition that comes before it."""

from __future__ import annotations

from typing import Any

from pellucid import ops
from pellucid.layers.module import Module, new_parameter


class RMSNorm(Module):
    """x / rms(x) * (weight + offset); `groups` parts of a row are normalised alone. Gemma stores weight - 1: offset 1."""

    def __init__(self, width: int, eps: float, *, offset: float = 0.0, groups: int = 1) -> None:
        super().__init__()
        self.weight = new_parameter((width,))
        self.eps, self.offset, self.groups = eps, offset, groups

    def forward(self, x_TD: Any, residual_TD: Any = None) -> Any:
        """The norm; with a residual, the norm of the sum and the sum."""
        return ops.rms_norm(
            x_TD, self.weight, self.eps, residual=residual_TD, weight_offset=self.offset, groups=self.groups
        )
