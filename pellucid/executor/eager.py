"""Eager execution: the module itself, op by op on torch tensors, with the kernels of the program. Needs torch."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pellucid.api.hidden_states import NO_STEERING, Steering
from pellucid.config import EngineConfig
from pellucid.contract.batch import BatchInput, single_sequence_batch
from pellucid.contract.executor import F32, Executable
from pellucid.contract.facts import ContractDigest
from pellucid.core import abi
from pellucid.errors import RowError, UnsupportedModelError
from pellucid.executor.loader import LoadedModel, OpenedModel, bundle_json, open_model
from pellucid.models.registry import ModelRegistry
from pellucid.ops import gather_rows
from pellucid.ops.dispatch import Step, step_scope
from pellucid.ops.native import NativeBackend
from pellucid.program.file import ProgramFile
from pellucid.program.observe import observed
from pellucid.weights.hub import resolve_model

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def materialise(model: Any, context: abi.Context, dtype: torch.dtype, keep: Container[int] = ()) -> None:
    """Gives the parameters of a loaded model their values: matrices in `dtype`, rounded as packing rounds; vectors in float32.

    Those whose id is in `keep` stay as they are.
    """
    shared: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or id(parameter) in keep or not hasattr(parameter, "pieces"):
                continue  # without pieces: the module filled it itself
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


def load_eager(
    model: Any, backend: NativeBackend, dtype: str, stored: Mapping[str, list[tuple[int, abi.Weight]]]
) -> None:
    """Gives an opened module its weights; matrices in `stored` are used as they are packed."""
    keep = {id(parameter): parts for name, parameter in model.named_parameters() if (parts := stored.get(name))}
    for _, parameter in model.named_parameters():
        if id(parameter) in keep:
            backend.store(parameter, keep[id(parameter)])
    materialise(model, backend.context, TORCH_DTYPES[dtype], keep)


def quantised_matrices(file: ProgramFile) -> dict[str, list[tuple[int, abi.Weight]]]:
    """The program's quantised matrices by parameter name: (first row, weight). A mixed one has several parts."""
    found: dict[str, list[tuple[int, abi.Weight]]] = {}
    mixed = {str(name).split("#")[0] for name, *_ in file.meta["weights"] if "#" in str(name)}
    for name, rows, cols, dtype, layout, offset, nbytes in file.meta["weights"]:
        parameter, _, row = str(name).partition("#")
        if layout == abi.PANELS and (dtype not in (abi.F32, abi.BF16) or parameter in mixed):
            weight = abi.Weight(file.sections["data"][offset : offset + nbytes], rows, cols, dtype, layout)
            found.setdefault(parameter, []).append((int(row or 0), weight))
    return found


def _steering_rows(spans: Iterable[tuple[int, int, Any]], like: torch.Tensor) -> torch.Tensor:
    rows = torch.full_like(like, -0.0)  # changes no bit of what it is added to
    for begin, end, vector in spans:
        if vector.shape != tuple(rows.shape[1:]):
            raise RowError(f"a vector {list(vector.shape)} is added to an activation {rows.shape[1]} wide", begin)
        rows[begin:end] = torch.from_numpy(vector)
    return rows


def contract_of_module(opened: OpenedModel, dtype: str, isa: str, kv_cache_dtype: str) -> ContractDigest:
    """The contract of a module that cannot become a program: its code counts, and the weights as the files have them."""
    whole = hashlib.sha256(repr(sorted(opened.checkpoint.config.items())).encode())
    whole.update(ModelRegistry.registered_digest().encode())
    for name, parameter in opened.module.named_parameters():
        whole.update(name.encode())
        for piece in getattr(parameter, "pieces", ()):
            whole.update(repr((piece.dtype, piece.shape)).encode())
            whole.update(np.ascontiguousarray(piece.data).view(np.uint8).data)
        if not hasattr(parameter, "pieces"):
            whole.update(parameter.detach().contiguous().view(torch.uint8).numpy().data)
    return ContractDigest(
        recipe=abi.recipe(),
        isa=isa,
        weights=whole.hexdigest()[:32],
        formats=(f"{dtype}, eager",),
        kv_cache_dtype=kv_cache_dtype,
        rotary="",
        tokenizer="" if opened.tokenizer is None else opened.tokenizer.fingerprint,
    )


