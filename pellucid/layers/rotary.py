"""Rotary position embedding: frequencies with their scalings, and the table of a step, made once for all layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pellucid import ops
from pellucid.errors import ConfigError, shown
from pellucid.float32 import FINITE, first_not_finite
from pellucid.layers.module import Module

F32 = npt.NDArray[np.float32]


def _plain(theta: float, dim: int) -> F32:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    inv_freq: F32 = (np.float32(1.0) / np.power(np.float32(theta), exponents)).astype(np.float32)
    return inv_freq


def _linear(inv_freq: F32, scaling: Mapping[str, Any], max_positions: int) -> tuple[F32, float]:
    return (inv_freq / np.float32(scaling["factor"])).astype(np.float32), 1.0


def _llama3(inv_freq: F32, scaling: Mapping[str, Any], max_positions: int) -> tuple[F32, float]:
    """Low frequencies are divided by the factor, high ones kept, those between blended (Llama 3.1 model card)."""
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = np.where(wavelength > original / low, inv_freq / factor, blended)
    return np.where(wavelength < original / high, inv_freq, scaled).astype(np.float32), 1.0


def _yarn(inv_freq: F32, scaling: Mapping[str, Any], max_positions: int) -> tuple[F32, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolate slow dimensions, keep fast ones, ramp between."""
    factor, dim = float(scaling["factor"]), 2 * inv_freq.shape[0]
    theta = float(scaling["rope_theta"])
    original = float(scaling.get("original_max_position_embeddings") or max_positions)

    def dimension(rotations: float) -> float:
        turned: float = dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        return turned

    low: float = dimension(float(scaling.get("beta_fast") or 32.0))
    high: float = dimension(float(scaling.get("beta_slow") or 1.0))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, dim - 1.0)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    attention_factor = scaling.get("attention_factor")
    magnitude = float(attention_factor) if attention_factor is not None else 0.1 * math.log(factor) + 1.0
    return (inv_freq / factor * ramp + inv_freq * (1 - ramp)).astype(np.float32), magnitude if factor > 1 else 1.0


def _factors(inv_freq: F32, scaling: Mapping[str, Any], max_positions: int) -> tuple[F32, float]:
    return (inv_freq / np.asarray(scaling["factors"], np.float32)).astype(np.float32), 1.0


_SCALINGS: dict[str, Callable[[F32, Mapping[str, Any], int], tuple[F32, float]]] = {
    "default": lambda inv_freq, scaling, max_positions: (inv_freq, 1.0),
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "factors": _factors,
}


def inverse_frequencies(
    theta: float, dim: int, scaling: Mapping[str, Any] | None, max_positions: int
) -> tuple[F32, float]:
    """[dim / 2] float32 frequencies and the factor on cosines and sines, by `rope_scaling` of a Hugging Face config.

    Raises:
        ConfigError: the scaling kind is unknown, or a field that it needs is missing or cannot be used, or what comes out is not finite.
    """
    scaling = {"rope_theta": theta, **(scaling or {})}
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if kind not in _SCALINGS:
        raise ConfigError(f"rope_scaling type is {kind!r}; supported: {', '.join(_SCALINGS)}")
    try:
        with np.errstate(all="ignore"):
            frequencies, scale = _SCALINGS[kind](_plain(theta, dim), scaling, max_positions)
    except KeyError as error:
        raise ConfigError(f"rope_scaling of type {kind!r} lacks {error.args[0]!r}") from None
    except (TypeError, ValueError, ArithmeticError) as error:  # such as the logarithm of a rope_theta of 1
        raise ConfigError(f"rope_scaling is {shown(scaling)}; it has a value that cannot be used: {error}") from None
    is_finite = first_not_finite(frequencies) is None and FINITE.holds(scale)
    if frequencies.shape != (dim // 2,) or not is_finite:
        raise ConfigError(
            f"rope_scaling is {shown(scaling)}; its {dim // 2} frequencies and their factor must be {FINITE.text}"
        )
    return frequencies, scale


class RotaryTable(Module):
    """Positions [T] to the step's table of cosines and sines [T, E']."""

    def __init__(self, inv_freq: F32, scale: float = 1.0) -> None:
        super().__init__()
        self.inv_freq, self.scale = inv_freq, scale

    def forward(self, positions: Any) -> Any:
        """table_TE."""
        return ops.rope_table(positions, self.inv_freq, self.scale)
