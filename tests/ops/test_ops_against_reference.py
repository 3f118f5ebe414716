"""Every op on every instruction set against the plain torch oracle: float32 and bfloat16 weights, odd shapes, stated bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pellucid import ops
from pellucid.contract.batch import BatchInput, single_sequence_batch
from pellucid.core import abi
from pellucid.errors import UnsupportedModelError
from pellucid.ops import reference
from pellucid.ops.dispatch import Step, step_scope
from pellucid.ops.native import NativeBackend
from pellucid.ops.spec import ACTIVATION_ALIASES, ACTIVATIONS, OP_KINDS

ISAS = [isa for isa, code in abi.ISA_CODES.items() if isa != "auto" and code <= abi.ISA_CODES[abi.cpu_info().best_isa]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS = (1, 2, 7, 13, 97)
WIDTHS = (1, 5, 16, 17, 61, 64, 131)

# Greatest difference, as a share of the oracle's greatest magnitude. Sums of K terms in another order cost about sqrt(K) float32
# roundings (6e-8 each); the polynomial exp and the oracle's own functions differ by a few more.
BOUNDS = {
    "embedding": 0.0,
    "gather_rows": 0.0,
    "add": 0.0,
    "scale": 0.0,
    "linear": 2e-6,
    "rms_norm": 2e-6,
    "layer_norm": 3e-6,
    "rope_table": 1e-6,
    "rotary": 1e-6,
    "attention": 4e-6,
    "act_and_mul": 2e-6,
    "act": 2e-6,
    "softcap": 2e-6,
    "moe": 4e-6,
    "sample": 2e-6,
}
# A weight that is rounded to bfloat16 goes the other way than the oracle's where both stand at a boundary: by 2^-8 of itself, and
# seldom. A recipe that rounds elsewhere differs nearly everywhere.
FLIPPED_BOUND = 2e-3
FLIPPED_SHARE = 0.03
KV_DTYPES = {"float32": (abi.F32, torch.float32), "bfloat16": (abi.BF16, torch.bfloat16), "int8": (abi.I8, torch.int8)}


@pytest.fixture(scope="module", params=ISAS)
def native(request: pytest.FixtureRequest) -> NativeBackend:
    return NativeBackend(abi.Context(num_threads=2, isa=request.param))


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash((shape, seed)) % 2**31)
    return torch.randn(*shape, generator=generator) * scale


def both(
    native: NativeBackend, call: Callable[[], Any], batch: BatchInput | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the core and the oracle make of one call, as lists of outputs."""
    found = []
    for run in (native, reference.run):
        with step_scope(Step(run, batch)):
            result = call()
        found.append(list(result) if isinstance(result, tuple) else [result])
    return found[0], found[1]


