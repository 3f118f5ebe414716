"""Which hidden states and activations a request wants: rows by position, layers by number or name. Plain data.

A row belongs to a position of prompt + output. With P prompt tokens and N generated ones rows exist for positions
0 .. P + N - 2: the last generated token was never an input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from numbers import Real

import numpy as np
import numpy.typing as npt

from pellucid.errors import InvalidRequestError, shown_number
from pellucid.float32 import as_float32, first_not_finite

MAX_POSITIONS = 1 << 20
FINAL_LAYER = -1  # behind the final norm: the exact input of the head
_VALUE_BYTES = 4


def layer_name(layer: int) -> str:
    """The activation that is hidden layer `layer` >= 0: 0 is the embedding's output, i the residual stream behind block i."""
    return "embed_tokens" if layer == 0 else f"layers.{layer - 1}"


@dataclass(frozen=True)
class HiddenStatesLimits:
    """What a model has, and the most that one request may be handed."""

    num_layers: int
    hidden_size: int
    max_bytes: int
    activations: dict[str, int]  # names that can be captured, and their widths
    steerable: dict[str, int]  # those of them that a vector can be added to

    @staticmethod
    def num_bytes(num_values: int, n: int) -> int:
        """Of so many values for each of `n` choices."""
        return num_values * n * _VALUE_BYTES

    def refuse_when_large(self, told: str, num_values: int, n: int, field: str) -> None:
        """Raises InvalidRequestError where they are more than a request may be handed; `told` has a place for their bytes."""
        needed = self.num_bytes(num_values, n)
        if needed > self.max_bytes:
            choices = f" for each of {n} choices" if n > 1 else ""
            raise InvalidRequestError(
                field,
                (f"{told.format(f'{needed:,}')}{choices})",),
                limit=f"hidden_states_max_mb allows {self.max_bytes:,}",
            )


@dataclass(frozen=True)
class HiddenStatesParams:
    """`positions` >= 0 count from the first token of the prompt, negative ones from the last row that exists; None: that row
    alone. `layers`: 0 is the embedding's output, i the residual stream behind block i, -1 what the head reads; None: that
    alone. `stream`: each token's chunk carries the row that the token was sampled from."""

    positions: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    stream: bool = False

    @classmethod
    def from_request(
        cls,
        return_hidden_states: object = False,
        for_tokens: object = None,
        layers: object = None,
        stream: object = False,
    ) -> HiddenStatesParams | None:
        """What the fields of a request say; None when nothing is wanted.

        Raises:
            InvalidRequestError: a field is of another type, or said without `return_hidden_states`.
        """
        flags = {"return_hidden_states": return_hidden_states, "hidden_states_stream": stream}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise InvalidRequestError(name, "is", flag, "it must be true or false")
        found = cls(
            _integers("hidden_states_for_tokens", for_tokens), _integers("hidden_states_layers", layers), bool(stream)
        )
        if return_hidden_states:
            return found
        if found != cls():
            said = "hidden_states_for_tokens" if found.positions is not None else "hidden_states_layers"
            said = said if found.positions is not None or found.layers is not None else "hidden_states_stream"
            raise InvalidRequestError(said, "needs return_hidden_states to be true")
        return None

    @property
    def is_flat(self) -> bool:
        """True when one row alone is handed out."""
        return self.positions is None and self.layers is None

    @property
    def wanted_layers(self) -> tuple[int, ...]:
        """In the order of the request."""
        return (FINAL_LAYER,) if self.layers is None else self.layers

    def check(self, num_prompt_tokens: int, max_tokens: int, n: int, limits: HiddenStatesLimits) -> int:
        """Refuses what can never exist, and more than a request of `n` choices may take; gives the values of each choice.

        Raises:
            InvalidRequestError: naming the field, the value and the limit.
        """
        most = num_prompt_tokens + max_tokens - 1  # rows
        for position in self.positions or ():
            if not -most <= position < most:
                told = f"{num_prompt_tokens:,} prompt tokens and at most {max_tokens:,} generated ones"
                raise InvalidRequestError(
                    "hidden_states_for_tokens",
                    f"names position {shown_number(position)}",
                    limit=f"{told} have rows in [{-most:,}, {most:,})",
                )
        for layer in self.wanted_layers:
            if not -1 <= layer <= limits.num_layers:
                raise InvalidRequestError(
                    "hidden_states_layers", f"names layer {layer}", limit=f"layers are -1 and [0, {limits.num_layers}]"
                )
            if layer != FINAL_LAYER and layer_name(layer) not in limits.activations:
                raise InvalidRequestError(
                    "hidden_states_layers",
                    f"names layer {layer}",
                    limit=f"the model has no activation {layer_name(layer)!r}",
                )
        rows = most if self.stream else 1 if self.positions is None else len(self.positions)
        width = len(self.wanted_layers) * limits.hidden_size
        shape = f"{rows:,} rows of {len(self.wanted_layers)} layers of {limits.hidden_size:,} values"
        field = "hidden_states_for_tokens" if self.layers is None else "hidden_states_layers"
        limits.refuse_when_large(f"the hidden states take up to {{}} bytes ({shape}", rows * width, n, field)
        return rows * width


