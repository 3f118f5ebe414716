"""Checksums of program files: what is covered, that Python and the core read the same, and that every damaged bit is found."""

from __future__ import annotations

import ctypes
import json
import os
import random
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from utils.core_model import CoreModel
from utils.disks import flip
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM
from pellucid.commands.compile import compile_model
from pellucid.config import EngineConfig
from pellucid.core import abi
from pellucid.errors import DamagedFileError, NativeError, PellucidError, WeightFormatError
from pellucid.program import checksums
from pellucid.program.builder import FORMAT_VERSION
from pellucid.program.checksums import BLOCK_BYTES, content_bytes, first_bad_block, num_blocks, reseal, table_bytes
from pellucid.program.file import INDEXED, open_program_file, write_program_file
from pellucid.program.verify import verify_file

# Some blocks of 1 MiB of weights, so that there is something behind what is checked when a file is opened.
SIZES = {"hidden_size": 256, "intermediate_size": 1024}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = build_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama", **SIZES)
    target = tmp_path_factory.mktemp("compiled") / "tiny.pld"
    compile_model(EngineConfig(model=str(checkpoint)), target)
    return target


@pytest.fixture
def copy(compiled: Path, tmp_path: Path) -> Path:
    path = tmp_path / "m.pld"
    path.write_bytes(compiled.read_bytes())
    return path


def bad_block_of(path: Path, *, by_core: bool) -> int | None:
    with open(path, "rb") as file:
        if not by_core:
            return first_bad_block(file.fileno())
        found = {abi.verify_file(file.fileno(), 0, ctypes.c_int32(), idle=idle) for idle in (False, True)}
        assert len(found) == 1
        return found.pop()


def sections_of(path: Path) -> dict[str, tuple[int, int]]:
    """Name -> (first byte, end) of everything in a file."""
    whole = path.read_bytes()
    header_end = 96 + int.from_bytes(whole[8:16], "little")
    base = -(-header_end // 64) * 64
    table = json.loads(whole[96:header_end])["sections"]
    found = {"magic": (0, 8), "header length": (8, 16), "index": (16, 96), "header": (96, header_end)}
    found |= {name: (base + at, base + at + count) for name, (at, count) in table.items()}
    return found | {"checksums": (content_bytes(len(whole)) or 0, len(whole))}


# ---- geometry ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 2**36).map(lambda units: 64 * units))
@example(64)
@example(BLOCK_BYTES)
@example(BLOCK_BYTES + 64)
@example(1000 * BLOCK_BYTES)
def test_any_content_when_its_checksums_follow_then_the_size_says_where(content: int) -> None:
    whole = content + table_bytes(content)
    assert content_bytes(whole) == content
    assert all(content_bytes(whole + other) is None for other in range(-63, 64) if other)


def test_sizes_that_no_file_has_when_asked_then_none() -> None:
    sizes = {content + table_bytes(content) for content in range(64, 2000, 64)}
    assert [size for size in range(1990) if content_bytes(size) is not None] == sorted(s for s in sizes if s < 1990)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 63, 64, 1000, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1])
