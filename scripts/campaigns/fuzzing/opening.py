"""A file that may be hostile, opened as callers open it, and run for a few tokens."""

from __future__ import annotations

import ctypes
import json
from ctypes import byref, c_void_p, sizeof
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing import fences
from fuzzing.core import INVALID_ARGUMENT, INVALID_BATCH, NO_SPACE, OK, Core
from fuzzing.draws import Draw, chars, ints
from fuzzing.fences import Fences
from fuzzing.frame import FindingError
from pellucid.config import EngineConfig
from pellucid.contract.batch import single_sequence_batch
from pellucid.core import abi, structs
from pellucid.errors import NativeError, PellucidError
from pellucid.executor import loader
from pellucid.program import file as program_file
from pellucid.program import runner
from pellucid.program.builder import PLAN_DTYPE, WEIGHT_DTYPE

_MAX_CACHE = 2**24  # bytes
_MAX_ARENA = 2**25
_ROWS = (8, 4)  # max_tokens, max_logit_rows

PLANTS = {
    "untyped-error": "the reader lets errors of JSON through",
    "unchecked-size": "the reader does not compare a weight's shape with its bytes",
    "long-read": "weights are read to 64 bytes behind their end (seen under the address sanitizer alone)",
    "hang": "a file that is cut is read for ever",
    "crash": "a section that lies outside of the file is read",
}


def plant_fault(name: str | None) -> None:
    """Puts a fault into the Python reader."""
    if name == "untyped-error":
        vars(program_file)["json"] = _LaxJson
    elif name == "unchecked-size":
        vars(runner)["_stored_bytes"] = _AnySize
    elif name == "long-read":
        vars(fences)["SHORTER"] = 64
    elif name in ("hang", "crash"):
        real = program_file.open_program_file

        def opened(path: Path) -> program_file.ProgramFile:
            try:
                return real(path)
            except PellucidError as error:
                if "lies outside" in str(error):
                    _hang() if name == "hang" else ctypes.string_at(8, 1)
                raise

        vars(loader)["open_program_file"] = vars(program_file)["open_program_file"] = opened


class _LaxJson:
    dumps = staticmethod(json.dumps)

    @staticmethod
    def loads(text: bytes) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise LookupError(str(error)) from None


