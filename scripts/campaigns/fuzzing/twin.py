"""The twin of a world: made from the calls that were accepted alone, on one thread; and what both compute at the end."""

from __future__ import annotations

import ctypes
from ctypes import byref, sizeof

from fuzzing.core import NO_SPACE, OK
from fuzzing.draws import Draw, ints, longs
from fuzzing.programs import Descriptor
from fuzzing.world import Cache, Context, Program, World, same_floats
from pellucid.core import structs

_PROBED_SEQS, _PROBED_POSITIONS = 3, 48


def check_twin(world: World, contexts: list[Context]) -> None:
    """Caches hold the same in both worlds, and a step behind all calls has the same bits. `contexts` are the twin's, of one thread;
    they are kept from twin to twin, and more are added as they are needed."""
    twin = _twin_of(world, contexts)
    for replay in world.accepted:
        replay(twin)
    for cache in world.live_caches:
        other = twin.caches[cache.index]
        world.check_sequences(cache)
        if not cache.is_torn:
            _check_same(world, world.contents(cache), twin.contents(other), f"contents of cache {cache.index}")
        _check_probes(world, twin, cache)
    twin.close_all_but_contexts()


def _twin_of(world: World, contexts: list[Context]) -> World:
    """The same objects, in the same order, without their past."""
    twin = World(world.core, Draw(0))
    twin.contexts = contexts
    for cache in world.caches:
        twin.add_cache(cache.params, OK)
    for program in world.programs:
        context, rows = twin.context_of(program.context.isa), (program.max_tokens, program.max_logit_rows)
        if isinstance(program.source, Descriptor):
            twin.add_program(context, program.source, OK)
        else:
            twin.add_model(context, program.source, program.recipe, rows)
    return twin


def _check_same(world: World, found: bytes, expected: bytes, what: str) -> None:
    world.core.tally.add("checks")
    if not same_floats(found, expected):
        world.core.wrong(f"{what} differ from those of a twin that saw the accepted calls alone")


def _check_probes(world: World, twin: World, cache: Cache) -> None:
    probe = _probe_block if cache.model is None else _probe_slot
    for program in world.live_programs:
        if not cache.fits(program.recipe) or not cache.is_known(program.recipe):
            continue
        found = probe(world, program, cache)
        expected = probe(twin, twin.programs[program.index], twin.caches[cache.index])
        what = f"bits of a step behind all calls (cache {cache.index}, program {program.index})"
        _check_same(world, found, expected, what)
        return


def _probe_slot(world: World, program: Program, cache: Cache) -> bytes:
    """The next token of some of the sequences: hidden states and logits; empty when no cell is free."""
    core = world.core
    count = min(_PROBED_SEQS, program.max_tokens, program.max_logit_rows)
    held = [s for s in range(4) if core.peek("pld_seq_pos_max", cache.handle, s) >= 0] or [0]
    held = [s for s in held if core.peek("pld_seq_pos_max", cache.handle, s) < 2**31 - 3][:count]
    if not held:
        return b""
    tokens, seqs = ints([1 % program.vocab_size] * len(held)), ints(held)
    logits = (ctypes.c_int8 * len(held))(*[1] * len(held))
    batch = structs.DecodeBatchStruct(sizeof(structs.DecodeBatchStruct), len(held), 0)
    batch.tokens, batch.seq_ids = ctypes.addressof(tokens), ctypes.addressof(seqs)
    batch.logits = ctypes.addressof(logits)
    status = core.call("pld_decode", program.handle, cache.handle, byref(batch))
    if status == NO_SPACE:
        return b""
    core.expect(status, OK, "status of a decode behind all calls")
    program.decoded = [True] * len(held)
    return b"".join(row or b"none" for row in world.rows_of(program))


def _probe_block(world: World, program: Program, cache: Cache) -> bytes:
    """A token that sees the first cells as they are, and whose own keys and values are not written."""
    core, size = world.core, cache.params.block_size
    count = min(cache.n_cells, _PROBED_POSITIONS)
    width = -(-count // size)
    arrays = [
        ints([1 % program.vocab_size]),
        ints([count - 1]),
        ints([0, 1]),
        ints([count]),
        ints(list(range(width))),
        longs([-1]),
        ints([0]),
    ]
    batch = structs.BatchStruct(sizeof(structs.BatchStruct), 1, 1, 1, width, *map(ctypes.addressof, arrays))
    status = core.call("pld_program_run", program.handle, cache.handle, byref(batch))
    core.expect(status, OK, "status of a step behind all calls")
    hidden = core.get("pld_program_hidden", program.handle)
    logits = core.get("pld_program_logits_data", program.handle)
    return ctypes.string_at(hidden, 4 * program.hidden_width) + ctypes.string_at(logits, 4 * program.vocab_size)