def test_content_of_any_size_when_summed_by_core_and_python_then_they_agree(tmp_path: Path, size: int) -> None:
    path, content = tmp_path / "a", random.Random(size).randbytes(size + 1)
    path.write_bytes(content)
    reseal(path)
    assert path.stat().st_size == content_bytes(path.stat().st_size) + table_bytes(-(-(size + 1) // 64) * 64)  # type: ignore[operator]
    assert bad_block_of(path, by_core=False) is None
    assert bad_block_of(path, by_core=True) is None
    flip(path, size)
    assert bad_block_of(path, by_core=False) == bad_block_of(path, by_core=True) == size // BLOCK_BYTES


def test_checksums_when_taken_piece_by_piece_then_those_of_the_whole() -> None:
    content = np.frombuffer(random.Random(1).randbytes(3 * BLOCK_BYTES + 640), np.uint8)
    sums = checksums.Checksums(content)
    for final in (5, BLOCK_BYTES, BLOCK_BYTES, 2 * BLOCK_BYTES + 100):
        sums.advance(final)
    blocks = [content[at : at + BLOCK_BYTES].tobytes() for at in range(0, content.nbytes, BLOCK_BYTES)]
    table = b"".join(zlib.crc32(block).to_bytes(4, "little") for block in blocks)
    assert sums.finish() == table + zlib.crc32(table).to_bytes(4, "little")


def test_weights_when_packed_in_order_then_no_block_is_summed_before_it_is_final(tmp_path: Path) -> None:
    def fill(data: Any) -> Iterator[int]:
        for at in range(0, len(data), 300_000):
            data[at : at + 300_000] = at // 300_000 + 1
            yield min(at + 300_000, len(data))

    write_program_file(tmp_path / "a.pld", {"kind": "program"}, {"ops": b"abc"}, 5_000_000, fill)
    assert bad_block_of(tmp_path / "a.pld", by_core=True) is None
    assert open_program_file(tmp_path / "a.pld").sections["data"][-1] == 17


# ---- damage -----------------------------------------------------------------------------------------------------------


def test_file_when_compiled_then_all_of_it_is_covered(compiled: Path) -> None:
    assert bad_block_of(compiled, by_core=False) is None
    assert bad_block_of(compiled, by_core=True) is None
    file = open_program_file(compiled)
    verify_file(file, is_ours=False)
    assert set(INDEXED) <= set(sections_of(compiled))
    assert sections_of(compiled)["data"][1] > 2 * BLOCK_BYTES
    assert file.meta["format_version"] == FORMAT_VERSION


NAMES = (
    *("magic", "header length", "index", "header", "plan", "ops", "buffers", "weights", "data"),
    *("config", "generation_config", "tokenizer", "checksums"),
)


@pytest.mark.parametrize("name", NAMES)
def test_bit_of_any_section_when_flipped_then_a_typed_error_before_anything_runs(copy: Path, name: str) -> None:
    begin, end = sections_of(copy)[name]
    draw = random.Random(name)
    for at in {begin, end - 1, *(draw.randrange(begin, end) for _ in range(6))}:
        bit = draw.randrange(8)
        flip(copy, at, bit)
        with pytest.raises(WeightFormatError) as raised:
            verify_file(open_program_file(copy), is_ours=False)
        assert "m.pld" in str(raised.value)
        with pytest.raises(PellucidError):
            LLM(copy, num_blocks=16, num_threads=1, verify=True)
        assert bad_block_of(copy, by_core=True) is not None
        flip(copy, at, bit)
    verify_file(open_program_file(copy), is_ours=False)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "data"])
