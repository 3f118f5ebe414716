"""The oracle: every op in plain torch, written to be read, not to be fast. Shapes as in `pellucid.ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pellucid.ops.dispatch import Step
from pellucid.ops.spec import ACTIVATION_NAMES, OpSpec

Tensors = tuple[torch.Tensor, ...]
TILE, SPAN = 64, 1024  # positions of the attention kernel's walk, see docs/kernels.md
_ACT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class ReferenceKV:
    """The cache as two tensors a layer, [cells, G, E], in the cache's dtype. With torch.int8 each position and head has a scale."""

    def __init__(
        self, n_layers: int, n_kv_heads: int, head_dim: int, n_cells: int, block_size: int, dtype: torch.dtype
    ):
        self.k = torch.zeros(n_layers, n_cells, n_kv_heads, head_dim, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.k_scale = torch.ones(n_layers, n_cells, n_kv_heads)
        self.v_scale = torch.ones_like(self.k_scale)
        self.block_size, self.dtype = block_size, dtype

    @property
    def product_dtype(self) -> torch.dtype:
        """What queries and weights are rounded to before they meet keys and values."""
        return torch.float32 if self.dtype == torch.float32 else torch.bfloat16

    def write(self, layer: int, cells: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores k and v [T, G, E], rounded."""
        for x, store, scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            if self.dtype == torch.int8:
                scale = x.abs().amax(-1) / 127
                inverse = torch.where(scale > 0, 1 / scale, 0.0)
                scales[layer][cells] = scale
                x = (x * inverse[..., None]).round()
            store[layer][cells] = x.to(self.dtype)


def _act(code: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return _ACT[ACTIVATION_NAMES[code]]


def _tensor(weight: Any) -> torch.Tensor:
    tensor: torch.Tensor = torch.from_numpy(np.ascontiguousarray(weight)) if isinstance(weight, np.ndarray) else weight
    return tensor.detach()


def _float(weight: Any) -> torch.Tensor:
    return _tensor(weight).float()


def _embedding(spec: OpSpec, step: Step) -> Tensors:
    return (spec.weights[0].detach()[spec.inputs[0].long()].float(),)


def _linear(spec: OpSpec, step: Step) -> Tensors:
    weight, bias = _tensor(spec.weights[0]), spec.weights[1]
    x = spec.inputs[0].to(weight.dtype).float()
    out = x @ weight.float().T
    return (_act(spec.ints[0])(out if bias is None else out + _float(bias)),)


def _with_residual(spec: OpSpec) -> torch.Tensor:
    x, residual = spec.inputs
    return x if residual is None else x + residual


def _rms_norm(spec: OpSpec, step: Step) -> Tensors:
    s, (groups,), (eps, offset) = _with_residual(spec), spec.ints, spec.floats
    parts = s.reshape(s.shape[0], groups, -1)
    y = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + eps) * (_float(spec.weights[0]) + offset)
    return (y.reshape(s.shape),) if spec.inputs[1] is None else (y.reshape(s.shape), s)


def _layer_norm(spec: OpSpec, step: Step) -> Tensors:
    s, (weight, bias) = _with_residual(spec), spec.weights
    y = F.layer_norm(s, s.shape[1:], _float(weight), None if bias is None else _float(bias), spec.floats[0])
    return (y,) if spec.inputs[1] is None else (y, s)


def _rope_table(spec: OpSpec, step: Step) -> Tensors:
    angles = spec.inputs[0].float()[:, None] * _float(spec.weights[0])[None, :]
    return (torch.cat([angles.cos(), angles.sin()], dim=1) * spec.floats[0],)


def _rotary(spec: OpSpec, step: Step) -> Tensors:
    x, table = spec.inputs
    head_dim, interleaved = spec.ints
    heads, half = x.reshape(x.shape[0], -1, head_dim), table.shape[1] // 2
    cos, sin = table[:, None, :half], table[:, None, half:]
    turned, rest = heads[..., : 2 * half], heads[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return (torch.cat([turned, rest], dim=-1).reshape(x.shape),)


def _tile_maxima(scores: torch.Tensor) -> torch.Tensor:
    """The greatest score [..., P] up to the end of each position's tile of 64, within its span of 1,024 positions."""
    padded = F.pad(scores, (0, -scores.shape[-1] % SPAN), value=float("-inf"))
    tiles = padded.unflatten(-1, (-1, SPAN // TILE, TILE)).amax(-1).cummax(-1).values
    return tiles.flatten(-2).repeat_interleave(TILE, -1)[..., : scores.shape[-1]]


def _weighted_values(
    scores: torch.Tensor, values: torch.Tensor, value_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """softmax(scores [H, Q, P]) values [P, H, E]: weights are rounded to `dtype` as the walk over tiles comes to them,
    relative to the maximum so far; their sum is of unrounded ones."""
    maxima = _tile_maxima(scores)
    weights = torch.where(torch.isneginf(scores), 0.0, (scores - maxima).exp())
    rescale = torch.where(torch.isneginf(maxima), 0.0, (maxima - scores.amax(-1, keepdim=True)).exp())
    rounded = (weights * value_scale).to(dtype).float() * rescale
    return torch.einsum("hqp,phe->qhe", rounded, values) / (weights * rescale).sum(-1).T[..., None]


def _attention(spec: OpSpec, step: Step) -> Tensors:
    layer, num_heads, num_kv_heads, head_dim, window = spec.ints
    scale, softcap = spec.floats
    batch, kv = step.batch, step.kv
    if batch is None:
        raise RuntimeError("attention needs a batch")
    q, k, v = (x.reshape(x.shape[0], -1, head_dim) for x in spec.inputs)
    kv.write(layer, torch.from_numpy(batch.slot_mapping_T), k, v)
    out = torch.empty_like(q)
    for r in range(batch.num_seqs):
        begin, end, length = int(batch.query_start[r]), int(batch.query_start[r + 1]), int(batch.seq_lens[r])
        positions = torch.arange(length)
        table = torch.from_numpy(batch.block_tables[r]).long()
        cells = table[positions // kv.block_size] * kv.block_size + positions % kv.block_size
        keys, values, key_scale, value_scale = (
            cache[layer][cells].float().repeat_interleave(num_heads // num_kv_heads, 1)
            for cache in (kv.k, kv.v, kv.k_scale, kv.v_scale)
        )
        queries = q[begin:end].to(kv.product_dtype).float()
        scores = torch.einsum("qhe,phe->hqp", queries, keys) * scale * key_scale.T[:, None]
        scores = softcap * torch.tanh(scores / softcap) if softcap > 0 else scores
        p, s = positions[None, :], torch.arange(length - (end - begin), length)[:, None]
        visible = (p <= s) & (p > s - window) if window > 0 else p <= s
        scores = scores.masked_fill(~visible, float("-inf"))
        out[begin:end] = _weighted_values(scores, values, value_scale.T[:, None], kv.product_dtype)
    return (out.reshape(out.shape[0], -1),)


def _act_and_mul(spec: OpSpec, step: Step) -> Tensors:
    gate, up = spec.inputs[0].chunk(2, dim=1)
    return (_act(spec.ints[0])(gate) * up,)


def _moe(spec: OpSpec, step: Step) -> Tensors:
    (x, router), (gate_up, down) = spec.inputs, spec.weights
    num_experts, top_k, act, renormalize = spec.ints
    weights, experts = router.softmax(-1).sort(dim=-1, descending=True, stable=True)
    weights, experts = weights[:, :top_k], experts[:, :top_k]
    weights = weights / weights.sum(-1, keepdim=True) if renormalize else weights
    w13 = gate_up.detach().reshape(num_experts, -1, gate_up.shape[1])
    w2 = down.detach().reshape(num_experts, -1, down.shape[1])
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for weight, e in zip(weights[t], experts[t].tolist(), strict=True):
            gate, up = (w13[e].float() @ x[t].to(w13.dtype).float()).chunk(2)
            out[t] += weight * (w2[e].float() @ (_act(act)(gate) * up).to(w2.dtype).float())
    return (out,)


def _gather_rows(spec: OpSpec, step: Step) -> Tensors:
    if step.batch is None:
        raise RuntimeError("gather_rows needs a batch")
    return (spec.inputs[0][torch.from_numpy(step.batch.logit_rows).long()],)


def _sample(spec: OpSpec, step: Step) -> Tensors:
    x = spec.inputs[0]
    top = x.max(-1, keepdim=True).values
    index = x.argmax(-1, keepdim=True).int().view(torch.float32)
    log_sum_exp = (x - top).double().exp().sum(-1, keepdim=True).log().float()
    return (torch.cat([index, top, log_sum_exp, torch.zeros_like(top)], dim=1),)


_REFERENCE: dict[str, Callable[[OpSpec, Step], Tensors]] = {
    "embedding": _embedding,
    "linear": _linear,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "rope_table": _rope_table,
    "rotary": _rotary,
    "attention": _attention,
    "act_and_mul": _act_and_mul,
    "act": lambda spec, step: (_act(spec.ints[0])(spec.inputs[0]),),
    "add": lambda spec, step: (spec.inputs[0] + spec.inputs[1],),
    "scale": lambda spec, step: (spec.inputs[0] * spec.floats[0],),
    "softcap": lambda spec, step: (spec.floats[0] * torch.tanh(spec.inputs[0] / spec.floats[0]),),
    "moe": _moe,
    "gather_rows": _gather_rows,
    "sample": _sample,
}


def run(spec: OpSpec, step: Step) -> Tensors:
    """Runs one op on torch tensors."""
    return _REFERENCE[spec.kind](spec, step)
