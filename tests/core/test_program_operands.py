"""What a recorded op reads is what it was given: each argument of each op, in every order, in a program and eagerly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from utils.random_programs import BLOCK, batches

from pellucid import ops
from pellucid.contract.batch import BatchInput
from pellucid.core import abi
from pellucid.errors import NativeError
from pellucid.ops.dispatch import Step, step_scope
from pellucid.ops.native import NativeBackend
from pellucid.program.builder import encode_buffers, encode_ops
from pellucid.program.tracer import RecordedWeight, trace

VOCAB, WIDTH, HEADS, HEAD_DIM, LENGTH = 96, 64, 4, 16, 40
FREQUENCIES = (10000.0 ** -(np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))).astype(np.float32)
Inputs = tuple[Any, Any, Any]


class Model:
    """Three rows of one width from the ids and from the positions, an op or several on them, a head."""

    def __init__(self, mix: Callable[[Model, Any, Any, Inputs], Any]) -> None:
        generator = torch.Generator().manual_seed(3)
        sizes = {"ids": VOCAB, "positions": VOCAB, "head": VOCAB, "gate_up": 4 * 128, "down": 4 * 64, "router": 4}
        sizes |= {"a": WIDTH, "b": WIDTH, "c": WIDTH, "wide": 2 * WIDTH}
        self.weights = {
            name: torch.randn(rows, WIDTH, generator=generator) / WIDTH**0.5 for name, rows in sizes.items()
        }
        self.norm, self.mix = 1 + 0.1 * torch.randn(WIDTH, generator=generator), mix

    def __getattr__(self, name: str) -> torch.Tensor:
        if name not in self.weights:
            raise AttributeError(name)
        return self.weights[name]

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.weights.items()
        yield "norm", self.norm

    def forward(self, ids: Any, positions: Any) -> Any:
        x = ops.add(ops.embedding(ids, self.ids), ops.embedding(positions, self.positions))
        a, b, c = (ops.linear(x, weight) for weight in (self.a, self.b, self.c))
        return self.mix(self, ids, positions, (a, b, c))

    def compute_logits(self, hidden: Any) -> Any:
        return ops.linear(hidden, self.head)


def _weight(context: abi.Context, weight: RecordedWeight) -> abi.Weight:
    values = np.ascontiguousarray(np.asarray(weight.source), np.float32)
    if weight.kind == "vector":
        return abi.Weight(_bytes(values), 1, values.size, abi.F32, abi.ROW_MAJOR)
    rows, cols = values.shape
    if weight.kind == "table":
        return abi.Weight(_bytes(values), rows, cols, abi.F32, abi.ROW_MAJOR)
    data = abi.aligned_bytes(abi.packed_bytes(rows, cols, abi.F32))
    abi.pack(context, values.reshape(-1).view(np.uint8), abi.F32, rows, cols, 0, rows, data, abi.F32)
    return abi.Weight(data, rows, cols, abi.F32, abi.PANELS)


def _bytes(values: Any) -> Any:
    data = abi.aligned_bytes(values.nbytes)
    data[:] = values.reshape(-1).view(np.uint8)
    return data


def _cache(n_blocks: int) -> abi.KVCache:
    return abi.KVCache(
        n_layers=1, n_kv_heads=HEADS, head_dim=HEAD_DIM, block_size=BLOCK, n_blocks=n_blocks, dtype=abi.F32
    )


def program_of(model: Model, context: abi.Context, step: BatchInput) -> abi.Program:
    recording = trace(model)
    return abi.Program(
        context,
        encode_ops(recording),
        encode_buffers(recording),
        [_weight(context, weight) for weight in recording.weights],
        n_forward_ops=recording.n_forward_ops,
        hidden=recording.hidden,
        logits=recording.logits,
        vocab_size=VOCAB,
        max_tokens=step.num_tokens,
        max_logit_rows=len(step.logit_rows),
    )


def step_of(length: int = LENGTH) -> tuple[BatchInput, int]:
    """Two prompts; no token's id is its position."""
    (step,), n_blocks = batches([[(0, length), (0, 7)]])
    step.input_ids_T[:] = (step.positions_T * 5 + 11) % VOCAB
    return step, n_blocks


def check(mix: Callable[[Model, Any, Any, Inputs], Any]) -> torch.Tensor:
    """Hidden states, the same in a program and eagerly."""
    context, model, (step, n_blocks) = abi.Context(1), Model(mix), step_of()
    program = program_of(model, context, step)
    program.run(_cache(n_blocks), step)
    hidden = torch.from_numpy(program.hidden().copy())
    logits = torch.from_numpy(program.logits(len(step.logit_rows)).copy())
    with step_scope(Step(NativeBackend(context), step, _cache(n_blocks))):
        eager = model.forward(torch.from_numpy(step.input_ids_T), torch.from_numpy(step.positions_T))
        eager_logits = model.compute_logits(ops.gather_rows(eager))
    assert torch.equal(hidden, eager)
    assert torch.equal(logits, eager_logits)
    program.close()
    return hidden