def test_bit_outside_the_data_when_flipped_then_found_without_being_asked_for(copy: Path, name: str) -> None:
    begin, end = sections_of(copy)[name]
    for at in (begin, (begin + end) // 2, end - 1):
        flip(copy, at, 3)
        with pytest.raises(WeightFormatError, match="m.pld"):
            open_program_file(copy)
        flip(copy, at, 3)


def test_block_of_data_when_damaged_then_the_error_names_file_block_and_byte(copy: Path) -> None:
    _, end = sections_of(copy)["data"]
    for at in (2 * BLOCK_BYTES, 2 * BLOCK_BYTES - 1, end - 1):
        block = at // BLOCK_BYTES
        flip(copy, at)
        with pytest.raises(DamagedFileError, match=f"m.pld is damaged: block {block} .*byte {block * BLOCK_BYTES:,}"):
            verify_file(open_program_file(copy), is_ours=False)
        assert bad_block_of(copy, by_core=False) == bad_block_of(copy, by_core=True) == block
        flip(copy, at)
    assert copy.exists(), "a file that somebody gave is never removed"


@pytest.mark.parametrize("change", [-1, -64, -(1 << 20), 1, 64, 1 << 20])
def test_file_when_cut_or_lengthened_then_a_typed_error_from_python_and_core(copy: Path, change: int) -> None:
    whole = copy.read_bytes()
    copy.write_bytes(whole[:change] if change < 0 else whole + bytes(change))
    with pytest.raises(WeightFormatError, match="m.pld"):
        open_program_file(copy)
    if change == 64:  # all that the core reads is there; its checksums, which it leaves to the caller, are not
        assert bad_block_of(copy, by_core=True) is not None
        return
    with pytest.raises(NativeError):
        CoreModel(copy, layout="slot")


def test_file_when_cut_while_it_is_read_then_it_is_damaged_and_no_signal(copy: Path) -> None:
    file = open_program_file(copy)
    os.truncate(copy, 2 * BLOCK_BYTES)
    with pytest.raises(DamagedFileError, match="m.pld is damaged"):
        verify_file(file, is_ours=False)


def test_file_of_an_older_version_when_given_then_refused_by_name(copy: Path) -> None:
    whole = copy.read_bytes()
    copy.write_bytes(b"PLDPROG2" + whole[8 : content_bytes(len(whole))])
    with pytest.raises(WeightFormatError, match=r"m.pld: a program of another version \(PLDPROG2; .*compile the model"):
        LLM(copy)
    with pytest.raises(NativeError, match="no compiled model of this version"):
        CoreModel(copy, layout="slot")


# ---- sealing anew -----------------------------------------------------------------------------------------------------


def test_file_when_changed_and_resealed_then_the_change_is_what_is_read(copy: Path) -> None:
    _, end = sections_of(copy)["data"]
    flip(copy, end - 1)
    before = copy.read_bytes()
    reseal(copy)
    size = content_bytes(len(before))
    assert copy.read_bytes()[:size] == before[:size], "nothing but the checksums is written"
    verify_file(open_program_file(copy), is_ours=False)
    assert bad_block_of(copy, by_core=True) is None


def test_any_rubbish_when_resealed_then_its_checksums_are_right(tmp_path: Path) -> None:
    draw, path = random.Random(3), tmp_path / "a"
    for size in (1, 63, 64, 65, 200, BLOCK_BYTES + 9, *(draw.randrange(1, 5000) for _ in range(50))):
        path.write_bytes(draw.randbytes(size))
        reseal(path)
        assert bad_block_of(path, by_core=True) is None
    path.write_bytes(b"")
    with pytest.raises(WeightFormatError, match="empty"):
        reseal(path)


def test_damage_under_right_checksums_when_opened_then_typed_errors_as_ever(copy: Path) -> None:
    sections, draw, refused = sections_of(copy), random.Random(5), 0
    whole = copy.read_bytes()
    for _ in range(60):
        name = draw.choice([n for n in NAMES if n not in ("data", "checksums", "tokenizer")])
        copy.write_bytes(whole)
        flip(copy, draw.randrange(*sections[name]), draw.randrange(8))
        reseal(copy)
        try:
            LLM(copy, num_blocks=16, num_threads=1, max_model_len=32).close()
        except PellucidError:
            refused += 1
    assert refused > 20


# ---- the core's own part ----------------------------------------------------------------------------------------------


def test_verification_when_told_to_stop_then_it_ends_without_a_word(copy: Path) -> None:
    with open(copy, "rb") as file:
        for idle in (False, True):
            assert abi.verify_file(file.fileno(), 1, ctypes.c_int32(1), idle=idle) is None


def test_verification_when_it_cannot_begin_then_a_native_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    with open(tmp_path / "a", "rb") as file, pytest.raises(NativeError, match="a file of 100 bytes has no checksums"):
        abi.verify_file(file.fileno(), 0, ctypes.c_int32(), idle=False)
    for idle in (False, True):
        with pytest.raises(NativeError, match="Bad file descriptor"):
            abi.verify_file(-1, 0, ctypes.c_int32(), idle=idle)
    with open(tmp_path / "a", "rb") as file, pytest.raises(NativeError, match="bytes_per_second is -1"):
        abi.verify_file(file.fileno(), -1, ctypes.c_int32(), idle=False)


def test_verification_when_it_has_a_rate_then_it_keeps_it(copy: Path) -> None:
    blocks = num_blocks(content_bytes(copy.stat().st_size) or 0)
    with open(copy, "rb") as file:
        began = time.monotonic()
        assert abi.verify_file(file.fileno(), 40 * BLOCK_BYTES, ctypes.c_int32(), idle=False) is None
    assert time.monotonic() - began >= (blocks - 1) / 40
