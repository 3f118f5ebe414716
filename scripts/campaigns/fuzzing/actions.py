"""Calls on the objects of a world, each with what must come of it: steps, sequences, rows, making and ending of objects."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_void_p, sizeof
from functools import partial
from pathlib import Path

from fuzzing import batches
from fuzzing.core import ABORTED, INVALID_ARGUMENT, INVALID_BATCH, INVALID_SEQ, NOT_SUPPORTED, OK, OUT_OF_MEMORY
from fuzzing.draws import EDGES_32, INT32_MAX, INT32_MIN, MAX_STRUCT_SIZE, Draw, ints, tail, with_tail
from fuzzing.programs import Recipe, damaged, describe_program
from fuzzing.world import SEQS, Cache, Program, World
from pellucid.core import abi, structs

_FLAGS = (ctypes.c_int32 * 3)(0, 1, -1)
_KV_SIZE = sizeof(structs.KVParamsStruct)
_INITS: dict[str, type[ctypes.Structure]] = {
    "pld_context_params_init": structs.ContextParamsStruct,
    "pld_kv_params_init": structs.KVParamsStruct,
    "pld_model_params_init": structs.ModelParamsStruct,
    "pld_verify_params_init": structs.VerifyParamsStruct,
}
_MAX_ARENA = 2**24  # a program with more is not run
_OLDEST_KV = structs.KVParamsStruct.layout.offset


# ---- steps ---------------------------------------------------------------------------------------------------------


def decode(world: World) -> None:
    """pld_decode, good or damaged, on a cache that fits or does not."""
    draw, core = world.draw, world.core
    program, cache = draw.one(world.live_programs), draw.one(world.live_caches)
    good = batches.good_slot if cache.model is not None else batches.good_block
    batch = good(draw, program, cache)
    if draw.chance(0.35):
        for _ in range(draw.one((1, 1, 2))):
            batches.damage_decode(draw, batch)
    if draw.chance(0.02):
        _null_decode(world, program, cache, byref(batch.struct(None)[0]))
        return
    expected = batches.expected_decode(batch, program, cache)
    abort_at = _abort_address(world, program, batch.abort)
    struct, memory = batch.struct(abort_at)
    was = ctypes.string_at(abort_at, 4) if batch.abort == "way" else b""
    if batch.abort == "way":  # what the program computes there is no 0, most times
        ctypes.memset(abort_at, 0, 4)
    core.about(batch)
    status = core.call("pld_decode", program.handle, cache.handle, byref(struct))
    if status not in (OK, ABORTED):
        ctypes.memmove(abort_at, was, len(was))
    if expected is not None:
        core.expect(status, expected, "status of pld_decode")
    elif status not in (OK, ABORTED):
        core.wrong(f"status of pld_decode with a flag that the step sets: {status} ({core.last_text()})")
    if status == OK:
        is_known = cache.is_known(program.recipe)
        _accept_decode(world, program, cache, batch)
        struct.abort = None
        rows = (batch.n_tokens, sum(program.decoded or ()))
        found = world.outputs(program, *rows) if is_known else None
        world.accepted.append(partial(_decode_again, program.index, cache.index, struct, memory, rows, found))
    elif status == ABORTED and batch.abort == "way":
        cache.is_torn = cache.is_torn or cache.model is not None
        program.rows_left, program.decoded, program.snapshot = 0, [False] * batch.n_tokens, None
    _check_rows(world, program)
    world.check_sequences(cache)
    world.check_refused(status, cache, program)


def _abort_address(world: World, program: Program, abort: str) -> int | None:
    if abort == "way":
        return int(world.core.peek("pld_program_hidden", program.handle))
    return {"never": None, "no": ctypes.addressof(_FLAGS)}.get(abort, ctypes.addressof(_FLAGS) + 4)


def _accept_decode(world: World, program: Program, cache: Cache, batch: batches.DecodeDraw) -> None:
    n = batch.n_tokens
    if cache.model is not None:
        positions = None if batch.positions is None else batch.positions[:n]
        world.core.expect(
            cache.model.decode(batch.seq_ids[:n], positions, batches.more_of(batch)), OK, "the plain model's status"
        )
    else:
        cache.known.update(batch.seq_ids[:n])
    cache.wrote(program.recipe)
    program.rows_left, program.decoded = n, batches.wanted_rows(batch)


def _decode_again(
    program: int,
    cache: int,
    struct: structs.DecodeBatchStruct,
    memory: object,
    rows: tuple[int, int],
    found: bytes | None,
    twin: World,
) -> None:
    handles = (twin.programs[program].handle, twin.caches[cache].handle)
    twin.core.expect(twin.core.call("pld_decode", *handles, byref(struct)), OK, "status of a decode done again")
    if found is not None:
        expected = twin.outputs(twin.programs[program], *rows)
        twin.expect_floats(found, expected, "a decode among refused calls, and the same without them on one thread")
    del memory  # it was needed until now


def _null_decode(world: World, program: Program, cache: Cache, struct: object) -> None:
    arguments = [program.handle, cache.handle, struct]
    place = world.draw.below(3)
    arguments[place] = None
    status = world.core.call("pld_decode", *arguments)
    expected = INVALID_ARGUMENT if place < 2 or not cache.fits(program.recipe) else INVALID_BATCH
    world.core.expect(status, expected, "status of pld_decode with a null")


def _check_rows(world: World, program: Program) -> None:
    """Rows are there exactly where the last decode left them."""
    peek, wanted = world.core.peek, program.decoded
    if wanted is None:
        return
    for index in (*range(len(wanted)), len(wanted), world.draw.one((-1, INT32_MIN, INT32_MAX))):
        is_row = 0 <= index < program.rows_left
        expected = (is_row, is_row and wanted[index])
        found = tuple(peek(name, program.handle, index) is not None for name in ("pld_hidden_of", "pld_logits_of"))
        world.core.expect(found, expected, f"whether row {index} has a hidden state, and logits")


def run(world: World) -> None:
    """pld_program_run; a SLOT cache, which refuses it, is tried now and then."""
    draw, core = world.draw, world.core
    program, cache = draw.one(world.live_programs), draw.one(world.live_caches)
    if cache.model is not None and draw.chance(0.8):
        cache = next((other for other in world.live_caches if other.model is None), cache)
    batch = batches.good_run(draw, program, cache)
    if draw.chance(0.4):
        batches.damage_run(draw, batch)
    expected = batches.expected_run(batch, program, cache)
    struct = batch.struct()
    core.about(batch)
    status = core.call("pld_program_run", program.handle, cache.handle, byref(struct))
    core.expect(status, expected, "status of pld_program_run")
    if status == OK:
        program.rows_left, program.decoded = batch.n_tokens, None
        rows = (batch.n_tokens, batch.n_logit_rows)
        found = world.outputs(program, *rows)
        world.accepted.append(partial(_run_again, program.index, cache.index, struct, batch.memory, rows, found))
    else:
        _check_rows(world, program)
    world.check_sequences(cache)
    world.check_refused(status, cache, program)


def _run_again(
    program: int,
    cache: int,
    struct: structs.BatchStruct,
    memory: object,
    rows: tuple[int, int],
    found: bytes,
    twin: World,
) -> None:
    handles = (twin.programs[program].handle, twin.caches[cache].handle)
    twin.core.expect(twin.core.call("pld_program_run", *handles, byref(struct)), OK, "status of a step done again")
    expected = twin.outputs(twin.programs[program], *rows)
    twin.expect_floats(found, expected, "a step among refused calls, and the same without them on one thread")
    del memory


def logits_again(world: World) -> None:
    """pld_program_logits: of rows of the last step the same bits as that step gave."""
    draw, core = world.draw, world.core
    program = draw.one(world.live_programs)
    most = min(program.max_logit_rows, 64)
    count = draw.one((1, 1, 2, 3, most, most + 1, 0, -1, INT32_MIN))
    rows = [draw.below(max(program.rows_left, 1)) for _ in range(max(count, 1))]
    if draw.chance(0.2):
        rows[draw.below(len(rows))] = draw.hostile(program.rows_left)
    before = {}
    if program.decoded is not None:
        for row in rows:
            address = core.peek("pld_logits_of", program.handle, row)
            if address:
                before[row] = ctypes.string_at(address, 4 * program.vocab_size)
    is_good = 1 <= count <= program.max_logit_rows and all(0 <= row < program.rows_left for row in rows[:count])
    status = core.call("pld_program_logits", program.handle, ints(rows), count)
    core.expect(status, OK if is_good else INVALID_BATCH, "status of pld_program_logits")
    if status != OK:
        return
    data = core.get("pld_program_logits_data", program.handle)
    for place, row in enumerate(rows[:count]):
        if row in before:
            found = ctypes.string_at(data + 4 * place * program.vocab_size, 4 * program.vocab_size)
            world.expect_floats(found, before[row], f"logits of row {row}, asked for again")
    if program.decoded is not None:
        program.decoded = [False] * len(program.decoded)
    _check_rows(world, program)
    program.snapshot = world.rows_of(program)


# ---- sequences -----------------------------------------------------------------------------------------------------


def _positions(draw: Draw) -> tuple[int, int]:
    if draw.chance(0.2):
        return draw.one(EDGES_32), draw.one(EDGES_32)
    return draw.between(-1, 8), draw.between(-1, 14)


def _seq(draw: Draw) -> int:
    return draw.one(SEQS[: draw.one((2, 4, 6))]) if draw.chance(0.93) else draw.one(EDGES_32)


def change_sequences(world: World) -> None:
    """pld_seq_cp, rm, add, keep, pld_request_free, pld_kv_reset, against the plain model."""
    draw, core = world.draw, world.core
    cache = draw.one(world.live_caches)
    kind = draw.one(("cp", "cp", "rm", "rm", "add", "add", "add", "keep", "free"))
    kind = "reset" if draw.chance(0.03) else kind
    seq, other, (p0, p1) = _seq(draw), _seq(draw), _positions(draw)
    program = draw.one(world.live_programs)
    if draw.chance(0.02):
        _null_sequences(world, program, seq)
        return
    if kind == "cp":
        arguments: tuple[int, ...] = (other, seq, p0, p1)
    elif kind == "rm":
        arguments = (seq, p0, p1)
    elif kind == "add":
        arguments = (seq, p0, p1, draw.one(EDGES_32) if draw.chance(0.2) else draw.between(-5, 6))
    else:
        arguments = () if kind == "reset" else (seq,)
    status = _change(world, kind, program, cache, arguments)
    expected = _expected_change(kind, cache, program, arguments, status)
    core.expect(status, expected, f"status of {kind}{arguments}")
    if status == OK:
        world.accepted.append(partial(_change_again, kind, program.index, cache.index, arguments))
    world.check_sequences(cache)
    world.check_refused(status, cache, program)


def _change(world: World, kind: str, program: Program, cache: Cache, arguments: tuple[int, ...]) -> int:
    if kind == "add":
        return world.core.call("pld_seq_add", program.handle, cache.handle, *arguments)
    name = {"free": "pld_request_free", "reset": "pld_kv_reset"}.get(kind, f"pld_seq_{kind}")
    return world.core.call(name, cache.handle, *arguments)


def _change_again(kind: str, program: int, cache: int, arguments: tuple[int, ...], twin: World) -> None:
    status = _change(twin, kind, twin.programs[program], twin.caches[cache], arguments)
    twin.core.expect(status, OK, f"status of {kind}{arguments} done again")


def _expected_change(kind: str, cache: Cache, program: Program, arguments: tuple[int, ...], status: int) -> int:
    """The plain model's status; what it accepts has happened there. `status` is the core's."""
    if kind == "reset":
        cache.known.clear()
        if cache.model is not None:
            cache.model.reset()
        return OK
    if cache.model is None:
        if kind != "free":
            return NOT_SUPPORTED
        if arguments[0] in cache.known:
            cache.known.discard(arguments[0])
            return OK
        return INVALID_SEQ
    if kind == "add":
        if not cache.fits(program.recipe):
            return INVALID_ARGUMENT
        can_rotate = program.recipe.can_shift
        can_rotate = status != NOT_SUPPORTED if can_rotate is None else can_rotate
        return int(cache.model.add(*arguments, can_rotate=can_rotate))
    return int(getattr(cache.model, kind)(*arguments))


def _null_sequences(world: World, program: Program, seq: int) -> None:
    core = world.core
    calls = (
        ("pld_seq_cp", (None, 1, seq, 0, -1)),
        ("pld_seq_rm", (None, seq, 0, -1)),
        ("pld_seq_add", (program.handle, None, seq, 0, -1, 1)),
        ("pld_seq_add", (None, world.draw.one(world.live_caches).handle, seq, 0, -1, 1)),
        ("pld_seq_keep", (None, seq)),
        ("pld_request_free", (None, seq)),
    )
    for name, arguments in calls:
        core.expect(core.call(name, *arguments), INVALID_ARGUMENT, f"status of {name} with a null")
    core.expect(core.call("pld_kv_reset", None), INVALID_ARGUMENT, "status of pld_kv_reset with a null")
    stats = structs.KVStatsStruct(sizeof(structs.KVStatsStruct))
    core.expect(core.call("pld_kv_stats_get", None, byref(stats)), INVALID_ARGUMENT, "statistics of no cache")
    core.expect(core.get("pld_seq_pos_max", None, seq), -1, "last position in no cache")
    core.expect(core.get("pld_kv_free_cells", None), -1, "free cells of no cache")


# ---- looking -------------------------------------------------------------------------------------------------------


def look(world: World) -> None:
    """Functions that change nothing, with any arguments."""
    draw, core = world.draw, world.core
    program, cache, context = draw.one(world.live_programs), draw.one(world.live_caches), draw.one(world.contexts)
    kind = draw.below(6)
    if kind == 0:
        _read_cell(world, cache)
    elif kind == 1:
        buffer = draw.below(len(program.recipe.buffers)) if draw.chance(0.8) else draw.one(EDGES_32)
        core.get("pld_program_kept", program.handle, buffer)
        core.get("pld_program_input", program.handle, buffer)
        core.get("pld_program_arena_bytes", program.handle)
    elif kind == 2:
        core.expect(core.get("pld_context_num_threads", context.handle), context.threads, "threads of the context")
        core.expect(core.get("pld_context_isa", context.handle), context.isa, "instruction set of the context")
    elif kind == 3:
        for name in ("pld_program_hidden", "pld_program_logits_data", "pld_model_program"):
            core.expect(core.get(name, None), None, f"{name} of null")
        for name in ("pld_logits_of", "pld_hidden_of", "pld_program_kept", "pld_program_input"):
            core.expect(core.get(name, None, draw.one(EDGES_32)), None, f"{name} of null")
        core.expect(core.get("pld_program_arena_bytes", None), 0, "arena of null")
        core.expect(core.get("pld_context_num_threads", None), 0, "threads of null")
        core.expect(core.get("pld_context_isa", None), 0, "instruction set of null")
        for name in ("pld_context_destroy", "pld_model_close", "pld_kv_destroy", "pld_program_destroy"):
            core.get(name, None)
        _init_params(world)
    elif kind == 4:
        core.expect(core.get("pld_abi_version"), abi.ABI_VERSION, "ABI version")
        core.expect(core.get("pld_recipe"), abi.recipe(), "recipe")
        size = sizeof(structs.CpuInfoStruct)
        info = structs.CpuInfoStruct(struct_size=draw.one((size, size + 24, 0, 8, 4097, 2**63)))
        is_good = size <= info.struct_size <= MAX_STRUCT_SIZE
        info = with_tail(info, bytes(24))
        status = core.call("pld_cpu_info_get", byref(info) if draw.chance(0.9) else None)
        core.expect(status in (OK, INVALID_ARGUMENT) and (is_good or status != OK), True, "status of pld_cpu_info_get")
    elif program.model is not None:
        _model_info(world, program)


def _init_params(world: World) -> None:
    """pld_*_params_init of any size: what is made is taken, and nothing is written behind it."""
    draw, core = world.draw, world.core
    name, struct = draw.one(sorted(_INITS.items()))
    size = draw.one((0, 8, 4096, 4097, 2**63)) if draw.chance(0.3) else sizeof(struct) + draw.below(40)
    params = with_tail(struct(), bytes([7] * MAX_STRUCT_SIZE))
    status = core.call(name, byref(params), size)
    is_good = sizeof(struct) <= size <= MAX_STRUCT_SIZE
    core.expect(status, OK if is_good else INVALID_ARGUMENT, f"status of {name} for {size} bytes")
    if is_good:
        core.expect(params.struct_size, size, "the size of initialised params")
        seen = ctypes.string_at(ctypes.addressof(params), sizeof(struct) + MAX_STRUCT_SIZE)
        core.expect(any(seen[sizeof(struct) : size]), False, "whether unknown fields were filled")
        core.expect(set(seen[max(size, sizeof(struct)) :]) <= {7}, True, "whether the memory behind them is untouched")


def _read_cell(world: World, cache: Cache) -> None:
    draw, core, p = world.draw, world.core, cache.params
    layer, cell = draw.below(p.n_layers), draw.below(cache.n_cells)
    if draw.chance(0.5):
        layer, cell = draw.hostile(layer), draw.hostile64(cell)
    k, v = ((ctypes.c_float * (p.n_kv_heads * p.head_dim))() for _ in range(2))
    arguments = [cache.handle, layer, cell, k, v]
    is_good = 0 <= layer < p.n_layers and 0 <= cell < cache.n_cells
    if draw.chance(0.1):
        arguments[draw.one((0, 3, 4))], is_good = None, False
    status = core.call("pld_kv_read", *arguments)
    core.expect(status, OK if is_good else INVALID_ARGUMENT, "status of pld_kv_read")


def _model_info(world: World, program: Program) -> None:
    draw, core = world.draw, world.core
    size = sizeof(structs.ModelInfoStruct)
    info = structs.ModelInfoStruct(struct_size=draw.one((size, size, 0, size - 1, size + 24, 4097, 2**63)))
    is_good = size <= info.struct_size <= MAX_STRUCT_SIZE
    info = with_tail(info, bytes([7] * 24))
    core.expect(
        core.call("pld_model_info_get", program.model, byref(info)), OK if is_good else INVALID_ARGUMENT, "info"
    )
    if is_good:
        core.expect(info.vocab_size, program.vocab_size, "vocabulary of the model")
    core.expect(core.call("pld_model_info_get", None, byref(info)), INVALID_ARGUMENT, "info of null")


# ---- making and ending ---------------------------------------------------------------------------------------------


def cache_params(draw: Draw, recipe: Recipe | None) -> structs.KVParamsStruct:
    """Good parameters; such that a program fits, when one is given."""
    is_slot = draw.chance(0.5)
    layers, g, e = draw.between(1, 3), draw.between(1, 3), 2 * draw.between(1, 10)
    if recipe is not None:
        layers, g, e = max(recipe.n_layers, 1) + draw.below(2), recipe.n_kv_heads, recipe.head_dim
    size = 1 if is_slot else draw.one((1, 2, 4, 5, 16, 33))
    blocks = draw.one((1, 3, 8, 16, 17, 40)) if is_slot else draw.one((1, 2, 4, 7))
    dtype = draw.one((abi.F32, abi.BF16, abi.I8))
    return structs.KVParamsStruct(_KV_SIZE, layers, g, e, size, blocks, dtype, int(is_slot))


def make_cache(world: World) -> None:
    """pld_kv_create and pld_kv_bytes with good or damaged parameters."""
    draw, core = world.draw, world.core
    params, expected = cache_params(draw, draw.one(world.live_programs).recipe), OK
    for _ in range(draw.one((0, 1, 1, 1, 2, 3))):
        name = draw.one(("n_layers", "n_kv_heads", "head_dim", "block_size", "n_blocks", "dtype", "layout"))
        setattr(params, name, draw.hostile(getattr(params, name)))
        expected = None
    if draw.chance(0.2):
        params.struct_size = draw.one((0, 8, _OLDEST_KV - 1, _OLDEST_KV, _KV_SIZE - 1, 4097, 2**63))
        expected = None
        if params.struct_size == _OLDEST_KV and params.block_size == 1:
            return  # its layout is decided by its first use
    elif draw.chance(0.2):
        fields = tail(draw)
        params.struct_size += len(fields)
        params, expected = with_tail(params, fields), INVALID_ARGUMENT if any(fields) else expected
    nbytes = core.get("pld_kv_bytes", byref(params))
    if 2**24 < nbytes < 2**45:
        return  # the machine might have that much
    if params.layout == abi.KV_SLOT and params.n_blocks > 4096 and nbytes > 0:
        return  # and what the core keeps beside it
    if draw.chance(0.03):
        core.expect(core.get("pld_kv_bytes", None), -1, "bytes of null")
        core.expect(core.call("pld_kv_create", byref(params), None), INVALID_ARGUMENT, "a cache into null")
        core.expect(core.call("pld_kv_create", None, byref(c_void_p())), INVALID_ARGUMENT, "a cache of null")
    if nbytes < 0:
        expected = INVALID_ARGUMENT
    cache = world.add_cache(params, expected)
    if cache is not None:
        world.check_sequences(cache)
    if len(world.live_caches) > 4:
        world.destroy_cache(world.live_caches[0])


def rows_of_program(draw: Draw) -> tuple[int, int]:
    """max_tokens, max_logit_rows."""
    return draw.one((1, 3, 8, 16)), draw.one((1, 2, 8))


def make_program(world: World, recipe: Recipe) -> None:
    """pld_program_create with good or damaged tables. What is accepted must be safe to run."""
    draw, core, context = world.draw, world.core, world.draw.one(world.contexts)
    rows = rows_of_program(draw)
    if draw.chance(0.25):
        world.add_program(context, describe_program(recipe, *rows), OK)
    else:
        program = world.add_program(context, damaged(draw, recipe, *rows), None)
        if program is not None and core.get("pld_program_arena_bytes", program.handle) > _MAX_ARENA:
            world.destroy_program(program)
            world.programs.pop()
    if draw.chance(0.03):
        desc = describe_program(recipe, *rows)
        out = c_void_p(1)
        for arguments in ((None, byref(desc.struct), byref(out)), (context.handle, None, byref(out))):
            core.expect(core.call("pld_program_create", *arguments), INVALID_ARGUMENT, "a program with a null")
        status = core.call("pld_program_create", context.handle, byref(desc.struct), None)
        core.expect(status, INVALID_ARGUMENT, "a program into null")
    if len(world.live_programs) > 4:
        world.destroy_program(world.live_programs[0])


def make_context(world: World) -> None:
    """pld_context_create with damaged parameters."""
    draw, core = world.draw, world.core
    params = abi.default_params(structs.ContextParamsStruct)
    params.num_threads = 1
    name = draw.one(("num_threads", "isa", "spin_us", "struct_size"))
    if name == "struct_size":
        params.struct_size = draw.one((0, 4, sizeof(params) - 1, 4097, 2**63))
        if draw.chance(0.5):
            fields = tail(draw)
            params.struct_size = sizeof(params) + len(fields)
            params = with_tail(params, fields)
    else:
        setattr(params, name, draw.hostile(getattr(params, name)))
    if 3 < params.num_threads <= 256:
        return  # so many threads cost too much for what they show
    out = c_void_p(1)
    null = draw.below(20)
    status = core.call("pld_context_create", None if null == 0 else byref(params), None if null == 1 else byref(out))
    if status == OK:
        core.get("pld_context_destroy", out)
    elif null != 1:
        core.expect(out.value, None, "the handle of a refused context")


def open_file(world: World, files: list[tuple[bytes, Recipe]], folder: Path) -> None:
    """pld_model_open of a good model, or of what is none."""
    draw, core, context = world.draw, world.core, world.draw.one(world.contexts)
    path, recipe = draw.one(files)
    rows = rows_of_program(draw)
    if draw.chance(0.5):
        world.add_model(context, path, recipe, rows)
        if len(world.live_programs) > 4:
            world.destroy_program(world.live_programs[0])
        return
    size = sizeof(structs.ModelParamsStruct)
    params = abi.default_params(structs.ModelParamsStruct)
    params.max_tokens, params.max_logit_rows = rows
    kind = draw.below(4)
    if kind == 0:
        path = draw.one(_bad_paths(folder))
    elif kind == 1:
        params.struct_size = draw.one((0, 8, size - 1))
    elif kind == 2:
        setattr(params, draw.one(("max_tokens", "max_logit_rows")), draw.one((0, -1, INT32_MIN, 2**20 + 1, INT32_MAX)))
    out = c_void_p(1)
    arguments = [context.handle, path, byref(params), byref(out)]
    if kind == 3:
        arguments[draw.below(4)] = None
    status = core.call("pld_model_open", *arguments)
    core.expect(status in (INVALID_ARGUMENT, OUT_OF_MEMORY), True, "whether a bad model is refused")
    if arguments[3] is not None and arguments[0] is not None and arguments[1] is not None:
        core.expect(out.value, None, "the handle of a refused model")


def verify_file(world: World, files: list[tuple[bytes, Recipe]], folder: Path) -> None:
    """pld_model_verify of a good model, of what has no checksums, of what is no file, and stopped."""
    draw, core = world.draw, world.core
    params, bad_block, stop = abi.default_params(structs.VerifyParamsStruct), ctypes.c_int64(-2), ctypes.c_int32(1)
    kind = draw.below(6)
    path = bytes(folder) + b"/text" if kind == 1 else draw.one(files)[0]
    if kind == 2:
        params.struct_size = draw.one((0, 8))
    elif kind == 3:
        params.stop = ctypes.addressof(stop)
    elif kind == 4:
        params.bytes_per_second = draw.one((INT32_MIN, -1))
    with open(path, "rb") as file:
        descriptor = -1 if kind == 5 else file.fileno()
        status = core.call("pld_model_verify", descriptor, byref(params), byref(bad_block))
    expected = {0: OK, 3: ABORTED}.get(kind, INVALID_ARGUMENT)
    core.expect(status, expected, f"status of pld_model_verify, kind {kind}")
    if kind == 0:
        core.expect(bad_block.value, -1, "the bad block of a good file")


def _bad_paths(folder: Path) -> list[bytes]:
    """Names of no file, of what is no file, in what is no UTF-8, and longer than a text."""
    start = bytes(folder)
    return [
        b"",
        start,
        start + b"/absent",
        start + b"/empty",
        start + b"/short",
        start + b"/text",
        b"/dev/null",
        start + b"/" + bytes(range(128, 256)),
        start + b"/" + "ü".encode() * 127,
        start + b"/" + "ü".encode() * 600,
        (start + b"/x/" + "€".encode() * 300)[:700],
    ]


Action = Callable[[World], None]
# What a sequence is made of, by weight; those that need more than a world are added by fuzz_core.py.
ACTIONS: tuple[tuple[int, Action], ...] = (
    (30, decode),
    (9, run),
    (5, logits_again),
    (30, change_sequences),
    (6, look),
    (4, make_cache),
    (1, make_context),
)
