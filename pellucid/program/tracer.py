"""Recording: call the module once with symbols, and every op writes itself down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pellucid import ops
from pellucid.errors import WeightFormatError
from pellucid.ops.dispatch import Step, step_scope
from pellucid.ops.spec import ID_OPS, IDS_POSITIONS, IDS_TOKENS, MATRIX_OPERANDS, OpSpec, Symbol, foreign
from pellucid.program.observe import observed

# The buffers of symbols that come with the batch, and what ops are told to read: numbers of `pld_ids`.
_BATCH_IDS = {-1: IDS_TOKENS, -2: IDS_POSITIONS}

WeightKind = Literal["matrix", "table", "vector"]


@dataclass
class RecordedWeight:
    """A weight that ops refer to by index. `kind`: matrix (packed panels), table (row-major, gathered from), vector (float32)."""

    name: str
    source: Any  # a parameter with `.pieces`, or a numpy constant
    shape: tuple[int, ...]
    kind: WeightKind


@dataclass(frozen=True)
class RecordedOp:
    """An op on buffer ids. `inputs` hold (buffer, column, width); None is absent."""

    kind: str
    inputs: tuple[tuple[int, int, int] | None, ...]
    outputs: tuple[int, ...]
    weights: tuple[int | None, ...]
    ints: tuple[int, ...]
    floats: tuple[float, ...]
    out_range: tuple[int, int] | None = None  # column and width that output 0 is written to; None: all of it


@dataclass
class Recording:
    """A traced module. Buffers are single-assignment; `domains` gives "T" or "L" for each."""

    ops: list[RecordedOp] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    weights: list[RecordedWeight] = field(default_factory=list)
    n_forward_ops: int = 0
    hidden: int = -1
    logits: int = -1
    # name -> (buffer, column, width) of the terms whose sum the activation is
    activations: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)


class _Recorder:
    """Turns calls on symbols into lines of a recording."""

    def __init__(self, model: Any) -> None:
        self.recording = Recording()
        parameters = list(model.named_parameters())
        buffers = model.named_buffers() if hasattr(model, "named_buffers") else ()
        self.names = {id(tensor): name for name, tensor in (*parameters, *buffers)}
        # A layer of torch's own has random values until its pieces are read.
        self._has_unread = any(hasattr(one, "pieces") and not getattr(one, "is_meta", True) for _, one in parameters)
        self._weight_index: dict[int, int] = {}  # by id: `RecordedWeight.source` keeps what was made in a forward alive

    def symbol(self, width: int, domain: str) -> Symbol:
        self.recording.widths.append(width)
        self.recording.domains.append(domain)
        return Symbol(self, len(self.recording.widths) - 1, 0, width, domain)

    def record(self, spec: OpSpec) -> tuple[Symbol, ...]:
        """Appends the op and returns symbols for its outputs."""
        symbols = [value for value in spec.inputs if value is not None]
        if any(not isinstance(value, Symbol) for value in symbols):
            raise foreign(f"ops.{spec.kind} on a tensor that no op gave")
        domain = "L" if spec.kind == "gather_rows" else symbols[0].domain
        outputs = tuple(self.symbol(width, domain) for width in spec.out_widths)
        ints, inputs = _batch_ids(spec)
        weights = tuple(None if w is None else self._weight(spec, i, w) for i, w in enumerate(spec.weights))
        self.recording.ops.append(
            RecordedOp(spec.kind, inputs, tuple(s.buffer for s in outputs), weights, ints, spec.floats)
        )
        return outputs

    def name_activation(self, name: str, terms: tuple[Any, ...]) -> None:
        """Notes where an activation lies. A module may give what is no activation, and a shared one is named by its first call."""
        if all(isinstance(term, Symbol) and term.buffer >= 0 for term in terms):
            places = [(term.buffer, term.column, term.width) for term in terms]
            self.recording.activations.setdefault(name, places)

    def _may_be_computed(self, weight: Any) -> bool:
        """True for a tensor that may come of parameters that have no values yet, though they may look as if they had."""
        return hasattr(weight, "is_meta") and (weight.is_meta or self._has_unread)

    def _weight(self, spec: OpSpec, operand: int, weight: Any) -> int:
        if isinstance(weight, Symbol) or (id(weight) not in self.names and self._may_be_computed(weight)):
            raise foreign(f"ops.{spec.kind} with a weight that is computed in the forward")
        kind: WeightKind = "vector"
        if operand in MATRIX_OPERANDS.get(spec.kind, ()):
            kind = "table" if spec.kind == "embedding" else "matrix"
        if id(weight) not in self._weight_index:
            name = self.names.get(id(weight), f"constant.{len(self.recording.weights)}")
            shape = tuple(int(n) for n in weight.shape)
            self.recording.weights.append(RecordedWeight(name, weight, shape, kind))
            self._weight_index[id(weight)] = len(self.recording.weights) - 1
        index = self._weight_index[id(weight)]
        if kind == "matrix":  # a tied embedding is gathered from the packed matrix: it is stored once
            self.recording.weights[index].kind = "matrix"
        return index


def _batch_ids(spec: OpSpec) -> tuple[tuple[int, ...], tuple[tuple[int, int, int] | None, ...]]:
    """An op's integers and its inputs as places in buffers. Token ids and positions come with the batch: the ops that take them have
    no buffer input, and an integer that says which they read.

    Raises:
        TypeError: another op was given token ids or positions, or one of these was given rows of floats.
    """
    takes_ids = spec.kind in ID_OPS
    if any(value is not None and (value.buffer in _BATCH_IDS) != takes_ids for value in spec.inputs):
        wanted = "token ids or positions" if takes_ids else "activations"
        raise TypeError(f"op {spec.kind} takes {wanted} of the batch; it was given something else")
    if not takes_ids:
        return spec.ints, tuple(None if v is None else (v.buffer, v.column, v.width) for v in spec.inputs)
    ids = _BATCH_IDS[spec.inputs[0].buffer]
    return (() if ids == ID_OPS[spec.kind] else (ids,)), (None,)


def _refuse(spec: OpSpec, step: Step) -> tuple[Any, ...]:
    raise foreign(f"ops.{spec.kind} on tensors that do not come of the batch")


def trace(model: Any) -> Recording:
    """Records `model.forward` and `model.compute_logits` (see the model contract in `pellucid.models.base`).

    Raises:
        ForeignOperationError: the module does something else with its inputs than to call ops.
        TypeError: it gives no hidden states or logits; or whatever its own code raises.
    """
    recorder = _Recorder(model)
    token_ids, positions = (Symbol(recorder, buffer, 0, 1) for buffer in _BATCH_IDS)
    with step_scope(Step(_refuse)), observed(model, recorder.name_activation):
        hidden = _symbol(model, "forward", model.forward(token_ids, positions))
    recording = recorder.recording
    recording.n_forward_ops, recording.hidden = len(recording.ops), hidden.buffer
    with step_scope(Step(_refuse)):
        logits = _symbol(model, "compute_logits", model.compute_logits(ops.gather_rows(hidden)))
    recording.logits = logits.buffer
    return recording


def _symbol(model: Any, method: str, value: Any) -> Symbol:
    if not isinstance(value, Symbol):
        raise TypeError(f"{type(model).__name__}.{method} gave {type(value).__name__}, which no op gave")
    return value


def constant(weight: RecordedWeight) -> np.ndarray[Any, Any] | None:
    """The array of a weight that is no view of the checkpoint: a constant of the code, or a tensor that the module filled itself."""
    source = weight.source
    if isinstance(source, np.ndarray) or hasattr(source, "pieces"):
        return source if isinstance(source, np.ndarray) else None
    if source.is_meta:
        raise WeightFormatError(f"parameter {weight.name!r} was given no values by load_weights")
    array: np.ndarray[Any, Any] = source.detach().float().numpy()
    return array