# By the name of an activation: rows [begin, end) of the batch, and the vector that is added to each of them.
Steering = Mapping[str, Sequence[tuple[int, int, npt.NDArray[np.float32]]]]
NO_STEERING: Steering = {}
MAX_STEERED = 256  # activations of one request


@dataclass(frozen=True)
class SteeringParams:
    """Vectors that are added to activations at every position of a request, by name. They are kept as copies in float32.

    Raises:
        InvalidRequestError: a vector is none of numbers that are finite in float32.
    """

    vectors: dict[str, npt.NDArray[np.float32]]

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "vectors", {_name(name): _vector(name, values) for name, values in self.vectors.items()}
        )

    @classmethod
    def from_request(cls, steering: object) -> SteeringParams | None:
        """What the field of a request says: name -> numbers; None when nothing is wanted.

        Raises:
            InvalidRequestError: it is no mapping of names to finite numbers.
        """
        if steering is None:
            return None
        if not isinstance(steering, Mapping) or not 0 < len(steering) <= MAX_STEERED:
            raise InvalidRequestError("steering", "is", steering, f"it must map 1 to {MAX_STEERED} names to vectors")
        return cls(dict(steering))

    def check(self, limits: HiddenStatesLimits) -> None:
        """Refuses what the model has not.

        Raises:
            InvalidRequestError: naming the activation, the length and the width.
        """
        for name, vector in self.vectors.items():
            width = limits.steerable.get(name)
            if width is None:
                raise InvalidRequestError(
                    "steering",
                    f"names {name!r}",
                    limit="the model has no such activation that a vector can be added to",
                )
            if vector.shape != (width,):
                raise InvalidRequestError(
                    f"steering[{name!r}]", f"has {vector.size:,} values", limit=f"the activation is {width:,} wide"
                )

    @property
    def digest(self) -> str:
        """Two requests with the same one may share cached blocks."""
        found = blake2b(digest_size=16)
        for name in sorted(self.vectors):
            found.update(f"{len(name)}:{name}".encode() + self.vectors[name].tobytes())
        return found.hexdigest()


def _name(name: object) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= 256:
        raise InvalidRequestError("steering", "names", name, "it must be a name")
    return name


def _are_numbers(values: object) -> bool:
    """Texts that read as numbers and truths are none."""
    if isinstance(values, np.ndarray):
        return values.dtype.kind in "fiu"
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        return False
    return all(isinstance(value, Real) and not isinstance(value, bool) for value in values)


def _vector(name: object, values: object) -> npt.NDArray[np.float32]:
    try:
        vector = as_float32(values if _are_numbers(values) else [])
    except (TypeError, ValueError, OverflowError):
        vector = np.zeros(0, np.float32)
    if vector.ndim != 1 or not vector.size:
        raise InvalidRequestError(f"steering[{name!r}]", "is", values, "it must be finite numbers")
    index = first_not_finite(vector)
    if index is not None:
        value = np.asarray(values)[index]
        raise InvalidRequestError(
            f"steering[{name!r}][{index}]", f"is {value:g}", limit="it must be finite numbers, in float32 too"
        )
    return vector


MAX_CAPTURED = 4096  # entries of one request


