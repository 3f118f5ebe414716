"""A program file made runnable: one call into the core a step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import partial

import numpy as np
import numpy.typing as npt

from pellucid.api.hidden_states import NO_STEERING, Steering
from pellucid.contract.batch import BatchInput
from pellucid.core import abi
from pellucid.errors import ActivationsError, NativeError, RowError, WeightFormatError, reason_of
from pellucid.owners import Exclusive
from pellucid.program.builder import FORMAT_VERSION
from pellucid.program.file import ProgramFile
from pellucid.program.variant import KeptColumns, Variant, variant_of

F32 = npt.NDArray[np.float32]
_MAX_VARIANTS = 4  # programs that keep activations, each with buffers of its own


class NativeProgram:
    """Runs batches through the core. The arrays that it gives are views of the core's buffers, valid until the next call: for one
    thread at a time, and a call within another thread's is refused."""

    def __init__(
        self, context: abi.Context, file: ProgramFile, kv: abi.KVCache, *, max_tokens: int, max_logit_rows: int
    ) -> None:
        self._kv, self._alone = kv, Exclusive("NativeProgram")
        self._load = partial(load_program, context, file, max_tokens, max_logit_rows)
        self._file = file
        self._plain = self._program = self._load()
        self._places: dict[str, KeptColumns] = {}
        self._variants: OrderedDict[tuple[tuple[str, ...], ...], tuple[abi.Program, Variant]] = OrderedDict()

    def run(self, batch: BatchInput, keep: Iterable[str] = (), steering: Steering = NO_STEERING) -> F32:
        """Forward for all T tokens; logits [L, V] of `batch.logit_rows`. Activations named in `keep` can be read afterwards;
        `steering` is added to activations. Raises as `Executable.run`."""
        names = (tuple(sorted(keep)), tuple(sorted(steering)))
        with self._alone:
            self._program, self._places = self._plain, {}
            if any(names):
                try:
                    self._program, variant = self._variant(names)
                except Exception as error:
                    raise ActivationsError(
                        f"{', '.join(names[0] + names[1])}: {reason_of(error)}", sum(names, ())
                    ) from error
                self._places = variant.places
                for name, buffer in variant.inputs.items():
                    _fill(self._program.input(buffer, batch.num_tokens), steering[name])
            self._program.run(self._kv, batch)
            return self._program.logits(len(batch.logit_rows))

    def activation(self, name: str) -> F32:
        """A kept activation [T, any] of the last batch.

        Raises:
            KeyError: it was not kept.
        """
        place = self._places[name]
        return self._program.kept(place.buffer)[:, place.column : place.column + place.width]

    def _variant(self, names: tuple[tuple[str, ...], ...]) -> tuple[abi.Program, Variant]:
        """The program that keeps and steers these names, planned when it is first asked for; the last few are held."""
        if names not in self._variants:
            variant = variant_of(self._file, *names)
            self._variants[names] = (self._load(variant=variant), variant)
            if len(self._variants) > _MAX_VARIANTS:
                self._variants.popitem(last=False)[1][0].close()
        self._variants.move_to_end(names)
        return self._variants[names]

    def logits_of(self, rows: npt.NDArray[np.int32]) -> F32:
        """Logits [L, V] of rows of the last batch."""
        with self._alone:
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
        with self._alone:
            for program in (self._plain, *(program for program, _ in self._variants.values())):
                program.close()
            self._kv.close()


def _fill(rows_TD: F32, spans: Iterable[tuple[int, int, F32]]) -> None:
    """-0.0 changes no bit of what it is added to."""
    rows_TD[:] = -0.0
    for begin, end, vector in spans:
        if vector.shape != rows_TD.shape[1:]:
            raise RowError(f"a vector {list(vector.shape)} is added to an activation {rows_TD.shape[1]} wide", begin)
        rows_TD[begin:end] = vector


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
            variant = Variant(ops, buffers, meta["n_forward_ops"], meta["hidden"], {}, {})
        weights = []
        for name, rows, cols, dtype, layout, offset, nbytes in meta["weights"]:
            if not isinstance(name, str):
                raise TypeError(f"a weight is named {name!r:.80}")
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
            hidden=variant.hidden,
            logits=meta["logits"],
            vocab_size=meta["vocab_size"],
            max_tokens=max_tokens,
            max_logit_rows=max_logit_rows,
            kept=variant.kept,
            inputs=list(variant.inputs.values()),
        )
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise WeightFormatError(f"{file.path.name}: the program is damaged: {error}") from None
    except NativeError as error:
        raise NativeError(f"{file.path.name}: {error}", error.status) from None


def _stored_bytes(rows: int, cols: int, dtype: int, layout: int) -> int:
    if not all(type(value) is int for value in (rows, cols, dtype, layout)):
        raise TypeError(
            f"weight [{rows!r:.40}, {cols!r:.40}] of type {dtype!r:.40} in layout {layout!r:.40}: no integers"
        )
    if layout == abi.PANELS:
        return abi.packed_bytes(rows, cols, dtype)
    return rows * abi.row_bytes(dtype, cols)
