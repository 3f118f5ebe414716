"""Full disks, limits on files, killed writers and damaged bytes, for tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from utils.children import child, finished
from utils.waiting import PATIENCE

from pellucid.commands.compile import compile_model
from pellucid.config import EngineConfig
from pellucid.program.checksums import BLOCK_BYTES

# Runs the command line under a limit on the size of a file, which is what a full disk looks like to anybody.
_LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from pellucid.cli import main
main()
"""


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A disk of so many KiB at `folder`; the test is skipped where nothing may be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or finished(command).returncode != 0:
        pytest.skip("a disk of limited size cannot be mounted here: that needs root")
    try:
        yield folder
    finally:
        finished(["umount", "-l", folder], check=True)


def pellucid(*arguments: str, **environment: str) -> CompletedProcess[str]:
    """The command line."""
    return _run([sys.executable, "-m", "pellucid.cli", *arguments], environment)


def pellucid_limited(max_file_bytes: int, *arguments: str, **environment: str) -> CompletedProcess[str]:
    """The command line in a process whose files may not be larger."""
    return _run([sys.executable, "-c", _LIMITED, str(max_file_bytes), *arguments], environment)


def _run(command: list[str], environment: dict[str, str]) -> CompletedProcess[str]:
    return finished(command, env={**os.environ, **environment})


def kill_when(command: list[str], is_time: Callable[[], bool], **environment: str) -> None:
    """Starts a command and kills it as soon as `is_time`; fails when it ends before."""
    with child(command, env={**os.environ, **environment}) as process:
        end = time.monotonic() + PATIENCE
        while not is_time():
            assert process.poll() is None, (process.returncode, process.communicate(timeout=PATIENCE))
            assert time.monotonic() < end, "the time never came"
            time.sleep(0.001)
        process.kill()


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Changes one bit in place, as a disk would: who has mapped the file sees it."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def compile_damaged(checkpoint: Path, folder: Path) -> tuple[Path, int]:
    """A compiled model of a checkpoint, and the block of it that is damaged."""
    path = folder / "m.pld"
    compile_model(EngineConfig(str(checkpoint)), path)
    at = path.stat().st_size - 200_000
    flip(path, at)
    return path, at // BLOCK_BYTES
