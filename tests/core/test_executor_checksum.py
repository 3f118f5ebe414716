"""Checksums of logits: as they are documented, and different wherever a row is."""

from __future__ import annotations

import numpy as np
import pytest

from pellucid.executor.checksum import row_checksums


def by_the_book(row: np.ndarray) -> int:
    content = row.astype("<f4").tobytes()
    words = [int.from_bytes(content[at : at + 8], "little") for at in range(0, len(content), 8)]
    total = sum(word * ((index + 1) * 0x9E3779B97F4A7C15 % 2**64 | 1) for index, word in enumerate(words))
    return (total % 2**64) >> 12


@pytest.mark.parametrize("width", [1, 2, 7, 300, 301])
def test_checksums_when_rows_are_even_odd_or_picked_then_as_documented(width: int) -> None:
    rows = np.random.default_rng(width).standard_normal((5, width)).astype(np.float32)
    expected = [by_the_book(row) for row in rows]
    assert row_checksums(rows) == expected
    assert row_checksums(rows[[3, 1]]) == [expected[3], expected[1]]
    assert row_checksums(rows[1:2]) == expected[1:2]


@pytest.mark.parametrize("width", [8, 9])
def test_checksum_when_one_bit_differs_then_so_does_it(width: int) -> None:
    row = np.random.default_rng(0).standard_normal((1, width)).astype(np.float32)
    expected = row_checksums(row)
    for place in range(width):
        for bit in range(32):
            other = row.copy()
            other.view(np.uint32)[0, place] ^= np.uint32(1 << bit)
            assert row_checksums(other) != expected
