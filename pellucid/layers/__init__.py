"""Layers: modules that call ops. They hold parameters, never activations; x_TD is float32 [tokens, width]."""

from pellucid.layers.attention import Attention
from pellucid.layers.linear import Embedding, FusedLinear, Linear
from pellucid.layers.mlp import GatedMLP
from pellucid.layers.module import Module, ModuleList
from pellucid.layers.norm import RMSNorm
from pellucid.layers.rotary import RotaryTable, inverse_frequencies

__all__ = [
    "Attention",
    "Embedding",
    "FusedLinear",
    "GatedMLP",
    "Linear",
    "Module",
    "ModuleList",
    "RMSNorm",
    "RotaryTable",
    "inverse_frequencies",
]