def _rotated(model: Model, ids: Any, x: Any) -> Any:
    return ops.rotary(x, ops.rope_table(ids, FREQUENCIES), HEAD_DIM)


def _attention(model: Model, q: Any, k: Any, v: Any) -> Any:
    return ops.attention(q, k, v, layer=0, num_heads=HEADS, num_kv_heads=HEADS, head_dim=HEAD_DIM)


# What each op makes of inputs of one shape.
OPS: dict[str, Callable[..., Any]] = {
    "add": lambda m, a, b, c: ops.add(a, b),
    "three adds": lambda m, a, b, c: ops.add(ops.add(a, b), ops.add(b, c)),
    "rms_norm": lambda m, a, b, c: ops.rms_norm(a, m.norm, 1e-5),
    "rms_norm, the norm": lambda m, a, b, c: ops.rms_norm(a, m.norm, 1e-5, residual=b)[0],
    "rms_norm, the sum": lambda m, a, b, c: ops.add(*ops.rms_norm(a, m.norm, 1e-5, residual=b)),
    "layer_norm": lambda m, a, b, c: ops.layer_norm(a, m.norm, None, 1e-5, residual=b)[0],
    "attention": _attention,
    "act_and_mul": lambda m, a, b, c: ops.linear(
        ops.act_and_mul(ops.linear(ops.add(a, ops.act(b, "silu")), m.wide), "silu"), m.a
    ),
    "act": lambda m, a, b, c: ops.act(a, "gelu"),
    "scale": lambda m, a, b, c: ops.scale(a, 0.5),
    "softcap": lambda m, a, b, c: ops.softcap(a, 2.0),
    "linear": lambda m, a, b, c: ops.linear(a, m.b),
    "moe": lambda m, a, b, c: ops.moe(
        a, ops.linear(b, m.router), m.gate_up, m.down, top_k=2, act="silu", renormalize=True
    ),
}
# How many results the six orders of three inputs have, where not three: of these ops no two inputs can be exchanged.
DISTINCT = {"attention": 6, "act_and_mul": 6, "moe": 6}


@pytest.mark.parametrize("op", OPS)
def test_inputs_of_an_op_when_permuted_then_a_program_reads_what_the_module_gave(op: str) -> None:
    found = [
        check(lambda m, ids, positions, abc, order=order: OPS[op](m, *(abc[i] for i in order)))
        for order in permutations(range(3))
    ]
    assert len({tuple(tensor.flatten().tolist()) for tensor in found}) == DISTINCT.get(op, 3)


IDS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "ids, positions": lambda ids, positions: (ids, positions),
    "positions, ids": lambda ids, positions: (positions, ids),
    "ids, ids": lambda ids, positions: (ids, ids),
    "positions, positions": lambda ids, positions: (positions, positions),
}


@pytest.mark.parametrize("given", IDS)
def test_token_ids_and_positions_when_exchanged_then_a_program_reads_what_the_module_gave(given: str) -> None:
    def mix(model: Model, ids: Any, positions: Any, abc: Inputs) -> Any:
        looked_up, turned_by = IDS[given](ids, positions)
        x = ops.add(abc[0], ops.embedding(looked_up, model.positions))
        turned = _rotated(model, turned_by, x)
        return ops.add(_attention(model, turned, _rotated(model, turned_by, abc[1]), abc[2]), turned)

    others = [check(mix)]
    for other in set(IDS) - {given}:
        given = other
        others.append(check(mix))
    assert len({tuple(tensor.flatten().tolist()) for tensor in others}) == len(IDS)


def test_ids_where_rows_are_taken_and_rows_where_ids_are_when_traced_then_type_error() -> None:
    wrong: list[Callable[[Model, Any, Any, Inputs], Any]] = [
        lambda m, ids, positions, abc: ops.add(abc[0], ids),
        lambda m, ids, positions, abc: ops.act(positions, "silu"),
        lambda m, ids, positions, abc: ops.embedding(abc[0], m.ids),
        lambda m, ids, positions, abc: ops.rope_table(abc[0], FREQUENCIES),
    ]
    for mix in wrong:
        with pytest.raises(TypeError, match=r"op \w+ takes .* of the batch; it was given something else"):
            trace(Model(mix))


@pytest.mark.parametrize("length", [VOCAB - 1, VOCAB, VOCAB + 1])
def test_positions_about_the_end_of_their_table_when_run_then_refused_by_token_beyond_it(length: int) -> None:
    context, (step, n_blocks) = abi.Context(1), step_of(length)
    program = program_of(Model(lambda m, ids, positions, abc: abc[0]), context, step)
    if length <= VOCAB:
        program.run(_cache(n_blocks), step)
        assert np.isfinite(program.hidden()).all()
        return
    with pytest.raises(NativeError, match=rf"positions\[{VOCAB}\] is {VOCAB}; it must be in \[0, {VOCAB}\)") as refused:
        program.run(_cache(n_blocks), step)
    assert (refused.value.item, refused.value.index) == ("token", VOCAB)
