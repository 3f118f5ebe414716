"""The C ABI of csrc/include/pellucid.h over ctypes: structures, library lookup, handles. Calls release the GIL."""

from __future__ import annotations

import ctypes
import operator
import os
import sys
from collections.abc import Sequence
from ctypes import (
    POINTER,
    byref,
    c_float,
    c_int64,
    c_void_p,
)
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pellucid.contract.batch import BatchInput
from pellucid.core.structs import (
    MAX_IN,
    MAX_OUT,
    MAX_WEIGHTS,
    NUM_FLOATS,
    SIGNATURES,
    BatchStruct,
    ContextParamsStruct,
    CpuInfoStruct,
    KVParamsStruct,
    ModelParamsStruct,
    OpCallStruct,
    ProgramDescStruct,
    SampleCallStruct,
    VerifyParamsStruct,
    WeightStruct,
)
from pellucid.errors import ConfigError, ErrorItem, NativeError
from pellucid.owners import Home

ABI_VERSION = 1
F32, BF16, F16 = 0, 1, 2
Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, I8 = 3, 4, 5, 6, 7, 8, 9, 10, 11
ROW_MAJOR, PANELS = 0, 1
KV_BLOCK, KV_SLOT = 0, 1
ABORTED = 2  # of the statuses below, the one that is no error
ISA_NAMES = {0: "auto", 1: "portable", 2: "avx2", 3: "avx512"}
ISA_CODES = {name: code for code, name in ISA_NAMES.items()}
STATUS_NAMES = {
    0: "ok",
    1: "no space",
    2: "aborted",
    -1: "invalid batch",
    -2: "invalid argument",
    -3: "out of memory",
    -4: "not supported",
    -5: "internal",
    -6: "invalid sequence",
    -7: "invalid position",
    -8: "empty range",
}
# What an error of the core can be about; 0 is the call as a whole.
ITEM_NAMES: dict[int, ErrorItem] = {1: "token", 2: "sequence", 3: "logit_row", 4: "sample_row"}
# A sanitizer build of the core is chosen by path: there is no other way to reach a test process that is started by pytest.
LIBRARY_VARIABLE = "PELLUCID_LIBRARY"

OP_DTYPE = np.dtype(
    [
        ("kind", "<i4"),
        ("in", "<i4", (MAX_IN,)),
        ("in_col", "<i4", (MAX_IN,)),
        ("in_width", "<i4", (MAX_IN,)),
        ("out", "<i4", (MAX_OUT,)),
        ("out_col", "<i4", (MAX_OUT,)),
        ("out_width", "<i4", (MAX_OUT,)),
        ("weight", "<i4", (MAX_WEIGHTS,)),
        ("i", "<i4", (6,)),
        ("f", "<f4", (NUM_FLOATS,)),
    ]
)
BUFFER_DTYPE = np.dtype([("width", "<i4"), ("domain", "<i4"), ("slot", "<i4"), ("reserved", "<i4")])

SAMPLE_RESULT_DTYPE = np.dtype([("token", "<i4"), ("status", "<i4"), ("max", "<f4"), ("log_sum_exp", "<f4")])

AnyArray = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
F32Array = npt.NDArray[np.float32]


def _candidates() -> list[Path]:
    chosen = os.environ.get(LIBRARY_VARIABLE)
    if chosen:
        return [Path(chosen)]
    names = ("libpellucid.so", "libpellucid.dylib", "pellucid.dll")
    return [Path(folder) / "_lib" / name for folder in sys.modules["pellucid"].__path__ for name in names]


@lru_cache(maxsize=1)
def library() -> Any:
    """The loaded core.

    Raises:
        NativeError: it is not there, cannot be loaded, or has another ABI version.
    """
    paths = _candidates()
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        looked = ", ".join(str(path) for path in paths)
        raise NativeError(
            f"the native core was not found; looked at {looked}. Install the package, or `make build`", -5
        )
    try:
        lib = ctypes.CDLL(str(path))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise NativeError(f"the native core {path.name} cannot be loaded: {error}", -5) from None
    version = lib.pld_abi_version()
    if version != ABI_VERSION:
        raise NativeError(f"the native core has ABI version {version}; this package needs {ABI_VERSION}", -5)
    return lib


