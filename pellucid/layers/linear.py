"""Matrices: the embedding, a linear map, and several linear maps of one input fused into one."""

from __future__ import annotations

from typing import Any

from pellucid import ops
from pellucid.layers.module import Module, new_parameter


class Embedding(Module):
    """Token ids [T] to rows [T, D], times `scale`."""

    def __init__(self, vocab_size: int, width: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = new_parameter((vocab_size, width))
        self.scale = scale

    def forward(self, input_ids: Any) -> Any:
        """x_TD."""
        x_TD = ops.embedding(input_ids, self.weight)
        return x_TD if self.scale == 1.0 else ops.scale(x_TD, self.scale)


class Linear(Module):
    """x W^T + b, W [N, K]."""

    def __init__(self, in_width: int, out_width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = new_parameter((out_width, in_width))
        self.bias = new_parameter((out_width,)) if bias else None

    def forward(self, x_TK: Any) -> Any:
        """y_TN."""
        return ops.linear(x_TK, self.weight, self.bias)


class FusedLinear(Linear):
    """Linear maps of the same input stacked in one matrix; the forward gives their outputs apart."""

    def __init__(self, in_width: int, out_widths: list[int], *, bias: bool = False) -> None:
        super().__init__(in_width, sum(out_widths), bias=bias)
        self.out_widths = out_widths

    def forward(self, x_TK: Any) -> Any:
        """One y per width, views of one buffer."""
        return ops.linear(x_TK, self.weight, self.bias).split(self.out_widths, dim=-1)

    def named_outputs(self, output: Any) -> dict[str, tuple[Any, ...]]:
        """The parts by their number."""
        return {f".{index}": (part,) for index, part in enumerate(output)}
