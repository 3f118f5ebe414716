"""An op call in the one form that every backend takes: recorder, native, reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from pellucid.core.structs import NUM_FLOATS
from pellucid.errors import ConfigError, ForeignOperationError, UnsupportedModelError
from pellucid.float32 import problem_of

# Codes of csrc/include/pellucid.h.
OP_KINDS = {
    "embedding": 1,
    "linear": 2,
    "rms_norm": 3,
    "layer_norm": 4,
    "rope_table": 5,
    "rotary": 6,
    "attention": 7,
    "act_and_mul": 8,
    "act": 9,
    "add": 10,
    "scale": 11,
    "softcap": 12,
    "moe": 13,
    "gather_rows": 14,
    "sample": 15,
}
OP_NAMES = {code: name for name, code in OP_KINDS.items()}
ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
ACTIVATION_NAMES = {code: name for name, code in ACTIVATIONS.items()}
# Other names of the same functions, as transformers' `ACT2FN` has them.
ACTIVATION_ALIASES = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "linear": "none",
}
# What an embedding or a rope_table reads of the batch; by itself an embedding reads token ids, a rope_table positions.
IDS_TOKENS, IDS_POSITIONS = 1, 2
ID_OPS = {"embedding": IDS_TOKENS, "rope_table": IDS_POSITIONS}
# Which operand of these ops is a matrix, kept in packed panels; every other weight is a float32 vector or table.
MATRIX_OPERANDS = {"linear": (0,), "moe": (0, 1), "embedding": (0,)}


def core_floats(kind: str, floats: tuple[float, ...]) -> list[float]:
    """An op's numbers as they are written into a pld_op.

    Raises:
        ConfigError: one is not finite in float32, or vanishes there.
    """
    for index, value in enumerate(floats):
        problem = problem_of(value)
        if problem is not None:
            raise ConfigError(f"number {index} of op {kind} is {value}; {problem}")
    return [*floats, *[0.0] * (NUM_FLOATS - len(floats))]


@dataclass(frozen=True)
class OpSpec:
    """One call: `inputs` are tensors or symbols [rows, width]; `weights` parameters, tensors or numpy constants; None is absent."""

    kind: str
    inputs: tuple[Any, ...]
    weights: tuple[Any, ...] = ()
    ints: tuple[int, ...] = ()
    floats: tuple[float, ...] = ()
    out_widths: tuple[int, ...] = ()


def activation_name(name: str) -> str:
    """The name of an activation in `ACTIVATIONS`, from that or any other name that it has.

    Raises:
        UnsupportedModelError: there is none of that name; the text lists all.
    """
    found = ACTIVATION_ALIASES.get(name, name)
    if found not in ACTIVATIONS:
        known = ", ".join([*ACTIVATIONS, *ACTIVATION_ALIASES])
        raise UnsupportedModelError(f"activation is {name[:80]!r}; known are {known}")
    return found


class Recorder(Protocol):
    """What a symbol belongs to: it turns a call on symbols into a line of the program."""

    def record(self, spec: OpSpec) -> tuple[Symbol, ...]:
        """Appends the op and returns symbols for its outputs."""


@dataclass(frozen=True, eq=False)
class Symbol:
    """Stands for a float32 [rows, width] tensor while a module is traced. `domain` is "T" (tokens) or "L" (logit rows).

    Whatever is done with it that is no op of Pellucid raises `ForeignOperationError`.
    """

    recorder: Recorder
    buffer: int
    column: int
    width: int
    domain: str = "T"

    @property
    def shape(self) -> tuple[Any, int]:
        """Rows and width. How many rows there are is no number: one program serves any."""
        return _Shape((_NUM_ROWS[self.domain], self.width))

    def split(self, widths: int | list[int], dim: int = 0) -> tuple[Symbol, ...]:
        """Column ranges of this symbol, as `torch.Tensor.split` gives them, without an op."""
        if dim not in (-1, 1):
            raise foreign(f"Tensor.split along dimension {dim}")
        if isinstance(widths, int):
            widths = [min(widths, self.width - begin) for begin in range(0, self.width, widths)]
        if sum(widths) != self.width:
            raise ValueError(f"cannot split width {self.width} into {widths}")
        column, parts = self.column, []
        for width in widths:
            parts.append(Symbol(self.recorder, self.buffer, column, width, self.domain))
            column += width
        return tuple(parts)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python asks for these by itself
            raise AttributeError(name)
        raise foreign(f"Tensor.{name}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        module = getattr(func, "__module__", None) or "torch"
        raise foreign(f"{module.removeprefix('torch._C.')}.{getattr(func, '__name__', func)}")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        raise foreign(f"numpy.{ufunc.__name__}")


def foreign(operation: str) -> ForeignOperationError:
    """The error of an operation that is none of `pellucid.ops`."""
    return ForeignOperationError(f"the module uses {operation}, which is none of pellucid.ops")


def _refusing(operation: str) -> Any:
    def method(self: object, *args: Any, **kwargs: Any) -> Any:
        raise foreign(operation)

    return method


class _NumRows:
    """How many rows there are. Code that asks, to count, to compare or to make a tensor of as many, can only be run."""

    __slots__ = ("domain",)

    def __init__(self, domain: str) -> None:
        self.domain = domain

    def __repr__(self) -> str:
        return self.domain

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise foreign("Tensor.shape[0]")


_NUM_ROWS = {domain: _NumRows(domain) for domain in "TL"}


class _Shape(tuple[Any, int]):
    """[rows, width], of which only the width is given away."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        if index in (1, -1):
            return tuple.__getitem__(self, 1)
        raise foreign("Tensor.shape[0]")

    __iter__ = _refusing("Tensor.shape[0]")


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
_OTHERS = (
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "neg",
    "pos",
    "abs",
    "invert",
    "bool",
    "len",
    "iter",
    "getitem",
    "setitem",
)
_CONVERSIONS = ("contains", "float", "int", "index", "array")
for _name in (*(prefix + name for name in _BINARY for prefix in ("", "r", "i")), *_OTHERS, *_CONVERSIONS):
    setattr(Symbol, f"__{_name}__", _refusing(f"Tensor.__{_name}__"))
    if _name not in ("len", "iter", "getitem", "setitem", "contains", "array"):
        setattr(_NumRows, f"__{_name}__", _refusing("Tensor.shape[0]"))
Symbol.__hash__ = object.__hash__  # type: ignore[method-assign]  # by identity: comparing is an operation too
