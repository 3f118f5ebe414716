"""Eager execution: the module itself, op by op on torch tensors, with the kernels of the program. Needs torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pellucid.config import EngineConfig
from pellucid.executor.base import F32
from pellucid.executor.loader import LoadedModel
from pellucid.models.config import ModelConfig
from pellucid.models.registry import ModelRegistry
from pellucid.ops import abi, gather_rows
from pellucid.ops.batch import BatchInput
from pellucid.ops.dispatch import Step, step_scope
from pellucid.ops.native import NativeBackend
from pellucid.weights.checkpoint import Checkpoint, open_checkpoint
from pellucid.weights.hub import resolve_model

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def materialise(model: Any, context: abi.Context, dtype: torch.dtype) -> None:
    """Gives every parameter of a loaded model its values: matrices in `dtype`, rounded as packing rounds; vectors in float32."""
    shared: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in shared:
                kind = torch.float32 if parameter.dim() == 1 else dtype
                shared[id(parameter)] = torch.nn.Parameter(_values(parameter, context, kind), requires_grad=False)
            module._parameters[name] = shared[id(parameter)]


def _values(parameter: Any, context: abi.Context, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.empty(tuple(parameter.shape), dtype=dtype)
    data = tensor.view(torch.uint8).numpy().reshape(-1)
    code = abi.F32 if dtype == torch.float32 else abi.BF16
    begin = 0
    for piece in parameter.pieces:
        width = piece.rows * abi.row_bytes(code, piece.cols)
        target = data[begin : begin + width]
        abi.convert_bytes(context, piece.data, piece.pld_dtype, piece.rows, piece.cols, target, code)
        begin += width
    return tensor


def load_eager(checkpoint: Checkpoint, context: abi.Context, dtype: str) -> Any:
    """The checkpoint's model as a torch module with its weights."""
    config = ModelConfig.from_dict(checkpoint.config)
    model = ModelRegistry.resolve(config.architecture)(config)
    model.load_weights(checkpoint.tensors())
    materialise(model, context, TORCH_DTYPES[dtype])
    return model


class EagerModel:
    """An executable that runs the module. Gives the same bits as its program, because the ops are the same."""

    def __init__(self, config: EngineConfig, loaded: LoadedModel, context: abi.Context, kv: abi.KVCache) -> None:
        self.module = load_eager(open_checkpoint(resolve_model(config.model)), context, loaded.dtype)
        self._backend, self._kv = NativeBackend(context), kv
        self._hidden = torch.empty(0, loaded.config.hidden_size)
        self._batch: BatchInput | None = None

    def run(self, batch: BatchInput) -> F32:
        """Forward for all T tokens; logits [L, V] of `batch.logit_rows`."""
        with step_scope(Step(self._backend, batch, self._kv)):
            ids, positions = torch.from_numpy(batch.input_ids_T), torch.from_numpy(batch.positions_T)
            self._hidden, self._batch = self.module(ids, positions), batch
            return self._logits()

    def logits_of(self, rows: npt.NDArray[np.int32]) -> F32:
        """Logits [L, V] of rows of the last batch."""
        if self._batch is None:
            raise RuntimeError("no batch was run yet")
        some = BatchInput(**{**vars(self._batch), "logit_rows": np.ascontiguousarray(rows, np.int32)})
        with step_scope(Step(self._backend, some, self._kv)):
            return self._logits()

    def _logits(self) -> F32:
        logits: torch.Tensor = self.module.compute_logits(gather_rows(self._hidden))
        array: F32 = logits.numpy()
        return array

    def hidden(self) -> F32:
        """Hidden states [T, D] of the last batch."""
        array: F32 = self._hidden.numpy()
        return array

    def close(self) -> None:
        """Frees the cache."""
        self._kv.close()
