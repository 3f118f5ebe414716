"""JSON as it leaves Pellucid: always UTF-8, always values that JSON has. All of it is made here.

Python's strings may hold lone surrogates (an escape of half a character, a file's name that is not UTF-8), which no encoding can
carry: each becomes U+FFFD. JSON has no NaN and no infinities: they become null.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

from pellucid.errors import InvalidRequestError

_SURROGATE = re.compile("[\ud800-\udfff]")


def well_formed(text: str) -> str:
    """`text` with each pair of surrogates as the character that it stands for, and with U+FFFD for a lone one."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def lone_surrogate(text: str) -> str | None:
    """The first surrogate of a text and its place, in words; None for a text that can be encoded."""
    found = None if text.isascii() else _SURROGATE.search(text)
    return found and f"the lone surrogate U+{ord(found[0]):04X} at position {found.start()}"


def encode(value: Any) -> bytes:
    """`value` on one line, for a wire or a file: dicts, lists, numbers, texts, dataclasses, msgspec's structs and raw JSON."""
    try:
        return _encoder()(value)
    except UnicodeEncodeError:
        return _encoder()(_sendable(value))


def dumps(value: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """`value` as a text that people read, too: `ascii_only` for where other characters cannot be written."""
    return json.dumps(_sendable(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False)


def loads(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError: it is none; NaN and infinities are none."""
    return json.loads(text, parse_constant=_no_number, parse_float=_finite)


@lru_cache(maxsize=1)
def _encoder() -> Callable[[Any], bytes]:
    import msgspec  # which the command line does without

    return msgspec.json.Encoder(enc_hook=dict).encode  # mappings of any kind


def path_of(location: Sequence[int | str]) -> str:
    """`messages[0].content` for ("messages", 0, "content")."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".")


def check_values(value: Any, whole: str) -> None:
    """Checks what was read of a JSON text: that its texts are well-formed and its numbers finite. `whole` is what it is called.

    Raises:
        InvalidRequestError: naming the place.
    """
    _check(value, (), whole)


def _check(value: Any, path: tuple[int | str, ...], whole: str) -> None:
    where = path_of(path) or None
    begin = "" if where else f"{whole} "
    if isinstance(value, str):
        found = lone_surrogate(value)
        if found:
            raise InvalidRequestError(where, f"{begin}holds {found}", limit="it must be well-formed Unicode")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidRequestError(
                where, f"{begin}is {value}", limit="it must be a finite number, for JSON has no others"
            )
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check(item, (*path, index), whole)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check(key, path, whole)
            _check(item, (*path, key), whole)


def _sendable(value: Any) -> Any:
    """A copy in which texts are well-formed and numbers are finite."""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {well_formed(str(key)): _sendable(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_sendable(one) for one in value]
    if hasattr(value, "__struct_fields__") or dataclasses.is_dataclass(value):
        import msgspec

        return _sendable(msgspec.to_builtins(value, str_keys=True, enc_hook=dict))
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is more than a number can be")
    return value
