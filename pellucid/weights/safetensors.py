"""Safetensors files and sharded checkpoints, mapped and checked.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data section,
which the tensors cover without gap or overlap (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.errors import WeightFormatError, shown
from pellucid.files import whole_file
from pellucid.weights.json_files import format_error, parse_json, read_json
from pellucid.weights.mapping import check_spans, map_file
from pellucid.weights.tensor import TensorView, byte_count

MAX_HEADER_BYTES = 16 * 2**20  # parsing costs up to some 20 times as much memory
MAX_TENSORS = 200_000
MAX_SHARDS = 4_096

SAFETENSORS_DTYPES = frozenset(
    ["BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"]
)
_TENSOR_FIELDS = frozenset({"dtype", "shape", "data_offsets"})


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(path: Path, name: str, info: Any, data: NDArray[np.uint8]) -> tuple[TensorView, int, int]:
    """The view of one header entry and its span in the data section."""

    def bad(field: str, value: object, limit: str) -> WeightFormatError:
        return format_error(path, f"{field} of tensor {shown(name)}", value, limit)

    if not isinstance(info, dict) or set(info) != _TENSOR_FIELDS:
        raise bad("entry", info, f"it must be an object with exactly {', '.join(sorted(_TENSOR_FIELDS))}")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
        raise bad("dtype", dtype, f"known are {', '.join(sorted(SAFETENSORS_DTYPES))}")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise bad("shape", shape, "it must be a list of integers from 0 to 2^63 - 1")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise bad("data_offsets", offsets, "it must be two integers from 0 to 2^63 - 1")
    begin, end = offsets
    if begin > end or end > data.size:
        raise bad("data_offsets", offsets, f"they must ascend within the {data.size} bytes of the data section")
    try:
        expected = byte_count(dtype, tuple(shape))
    except ValueError as error:
        raise bad("shape", shape, str(error)) from None
    if end - begin != expected:
        raise bad("byte count", end - begin, f"{dtype}{shape} needs {expected}")
    return TensorView(name, dtype, tuple(shape), data[begin:end]), begin, end


def _parts(path: Path) -> tuple[dict[str, Any], dict[str, str], NDArray[np.uint8]]:
    """The entries of a file's header, its notes, and the data section."""
    buffer = map_file(path)
    if buffer.size < 8:
        raise format_error(path, "file size", buffer.size, "8 bytes of header length are needed")
    length = int.from_bytes(buffer[:8].tobytes(), "little")
    if length > MAX_HEADER_BYTES:
        raise format_error(path, "header length", length, f"the limit is {MAX_HEADER_BYTES}")
    if length > buffer.size - 8:
        raise format_error(path, "header length", length, f"only {buffer.size - 8} bytes follow")
    text = buffer[8 : 8 + length].tobytes()
    if text[:1] != b"{":
        raise format_error(path, "first header byte", text[:1], "it must be '{'")
    header = parse_json(path, text)
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise format_error(path, "__metadata__", notes, "it must map strings to strings")
    return header, notes, buffer[8 + length :]


def open_safetensors(path: str | Path) -> dict[str, TensorView]:
    """All tensors of one file, by name, as views of its mapping.

    Raises ModelNotFoundError when there is no such file and WeightFormatError when it contradicts the format.
    """
    path = Path(path)
    header, _, data = _parts(path)
    if len(header) > MAX_TENSORS:
        raise format_error(path, "tensor count", len(header), f"the limit is {MAX_TENSORS}")
    tensors: dict[str, TensorView] = {}
    spans: list[tuple[int, int, str]] = []
    for name, info in header.items():
        view, begin, end = _tensor(path, name, info, data)
        tensors[name] = view
        spans.append((begin, end, name))
    check_spans(path, spans, contiguous_to=data.size)
    return tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """The notes in a file's header; empty when it has none. Raises as `open_safetensors`."""
    return _parts(Path(path))[1]


_WRITTEN_DTYPES = {"float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64"}


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Writes a file whole or not at all.

    Raises:
        KeyError: a tensor has another dtype than float32, float16, int32 or int64.
        StorageError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _WRITTEN_DTYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path, 8 + len(text) + offset) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).data)


def _shard_names(path: Path) -> dict[str, str]:
    """`weight_map` of an index: tensor name -> plain file name in the same folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise format_error(path, "weight_map", weight_map, "it must be a non-empty object")
    if len(weight_map) > MAX_TENSORS:
        raise format_error(path, "weight_map size", len(weight_map), f"the limit is {MAX_TENSORS}")
    for name, shard in weight_map.items():
        field = f"weight_map[{shown(name)}]"
        if not isinstance(shard, str) or not shard:
            raise format_error(path, field, shard, "it must be a file name")
        if shard == path.name:
            raise format_error(path, field, shard, "an index must not name itself")
        if any(character in shard for character in "/\\\0:") or shard.startswith("."):
            raise format_error(path, field, shard, "it must be a plain file name in the same folder")
        if not shard.endswith(".safetensors"):
            raise format_error(path, field, shard, "it must end in .safetensors; an index names weight files only")
    count = len(set(weight_map.values()))
    if count > MAX_SHARDS:
        raise format_error(path, "shard count", count, f"the limit is {MAX_SHARDS}")
    return weight_map


def index_shards(path: str | Path) -> tuple[Path, ...]:
    """The weight files that an index names, sorted."""
    path = Path(path)
    return tuple(path.parent / shard for shard in sorted(set(_shard_names(path).values())))


def open_index(path: str | Path) -> dict[str, TensorView]:
    """All tensors that a `*.safetensors.index.json` lists, from the shards beside it.

    Raises ModelNotFoundError for an absent shard and WeightFormatError for anything that contradicts the format.
    """
    path = Path(path)
    weight_map = _shard_names(path)
    shards = {shard: open_safetensors(path.parent / shard) for shard in sorted(set(weight_map.values()))}
    tensors: dict[str, TensorView] = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise format_error(path, f"weight_map[{shown(name)}]", shard, "that file has no such tensor")
        tensors[name] = shards[shard][name]
    return tensors
