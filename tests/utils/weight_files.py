"""Weight files by hand, byte by byte, so that a test can break any one field of them."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
F32 = 0


def gguf_string(text: str | bytes, length: int | None = None) -> bytes:
    """A length-prefixed string; `length` lies about it."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def gguf_pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    """A metadata key/value pair."""
    return gguf_string(key) + struct.pack("<I", kind) + payload


def gguf_array(kind: int, count: int, payload: bytes = b"") -> bytes:
    """The payload of an array value."""
    return struct.pack("<IQ", kind, count) + payload


def gguf_tensor(
    name: str | bytes, dims: Sequence[int] = (4,), kind: int = F32, offset: int = 0, n_dims: int | None = None
) -> bytes:
    """A tensor info record; `dims` innermost first, as stored."""
    count = len(dims) if n_dims is None else n_dims
    return gguf_string(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


ARCHITECTURE = gguf_pair("general.architecture", STRING, gguf_string("llama"))


def gguf_file(
    pairs: Sequence[bytes] = (ARCHITECTURE,),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_pairs: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file; the counts can be made to lie."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs)
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return header + (b"\0" * (-len(header) % alignment) + data if data else b"")


def safetensors_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A whole file from a header object, or from its raw bytes; `length` lies about the header's size."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor_entry(shape: Sequence[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    """One entry of a safetensors header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