@dataclass(frozen=True)
class CaptureParams:
    """Activations at every position that has a row. `names` may hold `*`, which stands for any characters but dots."""

    names: tuple[str, ...]

    @classmethod
    def from_request(cls, capture: object) -> CaptureParams | None:
        """What the field of a request says; None when nothing is wanted.

        Raises:
            InvalidRequestError: it is no list of texts.
        """
        if capture is None:
            return None
        if isinstance(capture, (str, bytes)) or not isinstance(capture, Sequence):
            raise InvalidRequestError("capture", "is", capture, "it must be a list of names")
        if not 0 < len(capture) <= MAX_CAPTURED:
            raise InvalidRequestError(
                "capture", f"has {len(capture):,} entries", limit=f"it must have 1 to {MAX_CAPTURED:,}"
            )
        for index, name in enumerate(capture):
            if not isinstance(name, str) or not 0 < len(name) <= 256:
                raise InvalidRequestError(f"capture[{index}]", "is", name, "it must be a name")
        return cls(tuple(capture))

    def resolve(self, limits: HiddenStatesLimits) -> tuple[str, ...]:
        """The names of the model that are meant, in the order in which they are computed.

        Raises:
            InvalidRequestError: a name stands for no activation.
        """
        wanted: set[str] = set()
        for name in self.names:
            found = [known for known in limits.activations if _stands_for(name, known)]
            if not found:
                raise InvalidRequestError(
                    "capture",
                    f"names {name!r}",
                    limit="the model has no such activation (`pellucid info MODEL --activations` lists them)",
                )
            wanted.update(found)
        return tuple(name for name in limits.activations if name in wanted)


def _stands_for(pattern: str, name: str) -> bool:
    """Whether the parts between dots are those of the name, each `*` standing for any text without dots. In time that grows with
    the product of both lengths at most, whatever the pattern."""
    asked, known = pattern.split("."), name.split(".")
    return len(asked) == len(known) and all(map(_part_stands_for, asked, known))


def _part_stands_for(pattern: str, part: str) -> bool:
    first, *others = pattern.split("*")
    if not others:
        return pattern == part
    *middle, last = others
    at, end = len(first), len(part) - len(last)
    if at > end or not (part.startswith(first) and part.endswith(last)):
        return False
    for text in middle:
        found = part.find(text, at, end)
        if found < 0:
            return False
        at = found + len(text)
    return True


class WantedRows:
    """The positions that may be handed out, found out of a request's parameters and the length of its prompt."""

    def __init__(self, params: HiddenStatesParams, num_prompt_tokens: int) -> None:
        positions = (-1,) if params.positions is None else params.positions
        self._exact = frozenset(position for position in positions if position >= 0)
        self.num_last = max((-position for position in positions if position < 0), default=0)
        self._tail: int | None = None  # all from here on may be among the last
        if self.num_last:
            self._tail = max(0, num_prompt_tokens - self.num_last)
        if params.stream:
            self._tail = min(num_prompt_tokens - 1, num_prompt_tokens - 1 if self._tail is None else self._tail)
        self._keeps_all = params.stream

    @property
    def first(self) -> int:
        """No row before this position is wanted: what the prefix cache holds up to here need not be computed."""
        starts = [*([] if self._tail is None else [self._tail]), *([min(self._exact)] if self._exact else [])]
        return min(starts)

    def among(self, begin: int, end: int) -> list[int]:
        """Wanted positions in [begin, end), ascending."""
        if self._tail is not None and self._tail <= begin:
            return list(range(begin, end))
        tail = end if self._tail is None else self._tail
        return [position for position in range(begin, end) if position >= tail or position in self._exact]

    def is_passing(self, position: int) -> bool:
        """Whether a row is wanted only while it is among the last `num_last`."""
        return not self._keeps_all and position not in self._exact


def resolve(params: HiddenStatesParams, num_rows: int) -> list[int]:
    """The positions to hand out when `num_rows` rows exist, in the order of the request; those that never came are absent."""
    asked = (-1,) if params.positions is None else params.positions
    found = [position if position >= 0 else num_rows + position for position in asked]
    return [position for position in found if 0 <= position < num_rows]


def _integers(name: str, value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise InvalidRequestError(name, "is", value, "it must be a list of integers")
    if not 0 < len(value) <= MAX_POSITIONS:
        raise InvalidRequestError(name, f"has {len(value):,} entries", limit=f"it must have 1 to {MAX_POSITIONS:,}")
    for index, item in enumerate(value):
        if isinstance(item, bool) or not isinstance(item, int):
            raise InvalidRequestError(f"{name}[{index}]", "is", item, "it must be an integer")
    return tuple(value)
