"""A program file made runnable: one call into the core a step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import partial

import numpy as np
import numpy.typing as npt

from pellucid.errors import WeightFormatError
from pellucid.ops import abi
from pellucid.ops.batch import BatchInput
from pellucid.program.builder import FORMAT_VERSION
from pellucid.program.file import ProgramFile
from pellucid.program.variant import KeptColumns, Variant, keeping

F32 = npt.NDArray[np.float32]
_MAX_VARIANTS = 4  # programs that keep activations, each with buffers of its own


class NativeProgram:
    """Runs batches through the core. The arrays that it gives are views of the core's buffers, valid until the next call."""

    def __init__(
        self, context: abi.Context, file: ProgramFile, kv: abi.KVCache, *, max_tokens: int, max_logit_rows: int
    ) -> None:
        self._kv = kv
        self._load = partial(load_program, context, file, max_tokens, max_logit_rows)
        self._file = file
        self._plain = self._program = self._load()
        self._places: dict[str, KeptColumns] = {}
        self._keeping: OrderedDict[tuple[str, ...], tuple[abi.Program, dict[str, KeptColumns]]] = OrderedDict()

    def run(self, batch: BatchInput, keep: Iterable[str] = ()) -> F32:
        """Forward for all T tokens; logits [L, V] of `batch.logit_rows`. Activations named in `keep` can be read afterwards."""
        names = tuple(sorted(keep))
        self._program, self._places = self._keeper(names) if names else (self._plain, {})
        self._program.run(self._kv, batch)
        return self._program.logits(len(batch.logit_rows))

    def activation(self, name: str) -> F32:
        """A kept activation [T, any] of the last batch.

        Raises:
            KeyError: it was not kept.
        """
        place = self._places[name]
        return self._program.kept(place.buffer)[:, place.column : place.column + place.width]

    def _keeper(self, names: tuple[str, ...]) -> tuple[abi.Program, dict[str, KeptColumns]]:
        """The program that keeps `names`, planned when it is first asked for; the last few are held."""
        if names not in self._keeping:
            variant = keeping(self._file, names)
            self._keeping[names] = (self._load(variant=variant), variant.places)
            if len(self._keeping) > _MAX_VARIANTS:
                self._keeping.popitem(last=False)[1][0].close()
        self._keeping.move_to_end(names)
        return self._keeping[names]

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
        return self._plain.arena_bytes

    def close(self) -> None:
        """Frees the programs and the cache."""
        for program in (self._plain, *(program for program, _ in self._keeping.values())):
            program.close()
        self._kv.close()


def load_program(
    context: abi.Context, file: ProgramFile, max_tokens: int, max_logit_rows: int, variant: Variant | None = None
) -> abi.Program:
    """Hands a program file, or a variant of it, to the core, which checks every index, width and shape.

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
        if variant is None:
            ops, buffers = file.sections["ops"].view(abi.OP_DTYPE), file.sections["buffers"].view(abi.BUFFER_DTYPE)
            variant = Variant(ops, buffers, meta["n_forward_ops"], {})
        weights = []
        for _, rows, cols, dtype, layout, offset, nbytes in meta["weights"]:
            if offset < 0 or nbytes < 0 or offset + nbytes > data.nbytes:
                raise ValueError(f"weight at [{offset}, +{nbytes}] lies outside {data.nbytes} bytes")
            if nbytes != _stored_bytes(rows, cols, dtype, layout):
                raise ValueError(f"weight [{rows}, {cols}] has {nbytes} bytes")
            weights.append(abi.Weight(data[offset : offset + nbytes], rows, cols, dtype, layout))
        return abi.Program(
            context,
            variant.ops,
            variant.buffers,
            weights,
            n_forward_ops=variant.n_forward_ops,
            hidden=meta["hidden"],
            logits=meta["logits"],
            vocab_size=meta["vocab_size"],
            max_tokens=max_tokens,
            max_logit_rows=max_logit_rows,
            kept=variant.kept,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightFormatError(f"{file.path.name}: the program is damaged: {error}") from None


def _stored_bytes(rows: int, cols: int, dtype: int, layout: int) -> int:
    if layout == abi.PANELS:
        return abi.packed_bytes(rows, cols, dtype)
    return rows * abi.row_bytes(dtype, cols)
