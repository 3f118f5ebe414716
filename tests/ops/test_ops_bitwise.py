"""Bits of an op never depend on neighbours, threads or column ranges: asserted with `torch.equal`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pellucid import ops
from pellucid.core import abi
from pellucid.ops.dispatch import Step, step_scope
from pellucid.ops.native import NativeBackend

ISAS = [isa for isa, code in abi.ISA_CODES.items() if isa != "auto" and code <= abi.ISA_CODES[abi.cpu_info().best_isa]]
ROWS = 203  # several row blocks, none of them whole


@pytest.fixture(scope="module", params=ISAS)
def backends(request: pytest.FixtureRequest) -> tuple[NativeBackend, NativeBackend]:
    return tuple(NativeBackend(abi.Context(num_threads=n, isa=request.param)) for n in (1, 2))  # type: ignore[return-value]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calls() -> dict[str, Callable[[torch.Tensor], Any]]:
    """Row-wise ops on x [T, 136]."""
    weights = {(n, d): random(n, 136, seed=n).to(d) for n in (61, 576) for d in (torch.float32, torch.bfloat16)}
    norm, bias = random(136, seed=1), random(61, seed=2)
    router = random(8, 136, seed=4).to(torch.float32)
    gate_up, down = random(8 * 128, 64, seed=5).to(torch.bfloat16), random(8 * 64, 64, seed=6).to(torch.bfloat16)
    made: dict[str, Callable[[torch.Tensor], Any]] = {
        f"linear {n} {d}": (lambda x, w=w: ops.linear(x, w)) for (n, d), w in weights.items()
    }
    made |= {
        "linear with bias and silu": lambda x: ops.linear(x, weights[61, torch.bfloat16], bias, "silu"),
        "rms_norm": lambda x: ops.rms_norm(x, norm, 1e-6),
        "rms_norm in groups": lambda x: ops.rms_norm(x, norm[:17], 1e-6, groups=8),
        "layer_norm": lambda x: ops.layer_norm(x, norm, norm, 1e-6),
        "act_and_mul": lambda x: ops.act_and_mul(x, "gelu_tanh"),
        "softcap": lambda x: ops.softcap(x, 3.0),
        "sample": lambda x: ops.sample(x),
        "moe": lambda x: ops.moe(
            x[:, :64], ops.linear(x, router), gate_up, down, top_k=2, act="silu", renormalize=True
        ),
    }
    return made


@pytest.mark.parametrize("name", calls())
def test_row_when_alone_or_in_any_batch_on_any_threads_then_same_bits(
    backends: tuple[NativeBackend, NativeBackend], name: str
) -> None:
    call, x = calls()[name], random(ROWS, 136, seed=9)
    one, two = backends
    with step_scope(Step(one)):
        whole = call(x)
        for start, count in ((0, 1), (202, 1), (5, 2), (17, 5), (40, 6), (41, 7), (64, 12), (3, 13), (90, 97)):
            part = call(x[start : start + count])
            assert torch.equal(part, whole[start : start + count]), f"rows {start} to {start + count} differ"
    with step_scope(Step(two)):
        assert torch.equal(call(x), whole)
        wide = torch.cat([random(ROWS, 24), x, random(ROWS, 3)], dim=1)
        assert torch.equal(call(wide[:, 24:160]), whole)