def assert_within(kind: str, found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        scale = max(float(other.abs().max()), 1e-30)
        worst = float((one - other).abs().max()) / scale
        assert worst <= BOUNDS[kind], f"{kind}: {worst:.2e} of the greatest magnitude; the bound is {BOUNDS[kind]:.0e}"


def test_bounds_when_listed_then_every_op_has_one() -> None:
    assert set(BOUNDS) == set(OP_KINDS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_linear_when_shapes_are_odd_then_within_bound(native: NativeBackend, dtype: str, act: str) -> None:
    for rows in ROWS:
        for k, n in ((1, 1), (16, 64), (17, 61), (61, 131), (131, 17), (576, 192)):
            x, weight, bias = random(rows, k), random(n, k, scale=k**-0.5).to(DTYPES[dtype]), random(n)
            for b in (None, bias):
                found, expected = both(native, lambda x=x, w=weight, b=b: ops.linear(x, w, b, act))
                assert_within("linear", found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [100, 8_193, 151_936])
def test_head_and_embedding_when_the_vocabulary_is_odd_then_within_bound(
    native: NativeBackend, dtype: str, vocab_size: int
) -> None:
    weight = random(vocab_size, 33, scale=0.2).to(DTYPES[dtype])
    x = random(3, 33)
    assert_within("linear", *both(native, lambda: ops.logits(x, weight)))
    ids = torch.tensor([0, vocab_size - 1, vocab_size // 2, 63, 64], dtype=torch.int32)
    assert_within("embedding", *both(native, lambda: ops.embedding(ids, weight)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_when_gathered_from_packed_panels_then_the_rows_exactly(native: NativeBackend, dtype: str) -> None:
    weight = random(131, 37).to(DTYPES[dtype])
    packed = native._panels(weight)
    ids = torch.tensor([0, 63, 64, 130, 5], dtype=torch.int32)
    batch = single_sequence_batch(ids.tolist(), 16)
    op = abi.op_table(OP_KINDS["embedding"], [], [37], [packed])
    out = np.empty((5, 37), np.float32)
    abi.run_op(native.context, op, 5, (), [(out.ctypes.data, 37)], [packed], abi.batch_struct(batch))
    assert torch.equal(torch.from_numpy(out), weight[ids.long()].float())


@pytest.mark.parametrize("residual", [False, True])
def test_norms_when_widths_are_odd_then_within_bound(native: NativeBackend, residual: bool) -> None:
    for rows in ROWS:
        for width in WIDTHS:
            x, r = random(rows, width), random(rows, width, seed=1) if residual else None
            weight, bias = random(width, seed=2), random(width, seed=3)
            found, expected = both(
                native, lambda x=x, w=weight, r=r: ops.rms_norm(x, w, 1e-5, residual=r, weight_offset=1.0)
            )
            assert_within("rms_norm", found, expected)
            if width > 1:  # the variance of one value is 0: both divide noise by eps
                for b in (None, bias):
                    found, expected = both(
                        native, lambda x=x, w=weight, b=b, r=r: ops.layer_norm(x, w, b, 1e-5, residual=r)
                    )
                    assert_within("layer_norm", found, expected)


def test_rms_norm_when_in_groups_or_of_a_column_range_then_within_bound(native: NativeBackend) -> None:
    for groups, width in ((3, 17), (4, 64), (1, 5)):
        wide, weight = random(7, groups * width + 9), random(width, seed=1)
        part = wide[:, 9:]
        assert_within("rms_norm", *both(native, lambda p=part, w=weight, g=groups: ops.rms_norm(p, w, 1e-6, groups=g)))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_when_the_whole_head_or_a_part_turns_then_within_bound(native: NativeBackend, interleaved: bool) -> None:
    for heads, head_dim, turned in ((1, 2, 2), (3, 64, 64), (9, 80, 80), (2, 96, 34), (5, 6, 4)):
        positions = torch.tensor([0, 1, 17, 4_095, 131_071], dtype=torch.int32)
        inv_freq = (10_000.0 ** (-np.arange(0, turned, 2) / turned)).astype(np.float32)
        found, expected = both(native, lambda p=positions, f=inv_freq: ops.rope_table(p, f, 1.25))
        assert_within("rope_table", found, expected)
        x, table = random(5, heads * head_dim), expected[0]
        found, expected = both(native, lambda x=x, t=table, e=head_dim: ops.rotary(x, t, e, interleaved=interleaved))
        assert_within("rotary", found, expected)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_elementwise_when_widths_are_odd_then_within_bound(native: NativeBackend, act: str) -> None:
    for rows in ROWS:
        for width in WIDTHS:
            x, y = random(rows, 2 * width, scale=4.0), random(rows, 2 * width, seed=1)
            assert_within("act_and_mul", *both(native, lambda x=x: ops.act_and_mul(x, act)))
            assert_within("act", *both(native, lambda x=x: ops.act(x, act)))
            assert_within("add", *both(native, lambda x=x, y=y: ops.add(x, y)))
            assert_within("scale", *both(native, lambda x=x: ops.scale(x, 0.3)))
            assert_within("softcap", *both(native, lambda x=x: ops.softcap(x, 2.5)))


def test_activations_when_inputs_are_extreme_then_finite_and_within_bound(native: NativeBackend) -> None:
    x = torch.tensor([[-1e30, -200.0, -88.0, -20.0, -1e-8, 0.0, 1e-8, 20.0, 88.0, 200.0, 1e30]])
    for act in ACTIVATIONS:
        found, expected = both(native, lambda act=act: ops.act(x, act))
        assert torch.isfinite(found[0]).all()
        assert torch.allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alias", ACTIVATION_ALIASES)
def test_other_names_of_activations_when_called_then_the_same_bits_and_the_function_of_transformers(
    native: NativeBackend, alias: str
) -> None:
    x = random(7, 2 * 61, scale=4.0)
    for call in (ops.act, ops.act_and_mul):
        found, expected = both(native, lambda call=call: call(x, alias))
        same = both(native, lambda call=call: call(x, ACTIVATION_ALIASES[alias]))
        assert torch.equal(found[0], same[0][0])
        assert torch.equal(expected[0], same[1][0])
    found, _ = both(native, lambda: ops.act(x, alias))
    assert_within("act", found, [transformers.activations.ACT2FN[alias](x)])


def test_activation_that_is_unknown_when_called_then_typed_and_all_are_listed() -> None:
    with pytest.raises(UnsupportedModelError, match=r"activation is 'xielu'; known are none, silu, gelu, .*, swish, "):
        ops.act(random(1, 1), "xielu")


def test_gather_rows_when_rows_repeat_and_descend_then_copied(native: NativeBackend) -> None:
    x = random(9, 21)
    batch = single_sequence_batch(list(range(9)), 16)
    chosen = BatchInput(**{**vars(batch), "logit_rows": np.array([8, 0, 3, 3], np.int32)})
    assert_within("gather_rows", *both(native, lambda: ops.gather_rows(x), chosen))


@pytest.mark.parametrize("vocab_size", [1, 100, 8_193, 151_936])
def test_sample_when_rows_tie_then_lowest_index_and_statistics_within_bound(
    native: NativeBackend, vocab_size: int
) -> None:
    logits = random(5, vocab_size, scale=3.0)
    logits[1] = 0.25
    logits[2, -1] = logits[2, vocab_size // 2] = 50.0
    found, expected = both(native, lambda: ops.sample(logits))
    assert torch.equal(found[0][:, 0].view(torch.int32), expected[0][:, 0].view(torch.int32))
    assert torch.equal(found[0][:, 1], expected[0][:, 1])
    assert_within("sample", [found[0][:, 2:]], [expected[0][:, 2:]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_moe_when_experts_are_few_or_many_then_within_bound(
    native: NativeBackend, dtype: str, renormalize: bool
) -> None:
    for rows, experts, top_k in ((1, 4, 2), (13, 8, 3), (7, 2, 2)):
        x, router = random(rows, 64), random(rows, experts, seed=1)
        gate_up = random(experts * 256, 64, seed=2, scale=0.1).to(DTYPES[dtype])
        down = random(experts * 64, 128, seed=3, scale=0.1).to(DTYPES[dtype])

        def call(
            x: torch.Tensor = x, router: torch.Tensor = router, a: Any = gate_up, b: Any = down, k: int = top_k
        ) -> Any:
            return ops.moe(x, router, a, b, top_k=k, act="silu", renormalize=renormalize)

        found, expected = both(native, call)
        # A hidden value may round to the other bfloat16 neighbour (2^-9 of it): the bound is that of the rounding.
        if dtype == "bfloat16":
            assert float((found[0] - expected[0]).abs().max()) <= 4e-3 * float(expected[0].abs().max())
        else:
            assert_within("moe", found, expected)


def assert_attention_within(kv_dtype: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    if kv_dtype == "float32":
        assert_within("attention", [found], [expected])
        return
    error = (found - expected).abs() / float(expected.abs().max())
    flipped = float((error > BOUNDS["attention"]).float().mean())
    assert float(error.max()) <= FLIPPED_BOUND, f"{float(error.max()):.2e} of the greatest magnitude"
    assert flipped <= FLIPPED_SHARE, f"{flipped:.1%} of values are beyond {BOUNDS['attention']:.0e}"


def attend_steps(
    native: NativeBackend,
    kv_dtype: str,
    shape: tuple[int, int, int],
    steps: tuple[tuple[int, int], ...],
    *,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the core and the oracle make of steps (start, tokens) of one sequence, one behind the other."""
    heads, kv_heads, head_dim = shape
    code, torch_dtype = KV_DTYPES[kv_dtype]
    n_blocks = -(-sum(steps[-1]) // 16)
    kv = abi.KVCache(n_layers=2, n_kv_heads=kv_heads, head_dim=head_dim, block_size=16, n_blocks=n_blocks, dtype=code)
    oracle_kv = reference.ReferenceKV(2, kv_heads, head_dim, n_blocks * 16, 16, torch_dtype)
    layer = {"layer": 1, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    found, expected = [], []
    for start, length in steps:
        batch = single_sequence_batch([0] * length, 16, start=start)
        q, k, v = (random(length, n * head_dim, seed=i + start) for i, n in enumerate((heads, kv_heads, kv_heads)))
        for outputs, run, cache in ((found, native, kv), (expected, reference.run, oracle_kv)):
            with step_scope(Step(run, batch, cache)):
                outputs.append(ops.attention(q, k, v, **layer, softcap=softcap, window=window))
    return torch.cat(found), torch.cat(expected)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (0, 20.0), (40, 8.0)])
def test_attention_when_prefilled_and_decoded_then_within_bound(
    native: NativeBackend, kv_dtype: str, window: int, softcap: float
) -> None:
    for shape in ((4, 4, 64), (9, 3, 64), (8, 2, 80), (6, 1, 6), (4, 2, 128)):
        steps = ((0, 130), (130, 1), (131, 9))
        assert_attention_within(kv_dtype, *attend_steps(native, kv_dtype, shape, steps, window=window, softcap=softcap))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [0, 1100])
def test_attention_when_the_past_has_several_spans_then_within_bound(
    native: NativeBackend, kv_dtype: str, window: int
) -> None:
    steps = ((0, 1000), (1000, 30), (1030, 1020), (2050, 1))
    assert_attention_within(kv_dtype, *attend_steps(native, kv_dtype, (2, 1, 16), steps, window=window))


def test_activations_when_an_input_is_nan_then_its_output_alone_is_nan(native: NativeBackend) -> None:
    x = torch.linspace(-2, 2, 33)[None, :].clone()
    x[0, 5] = torch.nan
    for act in ACTIVATIONS:
        found, expected = both(native, lambda act=act: ops.act(x, act))
        assert torch.equal(torch.isnan(found[0]), torch.isnan(expected[0]))
