"""Writing files: whole or not at all, on full disks, beside other writers, and behind killed ones."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
from utils.children import child
from utils.disks import names, small_disk

from pellucid import files
from pellucid.errors import PellucidError, StorageError
from pellucid.files import LineFile, make_folder, remove_parts, remove_unused, whole_file, write_whole

MIB = 1 << 20


def fails_with(number: int) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_file_when_the_block_ends_then_it_stands_there_and_nothing_else_does(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a", 10) as file:
        file.write(b"x" * 10)
        assert [name for name in names(tmp_path) if name.endswith(".part")] == names(tmp_path)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"x" * 10


def _write_half(path: Path) -> None:
    with whole_file(path) as file:
        file.write(b"half")
        raise RuntimeError("stopped")


def test_file_when_the_block_fails_then_what_stood_there_stays(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "before")
    with pytest.raises(RuntimeError, match="stopped"):
        _write_half(tmp_path / "a")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "before"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_file_when_written_then_its_mode_is_what_the_umask_leaves(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "a", b"x")
        LineFile(tmp_path / "b").close()
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "b")} == {0o666 & ~mask}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_room_when_it_cannot_be_reserved_then_typed_error_with_folder_need_and_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", fails_with(number))
    with pytest.raises(StorageError) as raised, whole_file(tmp_path / "a", 5 * MIB):
        pytest.fail("nothing may be written before there is room")
    text = str(raised.value)
    assert str(tmp_path) in text
    assert "5,242,880 bytes are needed" in text
    assert "are free on that disk" in text
    assert os.strerror(number) in text
    assert isinstance(raised.value, PellucidError)
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, None])
def test_file_system_when_it_reserves_nothing_then_real_zeros_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    if number is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", fails_with(number))
    size = 3 * MIB + 7
    with whole_file(tmp_path / "a", size):
        pass
    status = (tmp_path / "a").stat()
    assert status.st_size == size
    assert status.st_blocks * 512 >= size, "a file with holes: a mapping of it may meet a full disk"
    assert (tmp_path / "a").read_bytes() == bytes(size)


@pytest.mark.parametrize("reserves", [True, False])
def test_disk_when_it_is_full_then_typed_error_and_the_disk_is_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reserves: bool
) -> None:
    if not reserves:
        monkeypatch.setattr(os, "posix_fallocate", fails_with(errno.EOPNOTSUPP))
    with small_disk(tmp_path / "disk", 512) as disk:
        with pytest.raises(StorageError, match="1,048,576 bytes are needed"), whole_file(disk / "a", MIB):
            pytest.fail("nothing may be written before there is room")
        with pytest.raises(StorageError, match="No space left"), whole_file(disk / "a") as file:
            file.write(bytes(MIB))
        assert names(disk) == []
        write_whole(disk / "a", bytes(300_000))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_system_when_it_fails_at_the_end_then_typed_error_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(os, call, fails_with(errno.EIO))
    with pytest.raises(StorageError, match="a cannot be written: Input/output error"):
        write_whole(tmp_path / "a", b"x")
    assert names(tmp_path) == []


def test_error_of_a_source_when_a_file_is_made_of_it_then_it_is_not_said_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="source"), whole_file(tmp_path / "a"):
        (tmp_path / "source").read_bytes()
    assert names(tmp_path) == []


PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing folder": (lambda folder: folder / "no" / "a", "No such file"),
    "folder that is a file": (lambda folder: folder / "file" / "a", "Not a directory"),
    "a folder": (lambda folder: folder / "folder", "Is a directory"),
    "too long": (lambda folder: folder / ("x" * 300), "name too long"),
}


@pytest.mark.parametrize("place", PLACES)
def test_place_when_it_cannot_be_written_then_typed_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    where, text = PLACES[place]
    with pytest.raises(StorageError, match=text):
        write_whole(where(tmp_path), b"x")
    if place != "a folder":
        with pytest.raises(StorageError, match=text):
            LineFile(where(tmp_path))
    assert names(tmp_path) == ["file", "folder"]


def test_folder_when_it_cannot_be_one_then_typed_error_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(StorageError, match=r"cannot be used: .*; do this"):
            make_folder(folder, "; do this")


def test_link_and_device_when_written_to_then_they_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_whole(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"x"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    write_whole(Path("/dev/null"), b"x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(StorageError, match="No space left"):
        write_whole(Path("/dev/full"), b"x")


def test_name_of_any_length_when_written_then_its_part_has_a_name_too(tmp_path: Path) -> None:
    for name in ("é" * 127, "n" * 255):
        write_whole(tmp_path / name, b"x")
    assert len(names(tmp_path)) == 2


# ---- who uses what ----------------------------------------------------------------------------------------------------

_WRITER = """
import sys, time
from pathlib import Path
from pellucid.files import whole_file
with whole_file(Path(sys.argv[1]), 1000) as file:
    print("writing", flush=True)
    sys.stdin.read(1)
    file.write(b"whole")
