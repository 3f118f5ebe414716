"""Eager ops on the core: torch tensors or numpy arrays in, no copy of activations, the same kernels as in a program.

This file does not import torch: it takes whatever has a data pointer. The serving path uses only `run_on_arrays`.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import numpy as np

from pellucid.contract.batch import BatchInput
from pellucid.core import abi, structs
from pellucid.ops.dispatch import Step
from pellucid.ops.spec import ID_OPS, MATRIX_OPERANDS, OP_KINDS, OpSpec, core_floats

_BATCH_OPS = ("attention", "gather_rows")


def op_struct(spec: OpSpec) -> abi.AnyArray:
    """A call as pld_op, with operands said to be present (their number) or absent (-1)."""
    inputs = () if spec.kind in ID_OPS else spec.inputs
    in_widths = [None if value is None else int(value.shape[1]) for value in inputs]
    floats = core_floats(spec.kind, spec.floats)
    return abi.op_table(OP_KINDS[spec.kind], in_widths, spec.out_widths, spec.weights, spec.ints, floats)


def run_on_arrays(context: abi.Context, spec: OpSpec) -> tuple[abi.F32Array, ...]:
    """Runs an op without weights on float32 numpy arrays."""
    arrays = [np.ascontiguousarray(value, np.float32) for value in spec.inputs]
    rows = arrays[0].shape[0]
    outputs = [np.empty((rows, width), np.float32) for width in spec.out_widths]
    if rows:
        inputs = [(int(array.ctypes.data), array.shape[1]) for array in arrays]
        targets = [(int(array.ctypes.data), array.shape[1]) for array in outputs]
        abi.run_op(context, op_struct(spec), rows, inputs, targets, ())
    return tuple(outputs)


class NativeBackend:
    """Runs ops of an eager forward on the core. Packed matrices are kept as long as their tensors live unchanged."""

    def __init__(self, context: abi.Context) -> None:
        self.context = context
        self._packed: dict[int, tuple[Any, tuple[int, int], abi.Weight]] = {}
        self._stored: dict[int, tuple[Any, list[tuple[int, abi.Weight]]]] = {}

    def store(self, tensor: Any, parts: list[tuple[int, abi.Weight]]) -> None:
        """Matrices to use for `tensor`, which may be on the meta device: (first row, weight) in order of rows."""
        self._stored[id(tensor)] = (tensor, parts)

    def __call__(self, spec: OpSpec, step: Step) -> tuple[Any, ...]:
        """Runs one op on torch tensors (float32 activations on the CPU, unit column stride)."""
        import torch

        with torch.no_grad():
            return self._run(spec, step)

    def _run(self, spec: OpSpec, step: Step) -> tuple[Any, ...]:
        import torch

        batch, keep = self._batch(spec, step)
        first = spec.inputs[0]
        rows = len(step.batch.logit_rows) if spec.kind == "gather_rows" and step.batch else int(first.shape[0])
        outputs = [torch.empty((rows, width), dtype=torch.float32) for width in spec.out_widths]
        if rows:
            values = () if spec.kind in ID_OPS else spec.inputs
            tensors = [None if value is None else _activation(value) for value in values]
            inputs = [None if t is None else (t.data_ptr(), t.stride(0)) for t in tensors]
            targets = [(t.data_ptr(), t.stride(0)) for t in outputs]
            kv = step.kv if spec.kind == "attention" else None
            parts = self._parts(spec)
            if parts is None or len(parts) == 1:
                weights = [None if w is None else self._weight(spec.kind, i, w) for i, w in enumerate(spec.weights)]
                abi.run_op(self.context, op_struct(spec), rows, inputs, targets, weights, batch, kv)
            else:
                self._run_parts(spec, parts, rows, inputs, targets[0])
        del keep
        return tuple(outputs)

    def _parts(self, spec: OpSpec) -> list[tuple[int, abi.Weight]] | None:
        held = self._stored.get(id(spec.weights[0])) if spec.weights else None
        return None if held is None else held[1]

    def _run_parts(
        self,
        spec: OpSpec,
        parts: list[tuple[int, abi.Weight]],
        rows: int,
        inputs: list[tuple[int, int] | None],
        target: tuple[int, int],
    ) -> None:
        """A linear op whose matrix is stored in several types: each part fills its columns of the output."""
        bias = spec.weights[1] if len(spec.weights) > 1 else None
        for row, weight in parts:
            some = None if bias is None else bias[row : row + weight.rows]
            op = op_struct(replace(spec, weights=(weight, some), out_widths=(weight.rows,)))
            place = (target[0] + 4 * row, target[1])
            abi.run_op(self.context, op, rows, inputs, [place], [weight, None if some is None else _vector(some)])

    @staticmethod
    def _batch(spec: OpSpec, step: Step) -> tuple[structs.BatchStruct | None, object]:
        if spec.kind in _BATCH_OPS:
            if step.batch is None:
                raise RuntimeError(f"op {spec.kind} needs a batch: give one to the step")
            return abi.batch_struct(step.batch), step.batch
        if spec.kind not in ID_OPS:
            return None, None
        ids = np.ascontiguousarray(spec.inputs[0].numpy(), np.int32)
        none = np.zeros(0, np.int32)
        lengths = np.array([len(ids)], np.int32)
        bounds = np.array([0, len(ids)], np.int32)
        batch = BatchInput(ids, ids, bounds, lengths, none.reshape(1, 0), none.astype(np.int64), none)
        return abi.batch_struct(batch), batch

    def _weight(self, kind: str, operand: int, tensor: Any) -> abi.Weight:
        is_matrix = operand in MATRIX_OPERANDS.get(kind, ())
        if is_matrix and id(tensor) in self._stored:
            return self._stored[id(tensor)][1][0][1]
        stamp = (0, 0) if isinstance(tensor, np.ndarray) else (tensor.data_ptr(), tensor._version)
        key = id(tensor) * 4 + (0 if not is_matrix else 1 if kind == "embedding" else 2)
        held = self._packed.get(key)
        if held is not None and held[0]() is tensor and held[1] == stamp:
            return held[2]
        if not is_matrix:
            weight = _vector(tensor)
        elif kind == "embedding":
            weight = _table(tensor)
        else:
            weight = self._panels(tensor)
        self._packed[key] = (weakref.ref(tensor, lambda gone: self._drop(key, gone)), stamp, weight)
        return weight

    def _drop(self, key: int, gone: Any) -> None:
        """A tensor has died: a constant that a forward makes leaves nothing behind."""
        if key in self._packed and self._packed[key][0] is gone:
            del self._packed[key]

    def _panels(self, tensor: Any) -> abi.Weight:
        table = _table(tensor)
        packed = abi.aligned_bytes(abi.packed_bytes(table.rows, table.cols, table.dtype))
        abi.pack(self.context, table.data, table.dtype, table.rows, table.cols, 0, table.rows, packed, table.dtype)
        return abi.Weight(packed, table.rows, table.cols, table.dtype, abi.PANELS)


def _activation(tensor: Any) -> Any:
    import torch

    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise TypeError(f"activations are float32 on the CPU; got {tensor.dtype} on {tensor.device}")
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def _vector(tensor: Any) -> abi.Weight:
    values = tensor if isinstance(tensor, np.ndarray) else tensor.detach().float().numpy()
    array = np.ascontiguousarray(values, np.float32).reshape(-1)
    return abi.Weight(array.view(np.uint8), 1, array.size, abi.F32, abi.ROW_MAJOR)


def _table(tensor: Any) -> abi.Weight:
    import torch

    if isinstance(tensor, np.ndarray):  # a constant
        tensor = torch.from_numpy(np.ascontiguousarray(tensor, np.float32))
    codes = {torch.float32: abi.F32, torch.bfloat16: abi.BF16}
    if tensor.dtype not in codes:
        raise TypeError(f"matrices are float32 or bfloat16; got {tensor.dtype}")
    data = tensor.detach().contiguous().view(torch.uint8).numpy().reshape(-1)
    rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
    return abi.Weight(data, rows, int(tensor.shape[-1]), codes[tensor.dtype], abi.ROW_MAJOR)
