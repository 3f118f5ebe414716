"""The narrow waist: about fifteen ops with one contract each, written down in csrc/include/pellucid.h.

Every op takes and gives float32 activations [rows, width]. Called on symbols it is recorded into a program; called on torch tensors it
runs on the backend of the current step (`pellucid.ops.dispatch`).
"""

from __future__ import annotations

import math
from typing import Any

from pellucid.ops.dispatch import call, call_one
from pellucid.ops.spec import ACTIVATIONS, OpSpec, activation_name

__all__ = [
    "act",
    "act_and_mul",
    "add",
    "attention",
    "embedding",
    "gather_rows",
    "layer_norm",
    "linear",
    "logits",
    "moe",
    "rms_norm",
    "rope_table",
    "rotary",
    "sample",
    "scale",
    "softcap",
]


def _act(name: str) -> int:
    return ACTIVATIONS[activation_name(name)]


def embedding(input_ids: Any, weight: Any) -> Any:
    """Rows `input_ids` [T] of `weight` [V, D], widened to float32."""
    return call_one(OpSpec("embedding", (input_ids,), (weight,), out_widths=(int(weight.shape[1]),)))


def linear(x: Any, weight: Any, bias: Any = None, act: str = "none") -> Any:
    """act(x W^T + bias): x [T, K], weight [N, K], bias [N]. x is rounded to the weight's dtype; sums run over K ascending in float32."""
    return call_one(OpSpec("linear", (x,), (weight, bias), (_act(act),), out_widths=(int(weight.shape[0]),)))


def rms_norm(
    x: Any, weight: Any, eps: float, *, residual: Any = None, weight_offset: float = 0.0, groups: int = 1
) -> Any:
    """x / rms(x) * (weight + weight_offset), or with a residual: the norm of s = x + residual, and s itself.

    With `groups` the row is that many equal parts, each normalised alone (q/k norms). Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    width = int(x.shape[1])
    outs = (width,) if residual is None else (width, width)
    spec = OpSpec("rms_norm", (x, residual), (weight,), (groups,), (eps, weight_offset), outs)
    return call_one(spec) if residual is None else call(spec)


def layer_norm(x: Any, weight: Any, bias: Any, eps: float, *, residual: Any = None) -> Any:
    """(x - mean) / sqrt(var + eps) * weight + bias, with an optional residual as in `rms_norm`."""
    width = int(x.shape[1])
    outs = (width,) if residual is None else (width, width)
    spec = OpSpec("layer_norm", (x, residual), (weight, bias), (), (eps,), outs)
    return call_one(spec) if residual is None else call(spec)


def rope_table(positions: Any, inv_freq: Any, scale: float = 1.0) -> Any:
    """[T, E']: cosines, then sines, of position * inv_freq [E'/2], times `scale`. Su et al. 2021, arXiv:2104.09864."""
    return call_one(OpSpec("rope_table", (positions,), (inv_freq,), (), (scale,), (2 * int(inv_freq.shape[0]),)))


def rotary(x: Any, table: Any, head_dim: int, *, interleaved: bool = False) -> Any:
    """Rotates the first E' columns of every head of x [T, n * E] by the table [T, E']: halves, or neighbours if interleaved."""
    return call_one(OpSpec("rotary", (x, table), (), (head_dim, int(interleaved)), (), (int(x.shape[1]),)))


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
) -> Any:
    """Writes k, v [T, G * E] to the cache of `layer`, then attends q [T, H * E] causally to all positions so far, as stored.

    A query at p sees p - window + 1 .. p when window > 0. Tiles of 64 positions ascend with one online softmax (Milakov & Gimelshein
    2018, arXiv:1805.02867), so a row's bits depend on nothing but its own sequence.
    """
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    ints = (layer, num_heads, num_kv_heads, head_dim, window)
    return call_one(OpSpec("attention", (q, k, v), (), ints, (scale, softcap), (num_heads * head_dim,)))


def act_and_mul(x: Any, act: str) -> Any:
    """act(x[:, :F]) * x[:, F:] for x [T, 2F] (Shazeer 2020, arXiv:2002.05202)."""
    return call_one(OpSpec("act_and_mul", (x,), (), (_act(act),), (), (int(x.shape[1]) // 2,)))


def act(x: Any, act: str) -> Any:
    """act(x), element by element."""
    return call_one(OpSpec("act", (x,), (), (_act(act),), (), (int(x.shape[1]),)))


def add(a: Any, b: Any) -> Any:
    """a + b."""
    return call_one(OpSpec("add", (a, b), out_widths=(int(a.shape[1]),)))


def scale(x: Any, factor: float) -> Any:
    """x * factor."""
    return call_one(OpSpec("scale", (x,), (), (), (factor,), (int(x.shape[1]),)))


def softcap(x: Any, cap: float) -> Any:
    """cap * tanh(x / cap)."""
    return call_one(OpSpec("softcap", (x,), (), (), (cap,), (int(x.shape[1]),)))


def moe(x: Any, router_logits: Any, gate_up: Any, down: Any, *, top_k: int, act: str, renormalize: bool) -> Any:
    """The weighted sum of the top experts' gated FFNs: gate_up [X * 2F, D], down [X * D, F]; chosen by softmax(router_logits [T, X])."""
    num_experts = int(router_logits.shape[1])
    ints = (num_experts, top_k, _act(act), int(renormalize))
    return call_one(OpSpec("moe", (x, router_logits), (gate_up, down), ints, (), (int(x.shape[1]),)))


def gather_rows(x: Any) -> Any:
    """The rows of x [T, D] that need logits: [L, D], by the step's `logit_rows`."""
    return call_one(OpSpec("gather_rows", (x,), out_widths=(int(x.shape[1]),)))


def logits(x: Any, weight: Any, bias: Any = None) -> Any:
    """The language-model head: `linear` over the vocabulary."""
    return linear(x, weight, bias)


def sample(logits_LV: Any) -> Any:
    """[L, 4]: the lowest index of the maximum (its int32 bits), the maximum, log(sum(exp(x - max))), and 0."""
    return call_one(OpSpec("sample", (logits_LV,), out_widths=(4,)))
