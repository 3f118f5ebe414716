"""A program file made runnable: one call into the core a step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pellucid.errors import WeightFormatError
from pellucid.ops import abi
from pellucid.ops.batch import BatchInput
from pellucid.program.builder import FORMAT_VERSION
from pellucid.program.file import ProgramFile

F32 = npt.NDArray[np.float32]


class NativeProgram:
    """Runs batches through the core. The arrays that it gives are views of the core's buffers, valid until the next call."""

    def __init__(
        self, context: abi.Context, file: ProgramFile, kv: abi.KVCache, *, max_tokens: int, max_logit_rows: int
    ) -> None:
        self._kv = kv
        self._program = load_program(context, file, max_tokens, max_logit_rows)

    def run(self, batch: BatchInput) -> F32:
        """Forward for all T tokens; logits [L, V] of `batch.logit_rows`."""
        self._program.run(self._kv, batch)
        return self._program.logits(len(batch.logit_rows))

    def logits_of(self, rows: npt.NDArray[np.int32]) -> F32:
        """Logits [L, V] of rows of the last batch."""
        self._program.run_logits(rows)
        return self._program.logits(len(rows))

    def hidden(self) -> F32:
        """Hidden states [T, D] of the last batch."""
        return self._program.hidden()

    @property
    def arena_bytes(self) -> int:
        """Bytes of activations."""
        return self._program.arena_bytes

    def close(self) -> None:
        """Frees the program and the cache."""
        self._program.close()
        self._kv.close()


def load_program(context: abi.Context, file: ProgramFile, max_tokens: int, max_logit_rows: int) -> abi.Program:
    """Hands a program file to the core, which checks every index, width and shape.

    Raises:
        WeightFormatError: the file is of another version, or its tables are damaged.
        NativeError: the core refused the program.
    """
    meta = file.meta
    if meta.get("format_version") != FORMAT_VERSION:
        raise WeightFormatError(
            f"{file.path.name}: format version {meta.get('format_version')!r}; this version reads {FORMAT_VERSION}"
        )
    try:
        data = file.sections["data"]
        ops = file.sections["ops"].view(abi.OP_DTYPE)
        buffers = file.sections["buffers"].view(abi.BUFFER_DTYPE)
        weights = []
        for _, rows, cols, dtype, layout, offset, nbytes in meta["weights"]:
            if offset < 0 or nbytes < 0 or offset + nbytes > data.nbytes:
                raise ValueError(f"weight at [{offset}, +{nbytes}] lies outside {data.nbytes} bytes")
            if nbytes != _stored_bytes(rows, cols, dtype, layout):
                raise ValueError(f"weight [{rows}, {cols}] has {nbytes} bytes")
            weights.append(abi.Weight(data[offset : offset + nbytes], rows, cols, dtype, layout))
        return abi.Program(
            context,
            ops,
            buffers,
            weights,
            n_forward_ops=meta["n_forward_ops"],
            hidden=meta["hidden"],
            logits=meta["logits"],
            vocab_size=meta["vocab_size"],
            max_tokens=max_tokens,
            max_logit_rows=max_logit_rows,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightFormatError(f"{file.path.name}: the program is damaged: {error}") from None


def _stored_bytes(rows: int, cols: int, dtype: int, layout: int) -> int:
    if layout == abi.PANELS:
        return abi.packed_bytes(rows, cols, dtype)
    return rows * abi.row_bytes(dtype, cols)