def recipe() -> int:
    """The number of the arithmetic that the core computes by: docs/kernels.md."""
    return int(library().pld_recipe())


def check(status: int) -> None:
    """Raises NativeError with the core's text, and the element that it is about, unless the status is ok."""
    if status != 0:
        text = library().pld_last_error()
        message = text.decode(errors="replace") if text else STATUS_NAMES.get(status, f"status {status}")
        index = c_int64(-1)
        item = ITEM_NAMES.get(library().pld_last_error_item(byref(index)))
        raise NativeError(message, status, item, index.value)


def _address(array: AnyArray) -> int:
    return int(array.ctypes.data)


_Params = TypeVar("_Params", ContextParamsStruct, KVParamsStruct, ModelParamsStruct, VerifyParamsStruct)
_PARAMS_INIT: dict[type[ctypes.Structure], str] = {
    ContextParamsStruct: "pld_context_params_init",
    KVParamsStruct: "pld_kv_params_init",
    ModelParamsStruct: "pld_model_params_init",
    VerifyParamsStruct: "pld_verify_params_init",
}


def default_params(struct: type[_Params]) -> _Params:
    """A params struct with the core's defaults."""
    params = struct()
    check(getattr(library(), _PARAMS_INIT[struct])(byref(params), ctypes.sizeof(struct)))
    return params


@dataclass(frozen=True)
class CpuInfo:
    """What the machine has, as the core sees it."""

    physical_cores: int
    logical_cores: int
    has_avx2: bool
    has_avx512: bool
    has_avx512_bf16: bool
    has_avx512_vnni: bool
    best_isa: str
    model_name: str


def cpu_info() -> CpuInfo:
    """Detects the processor."""
    info = CpuInfoStruct(struct_size=ctypes.sizeof(CpuInfoStruct))
    check(library().pld_cpu_info_get(byref(info)))
    return CpuInfo(
        info.physical_cores,
        info.logical_cores,
        bool(info.has_avx2),
        bool(info.has_avx512),
        bool(info.has_avx512_bf16),
        bool(info.has_avx512_vnni),
        ISA_NAMES[info.best_isa],
        info.model_name.decode(errors="replace"),
    )


class _Handle:
    """Owns one handle of the core; `close` may be called again. A process that was forked from its own cannot use it, for the
    core's threads are not there, and does not free it."""

    _destroy = ""

    def __init__(self, handle: int | None) -> None:
        self._home = Home(f"this {type(self).__name__}")
        self._handle = handle

    @property
    def handle(self) -> int:
        """The pointer. Raises NativeError once closed, ForkedError in a forked process."""
        self._home.check()
        if self._handle is None:
            raise NativeError(f"{type(self).__name__} is closed", -2)
        return self._handle

    def close(self) -> None:
        """Frees the handle."""
        if self._handle is not None and not self._home.is_left:
            getattr(library(), self._destroy)(self._handle)
        self._handle = None

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()


class Context(_Handle):
    """A thread pool and the kernels of one instruction set. With `poison` programs fill memory with NaN once nobody may read it
    any more: slow, for tests."""

    _destroy = "pld_context_destroy"

    def __init__(self, num_threads: int = 0, isa: str = "auto", spin_us: int = -1, poison: bool = False) -> None:
        super().__init__(None)
        if isa not in ISA_CODES:
            raise ConfigError(f"isa is {isa!r}; it must be one of: {', '.join(ISA_CODES)}")
        params = default_params(ContextParamsStruct)
        params.num_threads, params.isa, params.spin_us = num_threads, ISA_CODES[isa], spin_us
        params.poison = int(poison)
        handle = c_void_p()
        check(library().pld_context_create(byref(params), byref(handle)))
        self._handle = handle.value

    @property
    def num_threads(self) -> int:
        """Threads that run kernels, the caller's among them."""
        return int(library().pld_context_num_threads(self.handle))

    @property
    def isa(self) -> str:
        """The kernels chosen: portable, avx2 or avx512."""
        return ISA_NAMES[library().pld_context_isa(self.handle)]