class _AnySize:
    """Equal to any number of bytes."""

    def __init__(self, *_: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def _hang() -> None:
    while True:
        pass


# ---- the Python reader ---------------------------------------------------------------------------------------------


def _typed(error: PellucidError) -> str:
    if not str(error):
        raise FindingError(f"{type(error).__name__} without a text")
    return "refused"


def open_program(draw: Draw, path: Path, context: abi.Context, core: Core) -> str:
    """The program and its texts alone: refused with a typed error, opened, or run."""
    try:
        file = program_file.open_program_file(path)
        for name in ("config", "generation_config", "tokenizer"):
            file.text(name)
        shape = _shape_of(file)
        program = runner.load_program(context, file, *_ROWS)
    except PellucidError as error:
        return _typed(error)
    return _run_fenced(path, program, shape)


def open_model(draw: Draw, path: Path, context: abi.Context, core: Core) -> str:
    """As the engine opens a compiled model, configuration and tokenizer among it."""
    try:
        model = loader.load_model(EngineConfig(model=str(path)), context)
        program = runner.load_program(context, model.file, *_ROWS)
    except PellucidError as error:
        return _typed(error)
    config = model.config
    return _run_fenced(path, program, (config.num_hidden_layers, config.num_key_value_heads, config.head_dim))


def _shape_of(file: program_file.ProgramFile) -> tuple[int, int, int]:
    """Layers, G and E of a cache, by the plan."""
    plan = file.sections["plan"].tobytes() if "plan" in file.sections else b""
    rows = np.frombuffer(plan[: PLAN_DTYPE.itemsize], PLAN_DTYPE) if len(plan) >= PLAN_DTYPE.itemsize else ()
    return tuple(int(rows[0][name]) for name in ("n_layers", "n_kv_heads", "head_dim")) if len(rows) else (1, 1, 2)


def _run_fenced(path: Path, program: abi.Program, shape: tuple[int, int, int]) -> str:
    for weight in program._weights:
        _check_weight(weight.rows, weight.cols, weight.dtype, weight.layout, weight.data.nbytes, "the Python reader")
    places = [(_address(w.data), w.data.nbytes) for w in program._weights]
    around = Fences(path, places)
    try:
        return _run_in_python(program, shape)
    finally:
        around.close()
        program.close()


def _address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def _check_weight(rows: int, cols: int, dtype: int, layout: int, nbytes: int, reader: str) -> None:
    needed = abi.packed_bytes(rows, cols, dtype) if layout == abi.PANELS else rows * abi.row_bytes(dtype, cols)
    if needed != nbytes:
        raise FindingError(f"{reader} accepted a weight [{rows}, {cols}] of {nbytes} bytes; it takes {needed}")


def _run_in_python(program: abi.Program, shape: tuple[int, int, int]) -> str:
    layers, g, e = shape
    if program.arena_bytes > _MAX_ARENA:
        return "opened"
    try:
        kv = abi.KVCache(n_layers=layers, n_kv_heads=g, head_dim=e, block_size=16, n_blocks=2, dtype=abi.BF16)
    except NativeError as error:
        return _typed(error)
    try:
        if kv.nbytes > _MAX_CACHE:
            return "opened"
        program.run(kv, single_sequence_batch([1, 2, 0], 16))
        program.run(kv, single_sequence_batch([1], 16, start=3))
        np.array(program.logits(1))
        np.array(program.hidden())
    except NativeError as error:  # a cache of another shape, or a smaller vocabulary
        _typed(error)
        return "opened"
    finally:
        kv.close()
    return "ran"


READERS = {"program": open_program, "model": open_model}


# ---- the core ------------------------------------------------------------------------------------------------------


def open_in_core(draw: Draw, path: Path, context: abi.Context, core: Core) -> str:
    """As a C program opens it."""
    params, out = structs.ModelParamsStruct(sizeof(structs.ModelParamsStruct), *_ROWS), c_void_p()
    if core.call("pld_model_open", context.handle, bytes(path), byref(params), byref(out)) != OK:
        return "refused"
    around = Fences(path, _weights_in(path))
    try:
        return _run_in_core(draw, core, out)
    finally:
        around.close()
        core.get("pld_model_close", out)


def _weights_in(path: Path) -> list[tuple[int, int]]:
    """(offset in the file, bytes) of the weights by the index that the core reads; of an accepted file they agree."""
    content = path.read_bytes()
    index = np.frombuffer(content[16 : 16 + 16 * len(program_file.INDEXED)], "<u8").reshape(-1, 2).tolist()
    (at, count), (data, _) = index[3], index[4]
    places = []
    for row in np.frombuffer(content[at : at + count], WEIGHT_DTYPE):
        shape = (int(row["rows"]), int(row["cols"]), int(row["dtype"]), int(row["layout"]))
        _check_weight(*shape, int(row["bytes"]), "the core")
        places.append((data + int(row["offset"]), int(row["bytes"])))
    return places


def _run_in_core(draw: Draw, core: Core, model: c_void_p) -> str:
    info = structs.ModelInfoStruct(struct_size=sizeof(structs.ModelInfoStruct))
    core.expect(core.call("pld_model_info_get", model, byref(info)), OK, "status of pld_model_info_get")
    program = core.get("pld_model_program", model)
    if core.get("pld_program_arena_bytes", program) > _MAX_ARENA:
        return "opened"
    is_slot = draw.chance(0.6)
    kv = structs.KVParamsStruct(sizeof(structs.KVParamsStruct), info.n_layers, info.n_kv_heads, info.head_dim)
    kv.block_size, kv.n_blocks, kv.dtype, kv.layout = 1 if is_slot else 16, 32 if is_slot else 2, info.kv_dtype, is_slot
    if core.get("pld_kv_bytes", byref(kv)) > _MAX_CACHE:
        return "opened"
    cache = c_void_p()
    if core.call("pld_kv_create", byref(kv), byref(cache)) != OK:
        return "opened"
    try:
        ran = _decode(core, program, cache, [1, 0, 2], 0, is_slot) and _decode(core, program, cache, [1], 3, is_slot)
        if ran and is_slot:
            core.call("pld_seq_add", program, cache, 0, 1, 3, 7)
            _decode(core, program, cache, [2], 11, is_slot)
        return "ran" if ran else "opened"
    finally:
        core.get("pld_kv_destroy", cache)


def _decode(core: Core, program: int, cache: c_void_p, tokens: list[int], start: int, is_slot: bool) -> bool:
    positions = list(range(start, start + len(tokens)))
    arrays = {"tokens": ints(tokens), "positions": ints(positions), "seq_ids": ints([0] * len(tokens))}
    arrays["logits"] = chars([1] * len(tokens))
    if not is_slot:
        arrays["slot_mapping"] = (ctypes.c_int64 * len(tokens))(*positions)
        arrays["block_tables"] = ints([0, 1] * len(tokens))
        arrays["context_lens"] = ints([position + 1 for position in positions])
    batch = structs.DecodeBatchStruct(sizeof(structs.DecodeBatchStruct), len(tokens), 0 if is_slot else 2)
    for name, array in arrays.items():
        setattr(batch, name, ctypes.addressof(array))
    status = core.call("pld_decode", program, cache, byref(batch))
    if status not in (OK, INVALID_ARGUMENT, INVALID_BATCH, NO_SPACE):
        core.wrong(f"status of pld_decode is {status}")
    return status == OK
