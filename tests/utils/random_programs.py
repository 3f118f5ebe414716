"""Random programs, their runs in the core, and the same ops run one by one, each on memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from utils.core_attention import Array, context

from pellucid import ops
from pellucid.contract.batch import BatchInput
from pellucid.core import abi
from pellucid.program.builder import encode_buffers, encode_ops
from pellucid.program.tracer import RecordedOp, Recording, trace

VOCAB = 96
BLOCK = 16
_DTYPES = (abi.F32, abi.BF16, abi.Q8_0, abi.Q4_0, abi.Q4_1, abi.I8)
_EXPERT_DTYPES = (abi.F32, abi.BF16)
_ACTS = ("none", "silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True)
class Parameter:
    """A packed weight, as the tracer sees parameters."""

    shape: tuple[int, ...]
    weight: abi.Weight


@dataclass
class RandomModel:
    """Calls a random list of ops: products (gated ones among them), norms, attention, experts and element by element."""

    seed: int
    num_ops: int = 14
    num_layers: int = 0  # attention layers, of one shape
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    _rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self.kv_heads = int(self._rng.choice([1, 2, 4]))
        self.head_dim = int(self._rng.choice([16, 32]))
        self.width = int(self._rng.choice([64, 96, 128]))
        self.steps: list[Callable[[dict[str, Any]], None]] = []
        for _ in range(self.num_ops):
            kind = self._rng.choice(
                ["mlp", "attention", "moe", "linear", "norm", "simple"], p=[0.2, 0.3, 0.1, 0.2, 0.1, 0.1]
            )
            self.steps.append(getattr(self, f"_{kind}")())
        self.table, self.head = self._matrix(VOCAB, self.width, [abi.F32]), self._matrix(VOCAB, self.width)
        self.last = self._vector(self.width)

    def named_parameters(self) -> Any:
        """None is needed by name."""
        return ()

    def forward(self, input_ids: Any, positions: Any) -> Any:
        """The hidden states."""
        frequencies = (1e4 ** -(np.arange(self.head_dim // 2) / (self.head_dim // 2))).astype(np.float32)
        state = {"x": ops.embedding(input_ids, self.table), "rope": ops.rope_table(positions, _vector(frequencies))}
        state["residual"] = ops.scale(state["x"], 0.5)
        for step in self.steps:
            step(state)
        return ops.rms_norm(ops.add(state["x"], state["residual"]), self.last, 1e-5)

    def compute_logits(self, hidden: Any) -> Any:
        """A product, and now and then more."""
        logits = ops.linear(hidden, self.head)
        return ops.softcap(logits, 20.0) if self.seed % 3 == 0 else logits

    # ---- steps: each leaves `x` and `residual` as wide as before ----------------------------------------------------

    def _mlp(self) -> Callable[[dict[str, Any]], None]:
        wide = int(self._rng.choice([32, 64, 96, 160, 48]))
        up, down = self._matrix(2 * wide, self.width), self._matrix(self.width, wide)
        norm, act = self._vector(self.width), str(self._rng.choice(_ACTS[1:]))
        bias = self._vector(2 * wide) if self._rng.random() < 0.3 else None

        def step(state: dict[str, Any]) -> None:
            y, state["residual"] = ops.rms_norm(state["x"], norm, 1e-5, residual=state["residual"])
            state["x"] = ops.linear(ops.act_and_mul(ops.linear(y, up, bias), act), down)

        return step

    def _attention(self) -> Callable[[dict[str, Any]], None]:
        layer, q, kv = self.num_layers, self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.num_layers += 1
        into, out, norm = self._matrix(q + 2 * kv, self.width), self._matrix(self.width, q), self._vector(self.width)
        window = int(self._rng.choice([0, 0, 40, 1500]))

        def step(state: dict[str, Any]) -> None:
            y, state["residual"] = ops.rms_norm(state["x"], norm, 1e-5, residual=state["residual"])
            parts = ops.linear(y, into).split([q, kv, kv], dim=-1)
            turned = [ops.rotary(part, state["rope"], self.head_dim) for part in parts[:2]]
            made = ops.attention(
                *turned, parts[2], layer=layer, num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=self.head_dim,
                scale=self.head_dim**-0.5, softcap=0.0, window=window,
            )  # fmt: skip
            state["x"] = ops.linear(made, out)

        return step

    def _moe(self) -> Callable[[dict[str, Any]], None]:
        experts, wide, inner = 5, 64, 64
        into, out = self._matrix(wide, self.width), self._matrix(self.width, wide)
        router = self._matrix(experts, wide)
        gate_up = self._matrix(experts * 2 * inner, wide, _EXPERT_DTYPES)
        down = self._matrix(experts * wide, inner, _EXPERT_DTYPES)

        def step(state: dict[str, Any]) -> None:
            y = ops.linear(state["x"], into)
            made = ops.moe(y, ops.linear(y, router), gate_up, down, top_k=2, act="silu", renormalize=True)
            state["x"] = ops.linear(made, out)

        return step

    def _linear(self) -> Callable[[dict[str, Any]], None]:
        weight, bias = self._matrix(self.width, self.width), self._vector(self.width)
        act, other = str(self._rng.choice(_ACTS)), bool(self._rng.random() < 0.5)

        def step(state: dict[str, Any]) -> None:
            state["x"] = ops.linear(state["residual" if other else "x"], weight, bias, act)

        return step

    def _norm(self) -> Callable[[dict[str, Any]], None]:
        mean = bool(self._rng.random() < 0.5)
        groups = 1 if mean else int(self._rng.choice([1, 2, 4]))
        weight = self._vector(self.width // groups)

        def step(state: dict[str, Any]) -> None:
            if mean:
                state["x"], state["residual"] = ops.layer_norm(
                    state["x"], weight, None, 1e-5, residual=state["residual"]
                )
            else:
                state["x"] = ops.rms_norm(state["x"], weight, 1e-5, groups=groups)

        return step

    def _simple(self) -> Callable[[dict[str, Any]], None]:
        kind, act = int(self._rng.integers(4)), str(self._rng.choice(_ACTS))

        def step(state: dict[str, Any]) -> None:
            x = state["x"]
            state["x"] = (
                ops.act(x, act), ops.add(x, state["residual"]), ops.scale(x, 0.75), ops.softcap(x, 8.0)
            )[kind]  # fmt: skip

        return step

    def _matrix(self, rows: int, cols: int, dtypes: Sequence[int] = _DTYPES) -> Parameter:
        fitting = [dtype for dtype in dtypes if cols % 32 == 0 or dtype in (abi.F32, abi.BF16)]
        dtype = int(self._rng.choice(fitting))
        values = (self._rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)
        data = abi.aligned_bytes(abi.packed_bytes(rows, cols, dtype))
        abi.pack(context(), values.reshape(-1).view(np.uint8), abi.F32, rows, cols, 0, rows, data, dtype)
        return Parameter((rows, cols), abi.Weight(data, rows, cols, dtype, abi.PANELS))

    def _vector(self, width: int) -> Parameter:
        return _vector((1 + 0.3 * self._rng.standard_normal(width)).astype(np.float32))


def _vector(values: Array) -> Parameter:
    data = abi.aligned_bytes(values.nbytes)
    data[:] = values.view(np.uint8)
    return Parameter(values.shape, abi.Weight(data, 1, len(values), abi.F32, abi.ROW_MAJOR))


Outcome = tuple[Array, Array]  # hidden states [T, D] and logits [L, V] of a step


@dataclass
class RandomProgram:
    """A random model, recorded."""

    model: RandomModel
    recording: Recording = field(init=False)

    def __post_init__(self) -> None:
        self.recording = trace(self.model)
        self.weights = [weight.source.weight for weight in self.recording.weights]

    def cache(self, dtype: int, n_blocks: int) -> abi.KVCache:
        """For the program's layers of attention."""
        model = self.model
        return abi.KVCache(
            n_layers=max(1, model.num_layers),
            n_kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            block_size=BLOCK,
            n_blocks=n_blocks,
            dtype=dtype,
        )

    def run(self, ctx: abi.Context, steps: Sequence[BatchInput], kv: abi.KVCache) -> list[Outcome]:
        """As a program of the core."""
        recording = self.recording
        program = abi.Program(
            ctx,
            encode_ops(recording),
            encode_buffers(recording),
            self.weights,
            n_forward_ops=recording.n_forward_ops,
            hidden=recording.hidden,
            logits=recording.logits,
            vocab_size=VOCAB,
            max_tokens=max(step.num_tokens for step in steps),
            max_logit_rows=max(len(step.logit_rows) for step in steps),
        )
        outcomes = []
        for step in steps:
            program.run(kv, step)
            outcomes.append((program.hidden().copy(), program.logits(len(step.logit_rows)).copy()))
        program.close()
        return outcomes

    def run_op_by_op(self, ctx: abi.Context, steps: Sequence[BatchInput], kv: abi.KVCache) -> list[Outcome]:
        """Each op alone, every buffer with memory of its own."""
        return [self._walk(ctx, step, kv) for step in steps]

    def _walk(self, ctx: abi.Context, step: BatchInput, kv: abi.KVCache) -> Outcome:
        rows = {"T": step.num_tokens, "L": len(step.logit_rows)}
        recording = self.recording
        buffers = [
            np.full((rows[domain], width), np.nan, np.float32)
            for width, domain in zip(recording.widths, recording.domains, strict=True)
        ]
        structs, batch = encode_ops(recording), abi.batch_struct(step)
        for op, struct in zip(recording.ops, structs, strict=True):
            self._run_one(ctx, op, struct, buffers, batch, kv)
        return buffers[recording.hidden], buffers[recording.logits]

    def _run_one(
        self, ctx: abi.Context, op: RecordedOp, struct: Any, buffers: list[Array], batch: Any, kv: abi.KVCache
    ) -> None:
        alone = np.array([struct], abi.OP_DTYPE)
        alone["in_col"], alone["out_col"] = 0, 0
        inputs = [
            None if x is None else (int(buffers[x[0]].ctypes.data) + 4 * x[1], buffers[x[0]].shape[1])
            for x in op.inputs
        ]
        if op.kind in ("embedding", "rope_table"):
            inputs = []
        outputs = [(int(buffers[b].ctypes.data), buffers[b].shape[1]) for b in op.outputs]
        weights = [None if index is None else self.weights[index] for index in op.weights]
        rows = buffers[op.outputs[0]].shape[0]
        abi.run_op(ctx, alone, rows, inputs, outputs, weights, batch, kv if op.kind == "attention" else None)