def row_bytes(dtype: int, cols: int) -> int:
    """Bytes of one row; 0 when `cols` does not fit the storage type."""
    return int(library().pld_row_bytes(dtype, cols))


def packed_bytes(rows: int, cols: int, dtype: int) -> int:
    """Bytes of a packed [rows, cols] weight; 0 when out of range."""
    return int(library().pld_packed_bytes(rows, cols, dtype))


def convert_bytes(
    context: Context, source: Bytes, source_dtype: int, rows: int, cols: int, target: Bytes, target_dtype: int
) -> None:
    """Converts [rows, cols] of any storage type to row-major F32 or BF16 bytes."""
    lib = library()
    check(
        lib.pld_convert(
            context.handle,
            _address(source),
            source.nbytes,
            source_dtype,
            rows,
            cols,
            _address(target),
            target.nbytes,
            target_dtype,
        )
    )


def convert(context: Context, source: Bytes, source_dtype: int, rows: int, cols: int, target: F32Array) -> None:
    """Converts [rows, cols] of any storage type to float32."""
    convert_bytes(context, source, source_dtype, rows, cols, target.reshape(-1).view(np.uint8), F32)


def pack(
    context: Context,
    source: Bytes,
    source_dtype: int,
    rows: int,
    cols: int,
    row_offset: int,
    target_rows: int,
    target: Bytes,
    target_dtype: int,
) -> None:
    """Packs [rows, cols] into rows [row_offset, row_offset + rows) of a zeroed weight in panels [target_rows, cols]."""
    lib = library()
    check(
        lib.pld_pack(
            context.handle,
            _address(source),
            source.nbytes,
            source_dtype,
            rows,
            cols,
            row_offset,
            target_rows,
            _address(target),
            target.nbytes,
            target_dtype,
        )
    )


def aligned_bytes(nbytes: int, alignment: int = 64) -> Bytes:
    """Zeroed bytes that begin at a multiple of `alignment`."""
    raw = np.zeros(nbytes + alignment, np.uint8)
    start = -_address(raw) % alignment
    return raw[start : start + nbytes]


@dataclass(frozen=True)
class Weight:
    """A weight in memory: `data` is kept alive by whoever uses it."""

    data: Bytes
    rows: int
    cols: int
    dtype: int
    layout: int

    def struct(self) -> WeightStruct:
        """As pld_weight."""
        return WeightStruct(_address(self.data), self.rows, self.cols, self.dtype, self.layout)


class KVCache(_Handle):
    """Keys and values of `n_blocks` blocks of `block_size` positions; with KV_SLOT of single cells that the core manages."""

    _destroy = "pld_kv_destroy"

    def __init__(
        self,
        *,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        block_size: int,
        n_blocks: int,
        dtype: int,
        layout: int = KV_BLOCK,
    ) -> None:
        super().__init__(None)
        params = default_params(KVParamsStruct)
        params.n_layers, params.n_kv_heads, params.head_dim = n_layers, n_kv_heads, head_dim
        params.block_size, params.n_blocks, params.dtype, params.layout = block_size, n_blocks, dtype, layout
        self.n_kv_heads, self.head_dim, self.block_size, self.n_blocks = n_kv_heads, head_dim, block_size, n_blocks
        self.n_layers, self.dtype = n_layers, dtype
        self.nbytes = int(library().pld_kv_bytes(byref(params)))
        handle = c_void_p()
        check(library().pld_kv_create(byref(params), byref(handle)))
        self._handle = handle.value

    def read(self, layer: int, cell: int) -> tuple[F32Array, F32Array]:
        """Keys and values [G, E] of one cell as stored, widened to float32."""
        k, v = (np.empty((self.n_kv_heads, self.head_dim), np.float32) for _ in range(2))
        check(library().pld_kv_read(self.handle, layer, cell, _address(k), _address(v)))
        return k, v


