"""The counter-based random generator of the sampler: a draw is a pure function of (seed, position, choice index).

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011),
https://doi.org/10.1145/2063384.2063405. The seed is the 64-bit key; the 128-bit counter holds the position (64 bits),
the choice index (32 bits) and the purpose of the draw (32 bits), so that draws for different purposes never coincide.
"""

from __future__ import annotations

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9  # golden ratio
_WEYL_1 = 0xBB67AE85  # sqrt(3) - 1
_ROUNDS = 10
_MASK_32 = 0xFFFFFFFF
_MASK_64 = 0xFFFFFFFFFFFFFFFF

_PURPOSE_TOKEN = 0
_PURPOSE_SEED = 1


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """The four output words of Philox4x32-10 for a counter of four and a key of two 32-bit words, low word first."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> 32) ^ c1 ^ k0,
            product_1 & _MASK_32,
            (product_0 >> 32) ^ c3 ^ k1,
            product_0 & _MASK_32,
        )
        k0 = (k0 + _WEYL_0) & _MASK_32
        k1 = (k1 + _WEYL_1) & _MASK_32
    return c0, c1, c2, c3


def uniform(seed: int, position: int, choice_index: int) -> float:
    """A number in [0, 1) with 53 random bits.

    Args:
        seed: any integer; taken modulo 2**64.
        position: index of the token in the output, from 0.
        choice_index: which of the request's `n` choices.
    """
    high, low, _, _ = _block(seed, position, choice_index, _PURPOSE_TOKEN)
    return ((high >> 5) * 2.0**26 + (low >> 6)) * 2.0**-53


def draw_seed(engine_seed: int, request_number: int) -> int:
    """The seed, in [0, 2**63), of request `request_number`, which came to the engine without one."""
    low, high, _, _ = _block(engine_seed, request_number, 0, _PURPOSE_SEED)
    return (high >> 1) << 32 | low


def _block(seed: int, position: int, choice_index: int, purpose: int) -> tuple[int, int, int, int]:
    seed &= _MASK_64
    position &= _MASK_64
    counter = (position & _MASK_32, position >> 32, choice_index & _MASK_32, purpose)
    return philox4x32(counter, (seed & _MASK_32, seed >> 32))
