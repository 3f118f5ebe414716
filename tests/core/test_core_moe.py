"""Mixture of experts: right against float64, and a row's bits do not depend on who shares its experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from utils.core_attention import Array, available_isas, context, round_bf16, same_bits

from pellucid.core import abi
from pellucid.ops.spec import ACTIVATIONS, OP_KINDS

isas = pytest.mark.parametrize("isa", available_isas())
dtypes = pytest.mark.parametrize("dtype", [abi.F32, abi.BF16], ids=["f32", "bf16"])


@dataclass(frozen=True)
class Layer:
    """X experts of width F on a model of width D."""

    experts: int = 5
    top_k: int = 2
    d: int = 128
    f: int = 192
    act: str = "silu"
    renormalise: bool = True
    dtype: int = abi.F32


@dataclass(frozen=True)
class Weights:
    """gate_up [X, 2F, D] and down [X, D, F], rounded to the layer's dtype; and packed."""

    gate_up: Array
    down: Array
    packed: tuple[abi.Weight, abi.Weight]


def _weights(layer: Layer, seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    shapes = (layer.experts, 2 * layer.f, layer.d), (layer.experts, layer.d, layer.f)
    values = [(rng.standard_normal(shape) / np.sqrt(shape[2])).astype(np.float32) for shape in shapes]
    if layer.dtype == abi.BF16:
        values = [round_bf16(x) for x in values]
    return Weights(values[0], values[1], (_pack(values[0], layer.dtype), _pack(values[1], layer.dtype)))


def _pack(x: Array, dtype: int) -> abi.Weight:
    rows, cols = x.shape[0] * x.shape[1], x.shape[2]
    data = abi.aligned_bytes(abi.packed_bytes(rows, cols, dtype))
    abi.pack(context(), np.ascontiguousarray(x).reshape(-1).view(np.uint8), abi.F32, rows, cols, 0, rows, data, dtype)
    return abi.Weight(data, rows, cols, dtype, abi.PANELS)


def _inputs(layer: Layer, rows: int, seed: int = 1) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x, router = rng.standard_normal((rows, layer.d)), rng.standard_normal((rows, layer.experts)) * 2
    return x.astype(np.float32), router.astype(np.float32)


def _run(isa: str, layer: Layer, weights: Weights, x: Array, router: Array, num_threads: int = 2) -> Array:
    out = np.full_like(x, np.nan)
    ints = (layer.experts, layer.top_k, ACTIVATIONS[layer.act], int(layer.renormalise))
    op = abi.op_table(OP_KINDS["moe"], [layer.d, layer.experts], [layer.d], weights.packed, ints)
    x, router = np.ascontiguousarray(x), np.ascontiguousarray(router)
    inputs = [(int(a.ctypes.data), a.shape[1]) for a in (x, router)]
    abi.run_op(context(isa, num_threads), op, len(x), inputs, [(int(out.ctypes.data), layer.d)], weights.packed)
    return out


_ACT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "none": lambda x: x,
}


def _reference(layer: Layer, weights: Weights, x: Array, router: Array) -> Array:
    probabilities = torch.from_numpy(router).double().softmax(-1).numpy()
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, : layer.top_k]
    out = np.zeros(x.shape)
    for t in range(len(x)):
        chosen = probabilities[t, order[t]]
        chosen = chosen / chosen.sum() if layer.renormalise else chosen
        row = round_bf16(x[t]) if layer.dtype == abi.BF16 else x[t]
        for weight, e in zip(chosen, order[t], strict=True):
            gate, up = np.split(weights.gate_up[e].astype(np.float64) @ row.astype(np.float64), 2)
            hidden = _ACT[layer.act](torch.from_numpy(gate)).numpy() * up
            if layer.dtype == abi.BF16:
                hidden = round_bf16(hidden.astype(np.float32)).astype(np.float64)
            out[t] += weight * (weights.down[e].astype(np.float64) @ hidden)
    return out.astype(np.float32)


@isas
@dtypes
@pytest.mark.parametrize(
    "layer",
    [
        Layer(),
        Layer(renormalise=False),
        Layer(experts=1, top_k=1),
        Layer(experts=16, top_k=16, act="gelu"),
        Layer(experts=40, top_k=8, d=64, f=64, act="gelu_tanh"),
        Layer(experts=17, top_k=1, act="relu"),
    ],
    ids=lambda layer: f"X{layer.experts}k{layer.top_k}{layer.act}",
)
def test_rows_when_routed_then_close_to_float64(isa: str, dtype: int, layer: Layer) -> None:
    layer = replace(layer, dtype=dtype)
    weights, (x, router) = _weights(layer), _inputs(layer, 37)
    # A hidden value that stands on the edge of a bfloat16 step may be rounded to either side.
    tolerance = 1e-5 if dtype == abi.F32 else 4e-3
    out = _run(isa, layer, weights, x, router)
    np.testing.assert_allclose(out, _reference(layer, weights, x, router), atol=tolerance, rtol=0)


@isas
@dtypes
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_rows_when_batched_together_then_bitwise_as_alone(isa: str, dtype: int, num_threads: int) -> None:
    layer = Layer(dtype=dtype)
    weights, (x, router) = _weights(layer), _inputs(layer, 120)
    together = _run(isa, layer, weights, x, router, num_threads)
    for row in range(0, 120, 7):
        assert same_bits(_run(isa, layer, weights, x[row : row + 1], router[row : row + 1], 1)[0], together[row])


@isas
@dtypes
def test_all_rows_when_one_expert_is_favoured_then_bitwise_as_alone(isa: str, dtype: int) -> None:
    layer = Layer(dtype=dtype, top_k=1)
    weights, (x, router) = _weights(layer), _inputs(layer, 250)
    router[:, 3] = 50.0
    together = _run(isa, layer, weights, x, router)
    for row in (0, 95, 96, 191, 249):
        assert same_bits(_run(isa, layer, weights, x[row : row + 1], router[row : row + 1])[0], together[row])


@isas
def test_router_when_tied_then_lower_experts(isa: str) -> None:
    layer = Layer(experts=20, top_k=3)
    weights, (x, router) = _weights(layer), _inputs(layer, 4)
    router[:] = 0.25
    router[1, [19, 4, 11, 7]] = 3.0
    favoured = router.copy()
    favoured[:, :3] += 8.0  # the same choice, and equal weights, without a tie at the border
    favoured[1] = router[1]
    favoured[1, [4, 7, 11]] += 8.0
    np.testing.assert_allclose(
        _run(isa, layer, weights, x, router), _run(isa, layer, weights, x, favoured), atol=1e-6, rtol=0
    )


@isas
def test_row_when_its_router_is_nan_then_neighbours_keep_their_bits(isa: str) -> None:
    layer = Layer()
    weights, (x, router) = _weights(layer), _inputs(layer, 9)
    clean = _run(isa, layer, weights, x, router)
    router[4] = np.nan
    dirty = _run(isa, layer, weights, x, router)
    keep = [t for t in range(9) if t != 4]
    assert np.all(np.isnan(dirty[4]))
    assert same_bits(dirty[keep], clean[keep])