def batch_struct(batch: BatchInput) -> BatchStruct:
    """As pld_batch; the arrays of `batch` must outlive it."""
    return BatchStruct(
        ctypes.sizeof(BatchStruct),
        batch.num_tokens,
        batch.num_seqs,
        len(batch.logit_rows),
        batch.block_tables.shape[1],
        _address(batch.input_ids_T),
        _address(batch.positions_T),
        _address(batch.query_start),
        _address(batch.seq_lens),
        _address(batch.block_tables),
        _address(batch.slot_mapping_T),
        _address(batch.logit_rows),
    )


class Program(_Handle):
    """A program of the core. `weights` are kept alive as long as it lives."""

    _destroy = "pld_program_destroy"

    def __init__(
        self,
        context: Context,
        ops: AnyArray,
        buffers: AnyArray,
        weights: Sequence[Weight],
        *,
        n_forward_ops: int,
        hidden: int,
        logits: int,
        vocab_size: int,
        max_tokens: int,
        max_logit_rows: int,
        kept: Sequence[int] = (),
        inputs: Sequence[int] = (),
    ) -> None:
        super().__init__(None)
        ops, buffers = np.ascontiguousarray(ops), np.ascontiguousarray(buffers)
        if ops.dtype != OP_DTYPE or buffers.dtype != BUFFER_DTYPE:
            raise ValueError(f"ops are {ops.dtype} and buffers {buffers.dtype}; expected pld_op and pld_buffer structs")
        hidden, logits = operator.index(hidden), operator.index(logits)  # a file may say anything
        if not (0 <= hidden < len(buffers) and 0 <= logits < len(buffers)):
            raise ValueError(f"hidden {hidden} and logits {logits} must be buffers, of which there are {len(buffers)}")
        self._context, self._weights = context, list(weights)
        self._width_hidden = int(buffers[hidden]["width"])
        self._width_logits = int(buffers[logits]["width"])
        self._width_kept = {buffer: int(buffers[buffer]["width"]) for buffer in kept if 0 <= buffer < len(buffers)}
        self._width_inputs = {buffer: int(buffers[buffer]["width"]) for buffer in inputs if 0 <= buffer < len(buffers)}
        kept_ids, input_ids = np.array(kept, np.int32), np.array(inputs, np.int32)
        self._rows = 0
        table = (WeightStruct * max(1, len(weights)))(*[weight.struct() for weight in weights])
        desc = ProgramDescStruct(
            ctypes.sizeof(ProgramDescStruct),
            len(ops),
            n_forward_ops,
            len(buffers),
            len(weights),
            _address(ops),
            _address(buffers),
            ctypes.addressof(table),
            hidden,
            logits,
            max_tokens,
            max_logit_rows,
            vocab_size,
            0,
            len(kept_ids),
            _address(kept_ids),
            len(input_ids),
            _address(input_ids),
            OP_DTYPE.itemsize,
            BUFFER_DTYPE.itemsize,
            ctypes.sizeof(WeightStruct),
        )
        handle = c_void_p()
        check(library().pld_program_create(context.handle, byref(desc), byref(handle)))
        self._handle = handle.value

    @property
    def arena_bytes(self) -> int:
        """Bytes of activations."""
        return int(library().pld_program_arena_bytes(self.handle))

    def run(self, kv: KVCache, batch: BatchInput) -> None:
        """One step."""
        check(library().pld_program_run(self.handle, kv.handle, byref(batch_struct(batch))))
        self._rows = batch.num_tokens

    def run_logits(self, rows: npt.NDArray[np.int32]) -> None:
        """Logits of rows of the last step."""
        rows = np.ascontiguousarray(rows, np.int32)
        check(library().pld_program_logits(self.handle, _address(rows), len(rows)))

    def hidden(self) -> F32Array:
        """[T, D] of the last step: a view, valid until the next."""
        return _view(library().pld_program_hidden(self.handle), self._rows, self._width_hidden)

    def kept(self, buffer: int) -> F32Array:
        """[T, any]: a kept buffer of the last step, likewise.

        Raises:
            KeyError: the buffer is not kept.
        """
        return _view(library().pld_program_kept(self.handle, buffer), self._rows, self._width_kept[buffer])

    def input(self, buffer: int, num_rows: int) -> F32Array:
        """[rows, any]: an input buffer, to be written before the next step of at most as many tokens.

        Raises:
            KeyError: the buffer is no input.
        """
        return _view(library().pld_program_input(self.handle, buffer), num_rows, self._width_inputs[buffer])

    def logits(self, num_rows: int) -> F32Array:
        """[L, V] of the last call: a view, valid until the next."""
        return _view(library().pld_program_logits_data(self.handle), num_rows, self._width_logits)