"""


@contextlib.contextmanager
def writer(path: Path) -> Iterator[Popen[bytes]]:
    """A process in the middle of writing a file; it ends when it can read a byte."""
    with child([sys.executable, "-c", _WRITER, path], stdin=PIPE, text=False) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n", process.communicate(timeout=60)
        yield process


def kill(process: Popen[bytes]) -> None:
    process.kill()
    process.wait(60)


def test_part_when_its_writer_lives_then_it_stays_and_when_it_was_killed_it_goes(tmp_path: Path) -> None:
    with writer(tmp_path / "a") as alive, writer(tmp_path / "a") as dead:
        assert len(names(tmp_path)) == 2
        kill(dead)
        assert len(names(tmp_path)) == 2
        remove_parts(tmp_path)
        assert len(names(tmp_path)) == 1
        remove_parts(tmp_path)
        assert alive.communicate(b"x", 60) == (b"", b"")
        assert (tmp_path / "a").read_bytes()[:5] == b"whole"
        assert names(tmp_path) == ["a"]


def test_file_when_written_again_behind_a_killed_writer_then_only_its_own_parts_go(tmp_path: Path) -> None:
    with writer(tmp_path / "a") as dead:
        kill(dead)
    (tmp_path / "ab.0.part").touch()
    write_whole(tmp_path / "a", b"x")
    assert names(tmp_path) == ["a", "ab.0.part"]


def test_part_when_the_system_has_no_locks_then_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    (tmp_path / "x.part").touch()
    remove_parts(tmp_path)
    write_whole(tmp_path / "a", b"x")
    assert names(tmp_path) == ["a", "x.part"]


def test_file_when_somebody_else_keeps_it_locked_then_it_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_HOLD_ATTEMPTS", 3)
    write_whole(tmp_path / "a", b"x")
    with open(tmp_path / "a") as locked, open(tmp_path / "a") as used:
        files.fcntl.flock(locked, files.fcntl.LOCK_EX)
        files.hold(used.fileno())
        assert not remove_unused(tmp_path / "a")


def test_link_when_it_looks_like_a_part_then_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    (tmp_path / "a.part").symlink_to(tmp_path / "precious")
    assert not remove_unused(tmp_path / "a.part")
    assert (tmp_path / "precious").read_text() == "x"


# ---- line by line -----------------------------------------------------------------------------------------------------


def _write_all(file: LineFile, lines: list[bytes]) -> None:
    for line in lines:
        file.write(line)


def test_line_when_the_disk_is_full_then_it_is_taken_back_and_the_error_typed(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        file, line = LineFile(disk / "lines"), b"x" * 9_999 + b"\n"
        with pytest.raises(StorageError, match=r"No space left.*lines before it are whole"):
            _write_all(file, [line] * 10)
        file.close()
        content = (disk / "lines").read_bytes()
        assert content == line * (len(content) // len(line))
        assert len(content) > 0


def test_lines_when_a_file_is_gone_on_with_then_they_follow(tmp_path: Path) -> None:
    for append, expected in ((False, b"1\n"), (True, b"1\n1\n"), (False, b"1\n")):
        file = LineFile(tmp_path / "a", append=append)
        file.write(b"1\n")
        file.close()
        file.close()
        assert (tmp_path / "a").read_bytes() == expected
