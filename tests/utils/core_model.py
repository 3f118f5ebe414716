"""A compiled model as a C program uses it, over ctypes."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
from utils.batch_builders import DecodeBatch

from pellucid.core import abi, structs


class CoreModel:
    """A model file, opened by the core, and one cache. `hidden_size` is that of the tiny models."""

    hidden_size = 64

    def __init__(
        self,
        path: Path,
        *,
        layout: str,
        cells: int = 64,
        block_size: int = 4,
        threads: int = 2,
        dtype: int | None = None,
    ) -> None:
        lib = abi.library()
        self.context = abi.Context(threads)
        params = abi.default_params(structs.ModelParamsStruct)
        params.max_tokens, params.max_logit_rows = 64, 64
        handle = ctypes.c_void_p()
        abi.check(
            lib.pld_model_open(self.context.handle, str(path).encode(), ctypes.byref(params), ctypes.byref(handle))
        )
        self._model, self.program = handle, lib.pld_model_program(handle)
        self.info = structs.ModelInfoStruct(struct_size=ctypes.sizeof(structs.ModelInfoStruct))
        abi.check(lib.pld_model_info_get(handle, ctypes.byref(self.info)))
        kv = abi.default_params(structs.KVParamsStruct)
        kv.n_layers, kv.n_kv_heads, kv.head_dim = self.info.n_layers, self.info.n_kv_heads, self.info.head_dim
        kv.dtype, kv.layout = self.info.kv_dtype if dtype is None else dtype, 1 if layout == "slot" else 0
        kv.block_size = 1 if layout == "slot" else block_size
        kv.n_blocks = cells // kv.block_size
        cache = ctypes.c_void_p()
        abi.check(lib.pld_kv_create(ctypes.byref(kv), ctypes.byref(cache)))
        self.kv = cache

    def decode(self, batch: DecodeBatch) -> int:
        """The status."""
        return int(abi.library().pld_decode(self.program, self.kv, ctypes.byref(batch.struct)))

    def logits(self, index: int) -> np.ndarray | None:
        """[V] of a row of the last batch, copied; None when it has none."""
        address = abi.library().pld_logits_of(self.program, index)
        if not address:
            return None
        view = (ctypes.c_float * self.info.vocab_size).from_address(address)
        return np.frombuffer(view, np.float32).copy()

    def hidden(self, index: int) -> np.ndarray | None:
        """[D] of a row of the last batch, copied; None when there is no such row."""
        address = abi.library().pld_hidden_of(self.program, index)
        if not address:
            return None
        return np.frombuffer((ctypes.c_float * self.hidden_size).from_address(address), np.float32).copy()

    def read(self, layer: int, cell: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [G, E] of one cell."""
        k, v = (np.empty((self.info.n_kv_heads, self.info.head_dim), np.float32) for _ in range(2))
        abi.check(abi.library().pld_kv_read(self.kv, layer, cell, k.ctypes.data, v.ctypes.data))
        return k, v

    def pos_max(self, seq: int) -> int:
        """-1 when absent."""
        return int(abi.library().pld_seq_pos_max(self.kv, seq))

    @property
    def free_cells(self) -> int:
        """Of the SLOT cache."""
        return int(abi.library().pld_kv_free_cells(self.kv))

    def stats(self) -> tuple[int, int, int, int]:
        """Capacity, used, free and peak."""
        stats = structs.KVStatsStruct(ctypes.sizeof(structs.KVStatsStruct))
        abi.check(abi.library().pld_kv_stats_get(self.kv, ctypes.byref(stats)))
        return stats.capacity, stats.used, stats.free, stats.peak

    def reset(self) -> None:
        """Forgets all sequences."""
        abi.check(abi.library().pld_kv_reset(self.kv))

    def seq(self, verb: str, *arguments: int) -> int:
        """A sequence operation's status."""
        function = getattr(abi.library(), f"pld_seq_{verb}")
        return int(function(self.program, self.kv, *arguments) if verb == "add" else function(self.kv, *arguments))

    def close(self) -> None:
        """Frees cache, model and context."""
        abi.library().pld_kv_destroy(self.kv)
        abi.library().pld_model_close(self._model)
        self.context.close()