def _view(address: int | None, rows: int, width: int) -> F32Array:
    if address is None or rows == 0:
        return np.zeros((0, width), np.float32)
    return np.ctypeslib.as_array(ctypes.cast(address, POINTER(c_float)), shape=(rows, width))


def op_table(
    kind: int,
    in_widths: Sequence[int | None],
    out_widths: Sequence[int],
    weights: Sequence[object | None] = (),
    ints: Sequence[int] = (),
    floats: Sequence[float] = (),
) -> AnyArray:
    """One op [1] for `run_op`: operands are said to be present (their number) or, where None, absent (-1)."""
    table = np.zeros(1, OP_DTYPE)
    row = table[0]
    row["kind"], row["in"], row["out"], row["weight"] = kind, -1, -1, -1
    for i, width in enumerate(in_widths):
        if width is not None:
            row["in"][i], row["in_width"][i] = i, width
    for i, width in enumerate(out_widths):
        row["out"][i], row["out_width"][i] = i, width
    for i, weight in enumerate(weights):
        row["weight"][i] = -1 if weight is None else i
    row["i"][: len(ints)], row["f"][: len(floats)] = ints, floats
    return table


def run_op(
    context: Context,
    op: AnyArray,
    rows: int,
    inputs: Sequence[tuple[int, int] | None],
    outputs: Sequence[tuple[int, int]],
    weights: Sequence[Weight | None],
    batch: BatchStruct | None = None,
    kv: KVCache | None = None,
) -> None:
    """One op on the caller's memory. `inputs` and `outputs` are (address, row stride in floats)."""
    table = (WeightStruct * MAX_WEIGHTS)()
    call = OpCallStruct(
        struct_size=ctypes.sizeof(OpCallStruct),
        op=_address(op),
        op_size=OP_DTYPE.itemsize,
        rows=rows,
        weights=ctypes.addressof(table),
        weight_size=ctypes.sizeof(WeightStruct),
    )
    for i, operand in enumerate(inputs):
        if operand is not None:
            call.in_[i], call.in_stride[i] = operand
    for i, operand in enumerate(outputs):
        call.out[i], call.out_stride[i] = operand
    for i, weight in enumerate(weights):
        if weight is not None:
            table[i] = weight.struct()
    if batch is not None:
        call.batch = ctypes.addressof(batch)
    if kv is not None:
        call.kv = kv.handle
    check(library().pld_op_run(context.handle, byref(call)))


def verify_file(descriptor: int, bytes_per_second: int, stop: ctypes.c_int32, *, idle: bool) -> int | None:
    """Reads an open program file against its checksums: the first bad block, or None. It ends early when `stop` is set.

    Raises:
        NativeError: the file has no checksums, or the system failed.
    """
    params, bad = default_params(VerifyParamsStruct), ctypes.c_int64()
    params.bytes_per_second, params.stop, params.idle = bytes_per_second, ctypes.addressof(stop), idle
    status = library().pld_model_verify(descriptor, byref(params), byref(bad))
    if bad.value < 0 and status != ABORTED:
        check(status)
    return None if bad.value < 0 else bad.value


def sample(context: Context, logits: F32Array, rows: Sequence[int], results: AnyArray) -> None:
    """One token for each row of `logits` [L, V]; `rows` are addresses of SampleRowStruct. Writes `results` [L]."""
    addresses = (c_void_p * len(rows))(*rows)
    call = SampleCallStruct(
        ctypes.sizeof(SampleCallStruct),
        _address(logits),
        logits.strides[0] // 4 if len(rows) > 1 else logits.shape[1],
        logits.shape[1],
        len(rows),
        ctypes.addressof(addresses),
        _address(results),
        results.itemsize,
    )
    check(library().pld_sample_run(context.handle, byref(call)))
