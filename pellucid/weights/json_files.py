"""JSON files, bounded, and the one way in which a format error is worded. Imports nothing heavy.

JSON is read in two ways. Of headers and indexes, which say where bytes lie, nothing is taken that two readers could understand
differently (`parse_json`). Configuration files are read as Python and transformers read them (`read_config`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pellucid.errors import ModelNotFoundError, WeightFormatError, shown

MAX_JSON_BYTES = 16 * 2**20
GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how one begins
_MAX_NAME = 80
_MAX_INTEGER_DIGITS = 20  # 2^64 - 1 has 20; longer ones only cost time
_MAX_CONFIG_DEPTH = 100


def format_error(path: Path, field: str, value: object, limit: str) -> WeightFormatError:
    """The error for `field` of the file `path` being `value` where `limit` must hold."""
    return WeightFormatError(f"{path.name}: {field} is {shown(value)}; {limit}")


def unreadable(path: Path, error: OSError) -> WeightFormatError:
    """The error for a file that the system does not let us read."""
    return WeightFormatError(f"{path.name[:_MAX_NAME]}: it cannot be read: {error.strerror or error}")


def refuse_pointer(path: Path, head: bytes) -> None:
    """Refuses what a repository that was cloned without Git LFS has in the place of its large files.

    Raises:
        WeightFormatError: `head`, the first bytes of the file, are those of a pointer.
    """
    if head.startswith(GIT_LFS_POINTER):
        raise WeightFormatError(
            f"{path.name}: this is a Git LFS pointer, not the file itself; `git lfs pull` in its folder fetches that"
        )


def parse_json(path: Path, text: bytes) -> Any:
    """JSON that says where bytes lie: duplicate keys, NaN, endless integers and deep nesting are WeightFormatErrors."""

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
    value: dict[str, Any] = _object(path, parse_json(path, _read_bytes(path)))
    return value


def _read_bytes(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise ModelNotFoundError(f"no file at {path}")
        size = path.stat().st_size
        content = b"" if size > MAX_JSON_BYTES else path.read_bytes()
    except ModelNotFoundError:
        raise
    except OSError as error:
        raise unreadable(path, error) from None
    if size > MAX_JSON_BYTES:
        raise format_error(path, "file size", size, f"the limit is {MAX_JSON_BYTES}")
    refuse_pointer(path, content)
    return content


def _object(path: Path, value: Any) -> Any:
    if not isinstance(value, dict):
        raise format_error(path, "top-level value", value, "it must be a JSON object")
    return value


class ConfigObject(dict[str, Any]):
    """An object of a configuration file.

    A key may stand twice in it: JSON says nothing of that, and readers take the last. But where the values differ nobody knows
    which was meant, so reading such a key, or one whose value has such a key in it, is a WeightFormatError.
    """

    def __init__(self, path: Path, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self._path = path
        self.contradictions: dict[str, str] = {}  # key -> what is said twice, with the keys above it
        for key, value in pairs:
            if not _is_same(value, super().__getitem__(key)):
                self.contradictions[key] = key
            if isinstance(value, ConfigObject) and value.contradictions:
                self.contradictions[key] = f"{key}.{next(iter(value.contradictions.values()))}"

    def __getitem__(self, key: str) -> Any:
        self._check(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of any mapping. Raises as the class says."""
        self._check(key)
        return super().get(key, default)

    def _check(self, key: str) -> None:
        if key in self.contradictions:
            name = self.contradictions[key]
            raise format_error(self._path, "JSON key", name, "it stands twice, with different values")


def _is_same(one: object, other: object) -> bool:
    return one is other or (type(one) is type(other) and repr(one) == repr(other))


def read_config(path: Path) -> ConfigObject:
    """The JSON object in a configuration file. Infinity and NaN are numbers, a byte order mark is passed over, and a key may stand
    twice (see `ConfigObject`): whoever reads a value says what it must be.

    Raises:
        ModelNotFoundError: there is no such file.
        WeightFormatError: it is not JSON, no object, or nested without sense.
    """
    content = _read_bytes(path)
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=lambda pairs: ConfigObject(path, pairs))
    except UnicodeDecodeError as error:
        raise format_error(path, "JSON byte", error.start, "it must be valid UTF-8") from None
    except json.JSONDecodeError as error:
        raise format_error(path, "JSON", error.msg, f"parsing stopped at character {error.pos}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise format_error(path, "JSON", str(error), "no setting needs it") from None
    except RecursionError:
        raise _too_deep(path) from None
    if not _is_within(value, _MAX_CONFIG_DEPTH):
        raise _too_deep(path)
    made: ConfigObject = _object(path, value)
    return made


def _too_deep(path: Path) -> WeightFormatError:
    return format_error(path, "JSON nesting", "too deep", f"the limit is {_MAX_CONFIG_DEPTH} levels")


def _is_within(value: object, depth: int) -> bool:
    """Whether a JSON value has no more levels than `depth`."""
    level = [value]
    for _ in range(depth):
        level = [child for parent in level for child in _children(parent)]
    return not level


def _children(value: object) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
