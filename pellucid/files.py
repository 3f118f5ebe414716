"""Writing files so that a full disk is an error, and a killed process leaves nothing for ever.

Whoever writes or maps a file that others may remove holds a shared lock on it, which ends with the process however that ends.
Whoever removes such a file takes the exclusive lock first, and leaves the file alone when that is not to be had at once.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pellucid.errors import StorageError

try:
    import fcntl
except ImportError:  # this system has no such locks: nothing is removed that others might use
    fcntl = None  # type: ignore[assignment]

PART_SUFFIX = ".part"
# What a full disk, a quota and a limit on the size of a file say. No reading says them.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# A file system that cannot reserve room says one of these.
_CANNOT_RESERVE = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS})
_ZEROS = bytes(1 << 20)
# How often, and after what pause, a lock is tried that somebody has. Whoever keeps it for longer is none of us.
_HOLD_ATTEMPTS, _HOLD_SECONDS = 100, 0.01
_MAX_NAME = 48  # characters of a file's name in that of its part: names have at most 255 bytes


def storage_error(
    error: OSError, path: Path, needed: int = 0, *, verb: str = "written", hint: str = ""
) -> StorageError:
    """What is wrong with the disk, for a person: `needed` bytes were to be written to `path`."""
    text = f"{path} cannot be {verb}: {error.strerror or error}"
    if error.errno in NO_ROOM:
        free = _free_bytes(path.parent)
        need = f"{needed:,} bytes are needed in {path.parent}, {free} are free on that disk"
        text += f"; {need}" if needed else f"; {free} bytes are free on the disk of {path.parent}"
    return StorageError(text + hint)


def _free_bytes(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number of"


@contextlib.contextmanager
def storage_errors(
    path: Path, needed: int = 0, only: frozenset[int] | None = None, *, verb: str = "written"
) -> Iterator[None]:
    """Errors of the system become `StorageError`; with `only`, those of these numbers alone."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if only is not None and error.errno not in only:
            raise
        raise storage_error(error, path, needed, verb=verb) from error


def make_folder(folder: Path, hint: str = "") -> Path:
    """The folder, which is made where it is missing.

    Raises:
        StorageError: it cannot be a folder; `hint` says what to do then.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"the folder {folder} cannot be used: {error.strerror or error}{hint}") from error
    return folder


# ---- who uses what ----------------------------------------------------------------------------------------------------


def hold(descriptor: int) -> None:
    """Says that this process uses a file or folder, until the descriptor and its copies are closed; a mapping keeps a copy."""
    for _ in range(_HOLD_ATTEMPTS if fcntl is not None else 0):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except BlockingIOError:  # who removes a file has it for a moment
            time.sleep(_HOLD_SECONDS)
        except OSError:  # some network file systems have no locks
            return


def identity(status: os.stat_result) -> tuple[int, int]:
    """Which file it is, whatever its name."""
    return status.st_dev, status.st_ino


def is_at(path: Path, found: tuple[int, int]) -> bool:
    """Whether a file of this identity is what stands at `path`."""
    try:
        return identity(os.stat(path)) == found
    except OSError:
        return False


def remove_unused(path: Path) -> bool:
    """Removes a file, or a folder with all that is in it, that no living process holds; False when it stays."""
    if fcntl is None:
        return False
    try:
        is_folder = path.is_dir() and not path.is_symlink()
        access = os.O_RDONLY if is_folder else os.O_RDWR  # network file systems lock for writers alone
        descriptor = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_at(path, identity(os.fstat(descriptor))):
            return False
        if is_folder:
            shutil.rmtree(path)
        else:
            os.unlink(path)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def remove_parts(folder: Path, pattern: str = f"*{PART_SUFFIX}") -> None:
    """Removes what writers that no longer live left in a folder."""
    for part in folder.glob(pattern):
        remove_unused(part)


# ---- whole or not at all ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: Path, size: int = 0) -> Iterator[BinaryIO]:
    """A file that stands at `path` once the block has ended well, and leaves nothing when it does not.

    It is written beside its place as `NAME.….part`; such parts of writers that were killed are removed first. `size` bytes are
    reserved before the block begins: a mapping of them meets no full disk. Its mode is what the umask leaves of 0666. A link
    is followed. What is there and no file (a terminal, a pipe) is written to directly.

    Raises:
        StorageError: it cannot be written. Other errors of the block are raised as they are.
    """
    with storage_errors(path):
        is_device = path.exists() and not path.is_file() and not path.is_dir()
        path = Path(os.path.realpath(path)) if path.is_symlink() and not is_device else path
    if is_device:
        with storage_errors(path), open(path, "wb") as device:
            yield device
        return
    with storage_errors(path, size):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        remove_parts(path.parent, f"{glob.escape(_stem(path))}.*{PART_SUFFIX}")
        part, file = _new_part(path)
    try:
        with storage_errors(path, size):
            reserve(file.fileno(), size)
        with storage_errors(path, size, NO_ROOM):
            yield file
        with storage_errors(path, size):
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)  # still locked: nobody takes it for a dead one's
            file.close()
    except BaseException:
        with contextlib.suppress(OSError):  # what was not written before cannot be written now
            file.close()
        part.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a small file whole or not at all; a text as UTF-8. Raises as `whole_file`."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _stem(path: Path) -> str:
    return path.name[:_MAX_NAME]


def _new_part(path: Path) -> tuple[Path, BinaryIO]:
    while True:
        part = path.with_name(f"{_stem(path)}.{secrets.token_hex(4)}{PART_SUFFIX}")
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        hold(descriptor)
        if is_at(part, identity(os.fstat(descriptor))):
            return part, os.fdopen(descriptor, "w+b")
        os.close(descriptor)  # it was removed before it was held


def reserve(descriptor: int, size: int) -> None:
    """Gives an empty file `size` bytes of zeros that the disk has room for.

    Raises:
        OSError: it has not.
    """
    if size == 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
        return
    except AttributeError:  # this system has no such call
        pass
    except OSError as error:
        if error.errno not in _CANNOT_RESERVE:
            raise
    written = 0
    while written < size:
        written += os.pwrite(descriptor, _ZEROS[: size - written], written)


# ---- line by line -----------------------------------------------------------------------------------------------------


class LineFile:
    """A file that grows by whole lines, each with the system when `write` returns.

    A line for which the disk has no room is taken back, so that the file ends with a whole one. What was there before is
    dropped, or with `append` kept. `mode` is that of a new file, under the umask.

    Raises:
        StorageError: the file cannot be opened.
    """

    def __init__(self, path: Path, *, append: bool = False, mode: int = 0o666) -> None:
        self.path = path
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC)
        with storage_errors(path):
            self._descriptor = os.open(path, flags, mode)
            status = os.fstat(self._descriptor)
        self.is_regular = stat.S_ISREG(status.st_mode)
        self.num_bytes = status.st_size if self.is_regular else 0

    def write(self, line: bytes) -> None:
        """Appends a line.

        Raises:
            StorageError: it could not be written.
        """
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # a pipe cannot be cut
                os.ftruncate(self._descriptor, self.num_bytes)
            raise storage_error(error, self.path, hint="; the lines before it are whole") from error
        self.num_bytes += len(line)

    def close(self) -> None:
        """Closes the file; harmless when called again.

        Raises:
            StorageError: the system says only now that something could not be written.
        """
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            with storage_errors(self.path):
                os.close(descriptor)
