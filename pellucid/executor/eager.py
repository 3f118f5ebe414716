"""Eager execution: the module itself, op by op on torch tensors, with the kernels of the program. Needs torch."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Container, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode, resolve_name

from pellucid.api.hidden_states import NO_STEERING, Steering
from pellucid.config import EngineConfig
from pellucid.contract.batch import BatchInput, single_sequence_batch
from pellucid.contract.executor import F32, Executable
from pellucid.contract.facts import ContractDigest
from pellucid.core import abi
from pellucid.errors import RowError, UnsupportedModelError, WeightFormatError
from pellucid.executor.loader import LoadedModel, OpenedModel, bundle_json, open_model
from pellucid.models.registry import source_of
from pellucid.ops import gather_rows
from pellucid.ops.dispatch import Step, step_scope
from pellucid.ops.native import NativeBackend
from pellucid.ops.spec import OpSpec
from pellucid.program.file import ProgramFile
from pellucid.program.observe import observed
from pellucid.weights.hub import resolve_model

_MAX_NAMED = 8  # functions in a line of the log
# What layers ask of tensors.
_NOT_FOREIGN = {f"torch.Tensor.{name}" for name in ("shape", "dtype", "device", "split")}

_log = logging.getLogger(__name__)

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def materialise(model: Any, context: abi.Context, dtype: torch.dtype, keep: Container[int] = ()) -> None:
    """Gives the parameters of a loaded model their values: matrices in `dtype`, rounded as packing rounds; vectors in float32.

    Those whose id is in `keep` stay as they are.
    """
    shared: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or id(parameter) in keep:
                continue
            if not hasattr(parameter, "pieces"):  # the module filled it itself
                if parameter.is_meta:
                    raise WeightFormatError(f"parameter {name!r} was given no values by load_weights")
                continue
            if id(parameter) not in shared:
                kind = torch.float32 if parameter.dim() < 2 else dtype
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
    for name, parameter in opened.module.named_parameters():
        whole.update(name.encode())
        for piece in getattr(parameter, "pieces", ()):
            whole.update(repr((piece.dtype, piece.shape)).encode())
            whole.update(np.ascontiguousarray(piece.data).view(np.uint8).data)
        if not hasattr(parameter, "pieces"):
            whole.update(_bytes_of(parameter))
    for name, buffer in opened.module.named_buffers():
        whole.update(name.encode() + _bytes_of(buffer))
    bundle = bundle_json(opened.tokenizer)
    return ContractDigest(
        recipe=abi.recipe(),
        isa=isa,
        weights=whole.hexdigest()[:32],
        formats=(f"{dtype}, eager",),
        kv_cache_dtype=kv_cache_dtype,
        rotary="",
        ops=hashlib.sha256(source_of(type(opened.module)).encode()).hexdigest()[:32],
        tokenizer="" if opened.tokenizer is None else hashlib.sha256(bundle).hexdigest()[:32],
    )


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


class _Calls(TorchFunctionMode):  # type: ignore[misc]  # torch is untyped here
    """Notes the functions of torch that are called outside ops."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, None] = {}
        self.is_in_op = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = (resolve_name(func) or func.__name__).removesuffix(".__get__")
        if not self.is_in_op and name not in _NOT_FOREIGN:
            self.names.setdefault(name)
        return func(*args, **(kwargs or {}))

    def __str__(self) -> str:
        names = list(self.names)
        return ", ".join([*names[:_MAX_NAMED], *["…"] * (len(names) > _MAX_NAMED)])


def described(executable: Executable, loaded: LoadedModel, isa: str, kv_cache_dtype: str) -> dict[str, Any]:
    """What `ModelFacts` says of a module that has no program file to say it. The log has one line of what its module calls."""
    if not isinstance(executable, EagerModel):
        raise TypeError(f"{type(executable).__name__} is no eager model")
    calls = _Calls()
    opened, widths = executable.opened, executable.activation_widths(calls)
    _log.warning(
        "%s: it runs eagerly%s; which bits such operations give may depend on the batch",
        loaded.why_eager,
        f", calling {calls}" if calls.names else "",
    )
    whole = {name.removeprefix("model.") for name, _ in opened.module.named_modules()}
    return {
        "activations": widths,
        # what is a part of what a module gives stands in one buffer with the others
        "steerable": {name: width for name, width in widths.items() if name in whole},
        "contract": contract_of_module(opened, loaded.dtype, isa, kv_cache_dtype),
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
        self.module.eval()
        self._vocab_size = loaded.config.vocab_size
        self._hidden = torch.empty(0, self._width)
        self._batch: BatchInput | None = None
        self._kept: dict[str, F32] = {}

    def run(self, batch: BatchInput, keep: Iterable[str] = (), steering: Steering = NO_STEERING) -> F32:
        """Forward for all T tokens; logits [L, V] of `batch.logit_rows`. Activations named in `keep` can be read afterwards;
        `steering` is added to activations. Raises as `Executable.run`."""
        names = frozenset(keep)
        self._kept = {}
        seen: set[str] = set()

        def observe(name: str, terms: tuple[Any, ...]) -> torch.Tensor | None:
            if name in seen:  # a module that is called again: its first call has the name, as in a program
                return None
            seen.add(name)
            added = _steering_rows(steering[name], terms[0]) if name in steering else None
            first = terms[0] if added is None else terms[0] + added
            if name in names:
                kept = first if len(terms) == 1 else first + terms[1]
                self._kept[name] = kept.clone(memory_format=torch.contiguous_format).numpy()  # the module may change it
            return added

        observing = observed(self.module, observe) if names or steering else nullcontext()
        with torch.no_grad(), step_scope(Step(self._backend, batch, self._kv)), observing:
            ids, positions = torch.from_numpy(batch.input_ids_T), torch.from_numpy(batch.positions_T)
            hidden = self.module(ids, positions)
            self._hidden = self._checked("forward", hidden, (batch.num_tokens, self._width))
            self._batch = batch
            return self._logits()

    def activation_widths(self, calls: _Calls) -> dict[str, int]:
        """The names that can be asked for, in the order in which they are computed, and the width of each: of a forward pass of one
        token, whose keys and values are written over by the first request. Shows what is wrong with a module before anyone waits, and tells
        `calls` what it calls."""
        widths: dict[str, int] = {}

        def observe(name: str, terms: tuple[Any, ...]) -> None:
            if all(
                isinstance(term, torch.Tensor) and term.dtype == torch.float32 and term.dim() == 2 for term in terms
            ):
                widths.setdefault(name, int(terms[0].shape[1]))

        def run(spec: OpSpec, step: Step) -> tuple[Any, ...]:
            calls.is_in_op = True
            try:
                return self._backend(spec, step)
            finally:
                calls.is_in_op = False

        batch = single_sequence_batch([0], self._kv.block_size)
        self.run(batch)
        ids, positions = torch.from_numpy(batch.input_ids_T), torch.from_numpy(batch.positions_T)
        with torch.no_grad(), step_scope(Step(run, batch, self._kv)), calls:
            with observed(self.module, observe):
                hidden = self.module(ids, positions)
            self.module.compute_logits(gather_rows(hidden))
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
        array: F32 = self._hidden.contiguous().numpy()
        return array

    def close(self) -> None:
        """Frees the cache."""
        self._kv.close()