def batches(spans: Sequence[Sequence[tuple[int, int]]], seed: int = 0) -> tuple[list[BatchInput], int]:
    """Steps of sequences: `spans[step][sequence]` is [begin, end) of its positions (empty: not in the step). Also the number of
    blocks, in a random order of which the sequences lie."""
    rng = np.random.default_rng(seed)
    longest = [max(step[seq][1] for step in spans) for seq in range(len(spans[0]))]
    needs = [-(-length // BLOCK) for length in longest]
    order = iter(rng.permutation(sum(needs)).tolist())
    tables = [[next(order) for _ in range(need)] for need in needs]
    width = max(needs)
    made = []
    for step in spans:
        live = [(seq, begin, end) for seq, (begin, end) in enumerate(step) if end > begin]
        counts = [end - begin for _, begin, end in live]
        positions = np.concatenate([np.arange(begin, end) for _, begin, end in live]).astype(np.int32)
        cells = [tables[seq][p // BLOCK] * BLOCK + p % BLOCK for seq, begin, end in live for p in range(begin, end)]
        query_start = np.cumsum([0, *counts]).astype(np.int32)
        made.append(
            BatchInput(
                input_ids_T=rng.integers(0, VOCAB, len(positions)).astype(np.int32),
                positions_T=positions,
                query_start=query_start,
                seq_lens=np.array([end for *_, end in live], np.int32),
                block_tables=np.array([[*tables[s], *[-1] * (width - needs[s])] for s, *_ in live], np.int32),
                slot_mapping_T=np.array(cells, np.int64),
                logit_rows=_wanted(query_start),
            )
        )
    return made, sum(needs)


def _wanted(query_start: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    return (query_start[1:] - 1).astype(np.int32)
