"""Files as bytes: read-only mappings, bounded JSON, and the one way in which a format error is worded."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.errors import ModelNotFoundError, WeightFormatError

MAX_JSON_BYTES = 16 * 2**20
_MAX_SHOWN = 80
_MAX_INTEGER_DIGITS = 20  # 2^64 - 1 has 20; longer ones only cost time


def shown(value: object) -> str:
    """`value` for an error text: short, on one line, printable."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"


def format_error(path: Path, field: str, value: object, limit: str) -> WeightFormatError:
    """The error for `field` of the file `path` being `value` where `limit` must hold."""
    return WeightFormatError(f"{path.name}: {field} is {shown(value)}; {limit}")


def map_file(path: Path) -> NDArray[np.uint8]:
    """The file's bytes as a read-only mapped uint8 array that keeps the mapping alive.

    Raises ModelNotFoundError when there is no such regular file, WeightFormatError when it is empty.
    """
    if not path.is_file():
        raise ModelNotFoundError(f"no weight file at {path}")
    with path.open("rb") as file:
        size = path.stat().st_size
        if size == 0:
            raise format_error(path, "file size", 0, "it must not be empty")
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapping, dtype=np.uint8)


def parse_json(path: Path, text: bytes) -> Any:
    """JSON of a hostile origin: duplicate keys, NaN, endless integers and deep nesting are WeightFormatErrors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise format_error(path, "JSON key", key, "it must not occur twice in one object")
            result[key] = value
        return result

    def integer(digits: str) -> int:
        if len(digits) > _MAX_INTEGER_DIGITS:
            raise format_error(path, "integer", digits, f"the limit is {_MAX_INTEGER_DIGITS} digits")
        return int(digits)

    def constant(name: str) -> float:
        raise format_error(path, "number", name, "JSON numbers must be finite")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_int=integer, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise format_error(path, "JSON byte", error.start, "it must be valid UTF-8") from None
    except RecursionError:
        raise format_error(path, "JSON nesting", "too deep", "the limit is about 1,000 levels") from None
    except json.JSONDecodeError as error:
        raise format_error(path, "JSON", error.msg, f"parsing stopped at character {error.pos}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file; ModelNotFoundError when absent, WeightFormatError when it is anything else."""
    if not path.is_file():
        raise ModelNotFoundError(f"no file at {path}")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise format_error(path, "file size", size, f"the limit is {MAX_JSON_BYTES}")
    value = parse_json(path, path.read_bytes())
    if not isinstance(value, dict):
        raise format_error(path, "top-level value", value, "it must be a JSON object")
    return value


def check_spans(path: Path, spans: list[tuple[int, int, str]], *, contiguous_to: int | None = None) -> None:
    """Refuses overlapping (begin, end, name) spans; with `contiguous_to`, also any gap between 0 and that end."""
    position = 0
    last = "the start"
    for begin, end, name in sorted(spans):
        if begin < position:
            raise format_error(
                path, f"begin of tensor {shown(name)}", begin, f"it overlaps {shown(last)}, which ends at {position}"
            )
        if contiguous_to is not None and begin != position:
            raise format_error(path, f"begin of tensor {shown(name)}", begin, f"there is a gap after {position}")
        position, last = end, name
    if contiguous_to is not None and position != contiguous_to:
        raise format_error(path, "end of the last tensor", position, f"the data section has {contiguous_to} bytes")
