"""GGUF files, versions 2 and 3, little endian, mapped and checked before anything is allocated.

Layout: magic, version, counts, key/value pairs, tensor infos, padding to `general.alignment`, tensor data
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.errors import WeightFormatError, shown
from pellucid.weights.json_files import format_error
from pellucid.weights.mapping import check_spans, map_file
from pellucid.weights.tensor import TensorView, byte_count

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MIN_ALIGNMENT, MAX_ALIGNMENT = 8, 65_536
MAX_HEADER_BYTES = 256 * 2**20
MAX_KEYS = 65_536
MAX_TENSORS = 200_000
MAX_KEY_BYTES = 65_535
MAX_TENSOR_NAME_BYTES = 256
MAX_STRING_BYTES = 16 * 2**20
MAX_TENSOR_DIMENSIONS = 4
MAX_NESTING = 4
MAX_ARRAY_ELEMENTS = 2**23  # of all arrays of a file together; a vocabulary of a million has some four million

_MIN_KEY_BYTES = 8 + 1 + 4 + 1  # length, one letter, type, one byte
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # length, one letter, n_dims, one dimension, type, offset

# Metadata value types of the specification: code -> struct letter.
_SCALARS: dict[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_VALUE_TYPES = 13

# ggml_type codes -> names of weights.tensor.DTYPES.
GGML_TYPES: dict[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


@dataclass(frozen=True)
class GGUFFile:
    """An opened file. `metadata` holds int, float, bool, str and lists of them; `tensors` are views of the mapping."""

    path: Path
    version: int
    alignment: int
    metadata: dict[str, object] = field(repr=False)
    tensors: dict[str, TensorView] = field(repr=False)

    @property
    def architecture(self) -> str:
        """`general.architecture`; WeightFormatError when absent or no string."""
        value = self.metadata.get("general.architecture")
        if not isinstance(value, str) or not value:
            raise format_error(self.path, "general.architecture", value, "it must be a non-empty string")
        return value


class _Reader:
    """A cursor over the header. Every read is checked against the end first."""

    def __init__(self, path: Path, buffer: NDArray[np.uint8]) -> None:
        self.path = path
        self.view = memoryview(buffer)  # type: ignore[arg-type]
        self.end = min(buffer.size, MAX_HEADER_BYTES)
        self.position = 0
        self.elements_left = MAX_ARRAY_ELEMENTS

    def error(self, name: str, value: object, limit: str) -> WeightFormatError:
        return format_error(self.path, name, value, limit)

    def need(self, count: int, name: str) -> int:
        """Claims `count` bytes and returns where they begin."""
        begin = self.position
        if count > self.end - begin:
            raise self.error(f"size of {name}", count, f"only {self.end - begin} header bytes are left at {begin}")
        self.position = begin + count
        return begin

    def scalar(self, letter: str, name: str) -> Any:
        begin = self.need(struct.calcsize("<" + letter), name)
        if letter == "?" and self.view[begin] > 1:
            raise self.error(name, self.view[begin], "a bool must be 0 or 1")
        return struct.unpack_from("<" + letter, self.view, begin)[0]

    def string(self, name: str, limit: int = MAX_STRING_BYTES) -> str:
        length = self.scalar("Q", f"length of {name}")
        if length > limit:
            raise self.error(f"length of {name}", length, f"the limit is {limit}")
        begin = self.need(length, name)
        try:
            return str(self.view[begin : begin + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(
                f"byte {error.start} of {name}", bytes(self.view[begin : begin + 8]), "it must be valid UTF-8"
            ) from None

    def strings(self, count: int, name: str) -> list[str]:
        """`count` strings in a row: the hot loop of a vocabulary, so the checks are written out."""
        view, end, position = self.view, self.end, self.position
        length_at = struct.Struct("<Q").unpack_from
        result: list[str] = []
        append = result.append
        try:
            for _ in range(count):
                begin = position + 8
                if begin > end:
                    raise self.error(f"length of {name}[{len(result)}]", "missing", f"the header ends at {end}")
                (length,) = length_at(view, position)
                if length > MAX_STRING_BYTES or length > end - begin:
                    raise self.error(f"length of {name}[{len(result)}]", length, f"only {end - begin} bytes are left")
                position = begin + length
                append(str(view[begin:position], "utf-8"))
        except UnicodeDecodeError as error:
            raise self.error(
                f"byte {error.start} of {name}[{len(result)}]", error.object[error.start], "it must be valid UTF-8"
            ) from None
        self.position = position
        return result

    def array(self, name: str, depth: int) -> list[Any]:
        kind = self.scalar("I", f"element type of {name}")
        count = self.scalar("Q", f"element count of {name}")
        if kind >= _VALUE_TYPES:
            raise self.error(f"element type of {name}", kind, f"it must be below {_VALUE_TYPES}")
        if count > self.elements_left:
            raise self.error(
                f"element count of {name}", count, f"a file may have {MAX_ARRAY_ELEMENTS} in all its arrays"
            )
        smallest = {_STRING: 8, _ARRAY: 12}.get(kind) or struct.calcsize("<" + _SCALARS[kind])
        if count * smallest > self.end - self.position:
            raise self.error(
                f"element count of {name}", count, f"only {self.end - self.position} header bytes are left"
            )
        self.elements_left -= count
        if kind == _STRING:
            return self.strings(count, name)
        if kind == _ARRAY:
            if depth >= MAX_NESTING:
                raise self.error(f"nesting of {name}", depth + 1, f"the limit is {MAX_NESTING}")
            return [self.array(f"{name}[{index}]", depth + 1) for index in range(count)]
        begin = self.need(count * smallest, name)
        values = np.frombuffer(self.view[begin : self.position], dtype="u1" if kind == _BOOL else "<" + _SCALARS[kind])
        if kind != _BOOL:
            return list(values.tolist())
        if count and values.max() > 1:
            raise self.error(name, int(values.max()), "a bool must be 0 or 1")
        return list(values.astype(bool).tolist())

    def value(self, name: str) -> tuple[int, object]:
        """A metadata value and its type code."""
        kind = self.scalar("I", f"type of {name}")
        if kind >= _VALUE_TYPES:
            raise self.error(f"type of {name}", kind, f"it must be below {_VALUE_TYPES}")
        special: dict[int, Callable[[], object]] = {
            _STRING: lambda: self.string(name),
            _ARRAY: lambda: self.array(name, 1),
        }
        return kind, special[kind]() if kind in special else self.scalar(_SCALARS[kind], name)

    def count(self, name: str, limit: int) -> int:
        """A number of records that follow."""
        count: int = self.scalar("Q", name)
        if count > limit:
            raise self.error(name, count, f"the limit is {limit}")
        return count


def _read_metadata(reader: _Reader, count: int) -> tuple[dict[str, object], int]:
    """All key/value pairs and the alignment."""
    metadata: dict[str, object] = {}
    alignment: object = DEFAULT_ALIGNMENT
    for index in range(count):
        key = reader.string(f"key {index}", MAX_KEY_BYTES)
        if not key or key in metadata:
            raise reader.error(f"key {index}", key, "keys must be unique and not empty")
        kind, metadata[key] = reader.value(key)
        if key == "general.alignment":
            alignment = metadata[key] if kind == _UINT32 else f"of value type {kind}"
    if not isinstance(alignment, int) or not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        limit = f"it must be a uint32 power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}"
        raise reader.error("general.alignment", alignment, limit)
    return metadata, alignment


@dataclass(frozen=True)
class _TensorInfo:
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def _read_tensor_info(reader: _Reader, index: int, alignment: int) -> _TensorInfo:
    name = reader.string(f"name of tensor {index}", MAX_TENSOR_NAME_BYTES)
    if not name:
        raise reader.error(f"name of tensor {index}", name, "it must not be empty")
    label = f"of tensor {shown(name)}"
    n_dims = reader.scalar("I", f"dimension count {label}")
    if not 1 <= n_dims <= MAX_TENSOR_DIMENSIONS:
        raise reader.error(f"dimension count {label}", n_dims, f"it must be 1 to {MAX_TENSOR_DIMENSIONS}")
    shape = tuple(reader.scalar("Q", f"dimension {axis} {label}") for axis in range(n_dims))[::-1]
    if min(shape) == 0:
        raise reader.error(f"shape {label}", list(shape), "every dimension must be at least 1")
    code = reader.scalar("I", f"type {label}")
    if code not in GGML_TYPES:
        raise reader.error(f"type {label}", code, f"known are {', '.join(map(str, GGML_TYPES))}")
    offset = reader.scalar("Q", f"offset {label}")
    if offset % alignment:
        raise reader.error(f"offset {label}", offset, f"it must be a multiple of the alignment {alignment}")
    dtype = GGML_TYPES[code]
    try:
        size = byte_count(dtype, shape)
    except ValueError as error:
        raise reader.error(f"shape {label}", list(shape), str(error)) from None
    return _TensorInfo(name, dtype, shape, offset, size)


def open_gguf(path: str | Path) -> GGUFFile:
    """Metadata and tensors of a GGUF file, the tensors as views of its mapping with dimensions outermost first.

    Raises ModelNotFoundError when there is no such file and WeightFormatError when it contradicts the format.
    """
    path = Path(path)
    buffer = map_file(path)
    reader = _Reader(path, buffer)
    magic = bytes(reader.view[reader.need(4, "magic") : 4])
    if magic != MAGIC:
        raise format_error(path, "magic", magic, f"it must be {MAGIC!r}")
    version = reader.scalar("I", "version")
    if version not in VERSIONS:
        hint = "this looks like a big-endian file; " if version and version & 0xFFFF == 0 else ""
        raise format_error(path, "version", version, f"{hint}supported are {', '.join(map(str, VERSIONS))}")
    n_tensors = reader.count("tensor count", MAX_TENSORS)
    n_keys = reader.count("key count", MAX_KEYS)
    least = n_tensors * _MIN_TENSOR_BYTES + n_keys * _MIN_KEY_BYTES
    if least > reader.end - reader.position:
        limit = f"they need {least} bytes; only {reader.end - reader.position} follow"
        raise format_error(path, "tensor and key count", (n_tensors, n_keys), limit)
    metadata, alignment = _read_metadata(reader, n_keys)
    infos = [_read_tensor_info(reader, index, alignment) for index in range(n_tensors)]
    data = buffer[(reader.position + alignment - 1) // alignment * alignment :]
    tensors: dict[str, TensorView] = {}
    for info in infos:
        if info.name in tensors:
            raise format_error(path, "tensor name", info.name, "it must not occur twice")
        end = info.offset + info.size
        if end > data.size:
            raise format_error(
                path, f"end of tensor {shown(info.name)}", end, f"the data section has {data.size} bytes"
            )
        tensors[info.name] = TensorView(info.name, info.dtype, info.shape, data[info.offset : end])
    check_spans(path, [(info.offset, info.offset + info.size, info.name) for info in infos])
    return GGUFFile(path, version, alignment, metadata, tensors)