def described(executable: Executable, dtype: str, isa: str, kv_cache_dtype: str) -> dict[str, Any]:
    """What `ModelFacts` says of a module that has no program file to say it."""
    if not isinstance(executable, EagerModel):
        raise TypeError(f"{type(executable).__name__} is no eager model")
    opened, widths = executable.opened, executable.activation_widths()
    return {
        "activations": widths,
        "steerable": widths,
        "contract": contract_of_module(opened, dtype, isa, kv_cache_dtype),
        "tokenizer": memoryview(bundle_json(opened.tokenizer)),
    }


class EagerModel:
    """An executable that runs the module. Gives the same bits as its program, because the ops are the same."""

    def __init__(self, config: EngineConfig, loaded: LoadedModel, context: abi.Context, kv: abi.KVCache) -> None:
        self._backend, self._kv = NativeBackend(context), kv
        self.opened = open_model(resolve_model(config.model), config)
        self.module, self._width = self.opened.module, loaded.config.hidden_size
        stored = {} if loaded.file is None else quantised_matrices(loaded.file)
        load_eager(self.module, self._backend, loaded.dtype, stored)
        self._vocab_size = loaded.config.vocab_size
        self._hidden = torch.empty(0, self._width)
        self._batch: BatchInput | None = None
        self._kept: dict[str, F32] = {}

    def run(self, batch: BatchInput, keep: Iterable[str] = (), steering: Steering = NO_STEERING) -> F32:
        """Forward for all T tokens; logits [L, V] of `batch.logit_rows`. Activations named in `keep` can be read afterwards;
        `steering` is added to activations. Raises as `Executable.run`."""
        names = frozenset(keep)
        self._kept = {}

        def observe(name: str, terms: tuple[Any, ...]) -> torch.Tensor | None:
            added = _steering_rows(steering[name], terms[0]) if name in steering else None
            first = terms[0] if added is None else terms[0] + added
            if name in names:
                self._kept[name] = (first if len(terms) == 1 else first + terms[1]).numpy()
            return added

        observing = observed(self.module, observe) if names or steering else nullcontext()
        with torch.no_grad(), step_scope(Step(self._backend, batch, self._kv)), observing:
            ids, positions = torch.from_numpy(batch.input_ids_T), torch.from_numpy(batch.positions_T)
            hidden = self.module(ids, positions)
            self._hidden = self._checked("forward", hidden, (batch.num_tokens, self._width))
            self._batch = batch
            return self._logits()

    def activation_widths(self) -> dict[str, int]:
        """The names that can be asked for, in the order in which they are computed, and the width of each: of a forward pass of one
        token, whose keys and values are written over by the first request. Shows what is wrong with a module before anyone waits."""
        widths: dict[str, int] = {}

        def observe(name: str, terms: tuple[Any, ...]) -> None:
            if all(
                isinstance(term, torch.Tensor) and term.dtype == torch.float32 and term.dim() == 2 for term in terms
            ):
                widths.setdefault(name, int(terms[0].shape[1]))

        with observed(self.module, observe):
            self.run(single_sequence_batch([0], self._kv.block_size))
        return widths

    def _checked(self, method: str, value: Any, shape: tuple[int, int]) -> torch.Tensor:
        wanted = f"float32 {list(shape)}"
        if not isinstance(value, torch.Tensor):
            raise UnsupportedModelError(f"{self._name}.{method} gave a {type(value).__name__}; it must give {wanted}")
        if value.dtype != torch.float32 or tuple(value.shape) != shape:
            found = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            raise UnsupportedModelError(f"{self._name}.{method} gave {found}; it must give {wanted}")
        return value

    @property
    def _name(self) -> str:
        return type(self.module).__name__

    def activation(self, name: str) -> F32:
        """A kept activation [T, any] of the last batch.

        Raises:
            KeyError: it was not kept.
        """
        return self._kept[name]

    def logits_of(self, rows: npt.NDArray[np.int32]) -> F32:
        """Logits [L, V] of rows of the last batch."""
        if self._batch is None:
            raise RuntimeError("no batch was run yet")
        some = BatchInput(**{**vars(self._batch), "logit_rows": np.ascontiguousarray(rows, np.int32)})
        with torch.no_grad(), step_scope(Step(self._backend, some, self._kv)):
            return self._logits()

    def _logits(self) -> F32:
        rows = gather_rows(self._hidden)
        logits = self._checked("compute_logits", self.module.compute_logits(rows), (len(rows), self._vocab_size))
        array: F32 = logits.contiguous().numpy()
        return array

    def hidden(self) -> F32:
        """Hidden states [T, D] of the last batch."""
        array: F32 = self._hidden.numpy()
        return array

    def close(self) -> None:
        """Frees the cache."""
        self._kv.close()
