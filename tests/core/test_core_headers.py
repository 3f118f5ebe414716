"""Callers that were built against other headers than the core's: older ones, kept in `headers`, and a longer one."""

from __future__ import annotations

import re
import shutil
from functools import lru_cache
from pathlib import Path

import pytest
from utils.children import finished

from pellucid.core import abi

HERE = Path(__file__).resolve().parent
TODAY = HERE.parents[1] / "csrc" / "include" / "pellucid.h"
# name -> what any_header.c is told of it
HEADERS = {
    "first": ["-DHEADER=1"],
    "by value": ["-DHEADER=2"],
    "today": ["-DHEADER=3"],
    "longer": ["-DHEADER=3", "-DLONGER"],
}
OLD = {"first": "pellucid_1.h", "by value": "pellucid_2.h"}

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def longer(header: str) -> str:
    """The header with a field more at the end of every struct."""
    text, count = re.subn(
        r"^\} (pld_\w+);", r"  int64_t added_first[3];\n  int64_t added_last;\n} \1;", header, flags=re.M
    )
    assert count >= 16
    return text


def is_sanitized() -> bool:
    return "sanitize-address" in str(abi.library()._name)


def run_caller(folder: Path, header: str, level: str) -> list[str]:
    """What a caller that was built against a header prints, line by line."""
    include = folder / f"{header} {level}"
    include.mkdir()
    source = (HERE / "headers" / OLD[header]).read_text() if header in OLD else TODAY.read_text()
    (include / "pellucid.h").write_text(longer(source) if header == "longer" else source)
    library, target = Path(abi.library()._name), include / "caller"
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", level, f"-I{include}", f"-Wl,-rpath,{library.parent}"]
    flags += ["-fsanitize=address"] if is_sanitized() else []
    finished(["cc", *flags, *HEADERS[header], HERE / "c" / "any_header.c", library, "-o", target], check=True)
    done = finished([target])
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@lru_cache(maxsize=1)
def expected(folder: Path) -> list[str]:
    return run_caller(folder, "today", "-O1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers")


@pytest.mark.parametrize("level", ["-O0", "-O2"])
@pytest.mark.parametrize("header", HEADERS)
def test_caller_when_built_against_a_header_then_its_numbers_are_those_of_today(
    folder: Path, header: str, level: str
) -> None:
    printed, lines = run_caller(folder, header, level), expected(folder)
    assert [line.split()[0] for line in lines] == [
        *("op", "hidden", "logits", "free", "pos", "decoded", "sampled", "sampled")
    ]
    assert printed == (lines[:3] if header == "first" else lines)  # the first header had no decode


def test_headers_when_kept_then_they_are_not_todays() -> None:
    assert all((HERE / "headers" / name).read_text() != TODAY.read_text() for name in OLD.values())
