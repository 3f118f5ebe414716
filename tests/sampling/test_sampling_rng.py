"""The counter-based generator: the published algorithm, 53 uniform bits, and no draw that stands for two purposes."""

from __future__ import annotations

import numpy as np
import pytest

from pellucid.sampling.rng import draw_seed, philox4x32, uniform

ONES = 0xFFFFFFFF

# counter, key and output of the known-answer tests published with Random123, the reference implementation
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_published_counter_and_key_when_generated_then_words_are_those_published(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert philox4x32(counter, key) == expected


def test_same_arguments_when_drawn_then_layout_of_key_and_counter_is_kept() -> None:
    # the layout of key and counter is a promise: another one would break the replay of recorded traces
    high, low = philox4x32((5, 0, 2, 0), (42, 0))[:2]
    assert uniform(42, 5, 2) == ((high >> 5) * 2**26 + (low >> 6)) / 2**53


def test_seed_of_64_bits_when_drawn_then_all_bits_count_and_sign_does_not() -> None:
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0)
    assert len({uniform(1 << bit, 0, 0) for bit in range(64)}) == 64


def test_positions_and_choices_when_drawn_then_all_differ() -> None:
    draws = {uniform(7, position, choice) for position in range(200) for choice in range(20)}
    assert len(draws) == 200 * 20
    assert uniform(7, 2**32, 0) != uniform(7, 0, 0)


def test_many_draws_when_binned_then_uniform_in_zero_one() -> None:
    draws = np.array([uniform(3, position, 0) for position in range(20_000)])
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    chi_square = float(((counts - 1000.0) ** 2 / 1000.0).sum())
    assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001
    assert abs(float(np.corrcoef(draws[:-1], draws[1:])[0, 1])) < 0.03
    assert len({int(draw * 2**53) & 0xFF for draw in draws}) == 256  # the lowest of the 53 bits are filled too


def test_requests_without_seed_when_engine_draws_then_seeds_differ_and_follow_the_engine_seed() -> None:
    seeds = [draw_seed(11, number) for number in range(1000)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    assert seeds == [draw_seed(11, number) for number in range(1000)]
    assert seeds[0] != draw_seed(12, 0)
