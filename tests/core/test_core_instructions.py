"""A guard against kernels that get slower unnoticed: instructions of one op under callgrind, on the AVX2 path, on one thread.

Timings on shared machines say little; counts are exact. The limits are a tenth above what GCC 12 makes of the code. callgrind does not
know AVX-512; the paths differ in the width of a vector.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from utils.children import finished

from pellucid.core import abi

HERE = Path(__file__).resolve().parent
# (op and type, rows): instructions, in thousands
LIMITS: dict[tuple[str, int], int] = {
    ("linear-f32", 1): 172,
    ("linear-f32", 32): 1627,
    ("linear-bf16", 1): 131,
    ("linear-bf16", 32): 1778,
    ("linear-q8_0", 1): 62,
    ("linear-q8_0", 32): 1264,
    ("linear-q4_0", 1): 53,
    ("linear-q4_0", 32): 1100,
    ("linear-q4_1", 1): 55,
    ("linear-q4_1", 32): 1140,
    ("linear-q4_k", 1): 70,
    ("linear-q4_k", 32): 1332,
    ("linear-q5_k", 1): 84,
    ("linear-q5_k", 32): 1491,
    ("linear-q6_k", 1): 86,
    ("linear-q6_k", 32): 1545,
    ("linear-i8", 1): 54,
    ("linear-i8", 32): 1020,
    ("attention-f32", 1): 289,
    ("attention-f32", 32): 7605,
    ("attention-bf16", 1): 337,
    ("attention-bf16", 32): 9566,
    ("attention-i8", 1): 502,
    ("attention-i8", 32): 10361,
}

pytestmark = pytest.mark.skipif(
    shutil.which("valgrind") is None or shutil.which("cc") is None, reason="needs valgrind and a C compiler"
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = Path(abi.library()._name)
    target = tmp_path_factory.mktemp("driver") / "one_op"
    include = HERE.parent.parent / "csrc" / "include"
    source = HERE / "c" / "one_op.c"
    flags = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", "-O1", "-I", include]
    link = [f"-Wl,-rpath,{library.parent}", "-o", target]
    finished(["cc", *flags, source, library, *link], check=True)
    return target


def instructions(driver: Path, case: str, rows: int, folder: Path) -> int:
    """Collected inside pld_op_run."""
    command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=pld_op_run"]
    out = f"--callgrind-out-file={folder / 'out'}"
    done = finished([*command, out, driver, case, str(rows)], timeout=600, check=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if found is None:
        raise AssertionError(done.stderr)
    return int(found.group(1))


@pytest.mark.parametrize(("case", "rows"), LIMITS)
def test_kernel_when_run_once_then_no_more_instructions_than_before(
    driver: Path, case: str, rows: int, tmp_path: Path
) -> None:
    if abi.ISA_CODES[abi.cpu_info().best_isa] < abi.ISA_CODES["avx2"]:
        pytest.skip("this machine has no AVX2")
    count = instructions(driver, case, rows, tmp_path)
    assert count <= 1000 * LIMITS[case, rows]
    assert count >= 500 * LIMITS[case, rows], "far below the limit: lower it, or nothing was computed"
