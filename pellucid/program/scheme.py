"""`WeightScheme`: the stored type of every matrix of a program."""

from __future__ import annotations

from dataclasses import dataclass

from pellucid.core import abi
from pellucid.errors import ConfigError
from pellucid.weights.tensor import DTYPES, TensorView

# Block formats that the core multiplies with as they are stored.
KEPT = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")
FLOATS = ("F32", "BF16", "F16")
DTYPE_NAMES = {
    abi.F32: "float32",
    abi.BF16: "bfloat16",
    abi.Q8_0: "Q8_0",
    abi.Q4_0: "Q4_0",
    abi.Q4_1: "Q4_1",
    abi.Q4_K: "Q4_K",
    abi.Q5_K: "Q5_K",
    abi.Q6_K: "Q6_K",
    abi.I8: "int8 per channel",
}
_GROUP = 32  # values of K that share a scale
_MAX_CHANNEL_COLS = 65_536  # so that a row's sum of products stays within an int32


@dataclass(frozen=True)
class WeightScheme:
    """How matrices are stored. `keep`: quantised tensors of the file stay as they are. `quantization`: as in EngineConfig.

    `float_dtype` is the core's code for matrices that are not quantised.
    """

    float_dtype: int
    keep: bool = False
    quantization: str | None = None

    def dtype_of(self, piece: TensorView, *, is_head: bool) -> int:
        """The core's code for the rows of `piece`. The embedding and the head (`is_head`) keep 8 bits.

        Raises:
            ConfigError: the piece is quantised already, and `quantization` would round it again.
        """
        if self.quantization is None:
            kept = self.keep and piece.dtype in KEPT
            return DTYPES[piece.dtype].pld_dtype or 0 if kept else self.float_dtype
        if piece.dtype not in FLOATS:
            raise ConfigError(
                f"quantization is {self.quantization!r}, but {piece.name} is stored as {piece.dtype}: it would be rounded "
                "twice; leave quantization out to keep the stored precision"
            )
        if self.quantization == "int8_channel" or piece.cols % _GROUP:
            return abi.I8 if piece.cols <= _MAX_CHANNEL_COLS else self.float_dtype
        return abi.Q4_1 if self.quantization == "int4" and not is_head else abi.Q8_0
