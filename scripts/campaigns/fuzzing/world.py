"""The objects of one case, what the fuzzer knows of each without asking the core, and how they are looked at.

What was accepted is written down, so that a twin of the world can be made that never saw a refused call: both must then hold the
same and compute the same (twin.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_void_p, sizeof
from dataclasses import dataclass, field

import numpy as np
from utils.sequence_model import SequenceModel

from fuzzing.core import OK, OUT_OF_MEMORY, Core
from fuzzing.draws import Draw
from fuzzing.programs import Descriptor, Recipe
from pellucid.core import abi, structs

SEQS = (0, 1, 2, 3, 7, 2**31 - 1)
_SNAPSHOT_CELLS, _SNAPSHOT_LAYERS = 48, 4


@dataclass
class Context:
    """A context of the core."""

    handle: int
    threads: int
    isa: int


@dataclass
class Cache:
    """A cache: with SLOT the plain model of its sequences; with BLOCK what the caller manages."""

    index: int
    handle: int
    params: structs.KVParamsStruct
    model: SequenceModel | None
    known: set[int] = field(default_factory=set)  # BLOCK: sequences that were decoded
    tables: dict[int, list[int]] = field(default_factory=dict)  # BLOCK: blocks of each sequence
    is_alive: bool = True
    is_torn: bool = False  # a step was aborted on its way: cells that were free then may hold anything
    written: frozenset[int] | None = None  # layers that every step wrote; None: there was no step
    snapshot: bytes | None = None

    @property
    def n_cells(self) -> int:
        """Cells."""
        return int(self.params.n_blocks * self.params.block_size)

    def wrote(self, recipe: Recipe) -> None:
        """A step of this program was accepted."""
        layers = frozenset(layer for layer, _, _ in recipe.attention)
        self.written = layers if self.written is None else self.written & layers

    def is_known(self, recipe: Recipe) -> bool:
        """Whether all that this program reads of held cells was written by the step that took them."""
        layers = {layer for layer, _, _ in recipe.attention}
        return not self.is_torn or self.written is None or layers <= self.written

    def fits(self, recipe: Recipe) -> bool:
        """Whether all attention of a program fits the cache."""
        p = self.params
        return all(layer < p.n_layers and (g, e) == (p.n_kv_heads, p.head_dim) for layer, g, e in recipe.attention)


@dataclass
class Program:
    """A program, made from a descriptor or by opening a model file."""

    index: int
    handle: int
    recipe: Recipe
    context: Context
    max_tokens: int
    max_logit_rows: int
    vocab_size: int
    hidden: int  # its buffer
    source: Descriptor | bytes
    model: int | None = None  # the pld_model that it belongs to
    is_alive: bool = True
    rows_left: int = 0
    decoded: list[bool] | None = None  # of the rows of the last decode: whether they have logits
    snapshot: list[bytes | None] | None = None

    @property
    def hidden_width(self) -> int:
        """D."""
        return int(self.recipe.buffers["width"][self.hidden])


class World:
    """Contexts, caches and programs. With `is_careful`, what can be seen is compared around every call, not only at the end."""

    def __init__(self, core: Core, draw: Draw, *, is_careful: bool = False) -> None:
        self.core, self.draw, self.is_careful = core, draw, is_careful
        self.contexts: list[Context] = []
        self.caches: list[Cache] = []
        self.programs: list[Program] = []
        self.accepted: list[Callable[[World], object]] = []

    @property
    def live_caches(self) -> list[Cache]:
        """Those that were not destroyed."""
        return [cache for cache in self.caches if cache.is_alive]

    @property
    def live_programs(self) -> list[Program]:
        """Those that were not destroyed."""
        return [program for program in self.programs if program.is_alive]

    # ---- making ----------------------------------------------------------------------------------------------------

    def add_context(self, threads: int, isa: int, spin_us: int = -1) -> Context:
        """Makes a context with good parameters."""
        core = self.core
        params = structs.ContextParamsStruct(sizeof(structs.ContextParamsStruct), threads, isa, spin_us)
        out = c_void_p()
        core.expect(core.call("pld_context_create", byref(params), byref(out)), OK, "status of a good context")
        handle = out.value or 0
        core.expect(core.get("pld_context_num_threads", handle), threads, "threads of the context")
        core.expect(core.get("pld_context_isa", handle), isa, "instruction set of the context")
        self.contexts.append(Context(handle, threads, isa))
        return self.contexts[-1]

    def context_of(self, isa: int) -> Context:
        """The first context with these kernels; one of one thread is made when there is none."""
        return next((context for context in self.contexts if context.isa == isa), None) or self.add_context(1, isa)

    def add_cache(self, params: structs.KVParamsStruct, expected: int | None) -> Cache | None:
        """Makes a cache, if the core accepts it; `expected`: the status, where it is known."""
        out = c_void_p(1)
        status = self.core.call("pld_kv_create", byref(params), byref(out))
        if expected is not None and status != OUT_OF_MEMORY:
            self.core.expect(status, expected, "status of pld_kv_create")
        if status != OK:
            self.core.expect(out.value, None, "the handle of a refused cache")
            return None
        seen = abi.default_params(structs.KVParamsStruct)
        ctypes.memmove(byref(seen), byref(params), min(params.struct_size, sizeof(seen)))
        seen.struct_size = min(params.struct_size, sizeof(seen))
        model = SequenceModel(seen.n_blocks) if seen.layout == abi.KV_SLOT else None
        self.caches.append(Cache(len(self.caches), out.value or 0, seen, model))
        return self.caches[-1]

    def add_program(self, context: Context, desc: Descriptor, expected: int | None) -> Program | None:
        """Makes a program, if the core accepts it."""
        out, s = c_void_p(1), desc.struct
        status = self.core.call("pld_program_create", context.handle, byref(s), byref(out))
        if expected is not None:
            self.core.expect(status, expected, "status of pld_program_create")
        if status != OK:
            self.core.expect(out.value, None, "the handle of a refused program")
            return None
        rows = (s.max_tokens, s.max_logit_rows)
        index = len(self.programs)
        program = Program(index, out.value or 0, desc.recipe, context, *rows, s.vocab_size, s.hidden, desc)
        self.programs.append(program)
        self._fill_inputs(program)
        return program

    def add_model(self, context: Context, path: bytes, recipe: Recipe, rows: tuple[int, int]) -> Program:
        """Opens a good model file."""
        params = structs.ModelParamsStruct(sizeof(structs.ModelParamsStruct), *rows)
        out, index = c_void_p(), len(self.programs)
        status = self.core.call("pld_model_open", context.handle, path, byref(params), byref(out))
        self.core.expect(status, OK, "status of a good model")
        handle = self.core.get("pld_model_program", out)
        self.programs.append(
            Program(index, handle, recipe, context, *rows, recipe.vocab_size, recipe.hidden, path, out.value)
        )
        return self.programs[-1]

    def _fill_inputs(self, program: Program) -> None:
        """Buffers that the caller writes hold the same in every run."""
        for buffer in set(program.recipe.inputs):
            address = self.core.get("pld_program_input", program.handle, buffer)
            if address:
                count = int(program.recipe.buffers["width"][buffer]) * program.max_tokens
                values = np.resize(np.array([-0.75, 0.5, 0.25, -0.0, 1.0], np.float32), min(count, 1 << 20))
                ctypes.memmove(address, values.ctypes.data, values.nbytes)

    def destroy_cache(self, cache: Cache) -> None:
        """Nobody may use it any more."""
        self.core.get("pld_kv_destroy", cache.handle)
        cache.is_alive = False

    def destroy_program(self, program: Program) -> None:
        """Nobody may use it any more."""
        if program.model is not None:
            self.core.get("pld_model_close", program.model)
        else:
            self.core.get("pld_program_destroy", program.handle)
        program.is_alive = False

    def close_all_but_contexts(self) -> None:
        """Destroys programs and caches."""
        for program in self.live_programs:
            self.destroy_program(program)
        for cache in self.live_caches:
            self.destroy_cache(cache)

    def close(self) -> None:
        """Destroys everything, programs and caches in front of their contexts."""
        self.close_all_but_contexts()
        for context in self.contexts:
            self.core.get("pld_context_destroy", context.handle)
        self.contexts.clear()

    # ---- looking ---------------------------------------------------------------------------------------------------

    def contents(self, cache: Cache) -> bytes:
        """Keys and values of the first cells and layers, as they are read."""
        p = cache.params
        count = p.n_kv_heads * p.head_dim
        k, v = (ctypes.c_float * count)(), (ctypes.c_float * count)()
        read, parts = self.core.peek, []
        for layer in range(min(p.n_layers, _SNAPSHOT_LAYERS)):
            for cell in range(min(cache.n_cells, _SNAPSHOT_CELLS)):
                self.core.expect(read("pld_kv_read", cache.handle, layer, cell, k, v), OK, "status of reading a cell")
                parts += [bytes(k), bytes(v)]
        return b"".join(parts)

    def rows_of(self, program: Program) -> list[bytes | None]:
        """Hidden states and logits of the last decode, row by row."""
        rows = []
        for index in range(len(program.decoded or ())):
            for name, width in (("pld_hidden_of", program.hidden_width), ("pld_logits_of", program.vocab_size)):
                address = self.core.peek(name, program.handle, index)
                rows.append(ctypes.string_at(address, 4 * width) if address else None)
        return rows

    def outputs(self, program: Program, n_tokens: int, n_logits: int) -> bytes:
        """Hidden states and logits of the last step, as the program keeps them."""
        hidden = self.core.peek("pld_program_hidden", program.handle)
        logits = self.core.peek("pld_program_logits_data", program.handle)
        hidden_bytes, logit_bytes = 4 * n_tokens * program.hidden_width, 4 * n_logits * program.vocab_size
        return ctypes.string_at(hidden, hidden_bytes) + ctypes.string_at(logits, logit_bytes)

    def check_sequences(self, cache: Cache) -> None:
        """Last positions and free cells are those of the plain model."""
        core = self.core
        core.tally.add("checks")
        free = core.peek("pld_kv_free_cells", cache.handle)
        stats = structs.KVStatsStruct(ctypes.sizeof(structs.KVStatsStruct))
        core.expect(core.call("pld_kv_stats_get", cache.handle, ctypes.byref(stats)), OK, "status of pld_kv_stats_get")
        if cache.model is None:
            core.expect((free, stats.used, stats.free, stats.peak), (-1,) * 4, "free cells of a BLOCK cache")
            return
        core.expect(free, cache.model.free_cells, "free cells")
        core.expect((stats.free, stats.capacity - stats.used), (free, free), "statistics of a SLOT cache")
        core.expect(stats.peak >= stats.used, True, "the peak is at least what is used")
        for seq in {*SEQS, *cache.model.ids}:
            last = core.peek("pld_seq_pos_max", cache.handle, seq)
            core.expect(last, cache.model.pos_max(seq), f"last position of sequence {seq}")

    def check_refused(self, status: int, cache: Cache | None, program: Program | None) -> None:
        """In a careful world: what can be seen is as before, unless the call was accepted."""
        if not self.is_careful:
            return
        if cache is not None:
            now = self.contents(cache)
            if status != OK and cache.snapshot is not None and not cache.is_torn:
                self.expect_floats(now, cache.snapshot, "keys and values behind a refused call")
            cache.snapshot = now
        if program is not None:
            rows = self.rows_of(program)
            if status != OK and program.snapshot is not None:
                self.core.tally.add("checks")
                if rows != program.snapshot:
                    self.core.wrong("hidden states or logits of the last decode changed behind a refused call")
            program.snapshot = rows

    def expect_floats(self, found: bytes, expected: bytes, what: str) -> None:
        """One comparison of bits."""
        self.core.tally.add("checks")
        if not same_floats(found, expected):
            self.core.wrong(f"{what}: the bits are not what they were")


def same_floats(a: bytes, b: bytes) -> bool:
    """Whether float32 numbers have the same bits; one NaN is like another."""
    if a == b:
        return True
    x, y = np.frombuffer(a, np.float32), np.frombuffer(b, np.float32)
    return x.shape == y.shape and bool(np.all((x.view(np.int32) == y.view(np.int32)) | (np.isnan(x) & np.isnan(y))))
