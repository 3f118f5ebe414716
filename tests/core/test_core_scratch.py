"""Memory of programs: whatever shares it, and whoever fills what is dead with NaN, no bit changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from utils.children import finished
from utils.core_attention import available_isas, context, same_bits
from utils.random_programs import Outcome, RandomModel, RandomProgram, batches

from pellucid.core import abi

CSRC = Path(__file__).parents[2] / "csrc"
KV_DTYPES = (abi.F32, abi.BF16, abi.I8)


def assert_same(found: list[Outcome], expected: list[Outcome]) -> None:
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert same_bits(one[0], other[0]), f"hidden states of step {step} differ"
        assert same_bits(one[1], other[1]), f"logits of step {step} differ"


def spans_of(seed: int) -> list[list[tuple[int, int]]]:
    """A step of prompts, one of them about 1,024 positions long; then few rows, the long one among them; then a chunk beside them."""
    rng = np.random.default_rng(seed)
    lengths = [1024 + int(rng.integers(-1, 8)), *(int(n) for n in rng.integers(1, 40, int(rng.integers(1, 5))))]
    first = [(0, n) for n in lengths]
    decode = [(n, n + 1) for n in lengths]
    mixed = [(n + 1, n + 1 + int(rng.integers(1, 6))) for n in lengths]
    return [first, decode, mixed]


@pytest.mark.parametrize("seed", range(24))
def test_random_program_when_dead_memory_is_poisoned_then_equals_its_ops_one_by_one(seed: int) -> None:
    isa = available_isas()[seed % len(available_isas())]
    program = RandomProgram(RandomModel(seed))
    steps, n_blocks = batches(spans_of(seed), seed)
    dtype = KV_DTYPES[seed // 3 % 3]
    expected = program.run_op_by_op(context(isa, 1), steps, program.cache(dtype, n_blocks))
    assert all(np.isfinite(hidden).all() and np.isfinite(logits).all() for hidden, logits in expected)
    for threads in (1, 2, 3):
        assert_same(program.run(context(isa, threads), steps, program.cache(dtype, n_blocks)), expected)
        poisoning = abi.Context(threads, isa, poison=True)
        assert_same(program.run(poisoning, steps, program.cache(dtype, n_blocks)), expected)
        poisoning.close()


def test_placement_when_regions_of_a_step_overlap_then_it_is_refused(tmp_path: Path) -> None:
    """Random lives are placed without an overlap, and the check finds every one that is made by hand."""
    binary = tmp_path / "placement"
    sources = [CSRC.parent / "tests/core/c/scratch_placement.cpp", CSRC / "src/scratch.cpp", CSRC / "src/error.cpp"]
    build = [
        "g++",
        "-std=c++17",
        "-O1",
        "-g",
        f"-I{CSRC}/src",
        f"-I{CSRC}/include",
        *map(str, sources),
        "-o",
        str(binary),
    ]
    finished(build, check=True)
    done = finished([binary])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2000 placements" in done.stdout
