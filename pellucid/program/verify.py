"""Reading all of a program file against its checksums: before anything runs, or beside what runs without being noticed."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from threading import Event, Thread

from pellucid.core import abi
from pellucid.errors import DamagedFileError, NativeError, StorageError
from pellucid.files import identity, is_at
from pellucid.program.file import ProgramFile, damaged

# What a verification beside a running engine reads in a second, at most.
BACKGROUND_BYTES_PER_SECOND = 200_000_000
# A first token is made within this time of the start: until then it does not even begin.
BACKGROUND_DELAY_SECONDS = 1.0
_POLL_SECONDS = 0.1

_log = logging.getLogger(__name__)


class Verification:
    """Reads a file on a thread of its own, in one call into the core: the interpreter's lock is free meanwhile. In the background
    it begins a little later, and takes what nobody else wants of the processors and the disk.

    `on_damage` is called on that thread with the error, once, when a block is bad. With `is_ours`, a file of our cache, it was
    removed before, so that the next start packs the model anew; a file that somebody gave is never touched.
    """

    def __init__(
        self,
        file: ProgramFile,
        on_damage: Callable[[DamagedFileError], None],
        *,
        is_ours: bool,
        in_background: bool = True,
    ) -> None:
        self._path, self._identity = file.path, file.identity
        self._on_damage, self._is_ours = on_damage, is_ours
        self._in_background = in_background
        self._stopped, self._stop = Event(), ctypes.c_int32(0)  # for this thread, and for the core
        self.is_verified = False  # all of it was read, and is as it was written
        self._thread = Thread(target=self._run, name="pellucid-verify", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends it, if it has not ended; harmless when called again."""
        self._stop.value = 1
        self._stopped.set()
        self._thread.join()

    def wait(self) -> None:
        """Until it has ended. An interrupt ends it."""
        try:
            while self._thread.is_alive():
                self._thread.join(_POLL_SECONDS)
        except BaseException:
            self.stop()
            raise

    def _run(self) -> None:
        if self._in_background and self._stopped.wait(BACKGROUND_DELAY_SECONDS):
            return
        try:
            descriptor = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            _log.warning("%s cannot be verified: %s", self._path, error.strerror)
            return
        try:
            if identity(os.fstat(descriptor)) != self._identity:
                _log.warning("%s was replaced; what was loaded from it cannot be verified", self._path)
                return
            rate = BACKGROUND_BYTES_PER_SECOND if self._in_background else 0
            bad = abi.verify_file(descriptor, rate, self._stop, idle=self._in_background)
            if bad is not None:
                self._on_damage(damaged(self._path, bad, self._dispose()))
            else:
                self.is_verified = self._stop.value == 0
        except NativeError as error:  # it was cut
            self._on_damage(DamagedFileError(f"{self._path.name} is damaged: {error}{self._dispose()}"))
        finally:
            os.close(descriptor)

    def _dispose(self) -> str:
        """Removes a file of ours; what to do next, for the error."""
        if not self._is_ours:
            return "; compile the model again"
        try:
            if is_at(self._path, self._identity):  # else another process has packed it anew already
                os.unlink(self._path)
        except OSError as error:
            return f"; it could not be removed from the cache ({error.strerror}): delete it"
        return "; it was removed from the cache, and the next start packs the model anew"


def verify_file(file: ProgramFile, *, is_ours: bool) -> None:
    """Reads a file as fast as it goes, and returns when all of it is as it was written.

    Raises:
        DamagedFileError: it is not; see `Verification`.
        StorageError: it could not be read again, or another file took its place meanwhile.
    """
    found: list[DamagedFileError] = []
    verification = Verification(file, found.append, is_ours=is_ours, in_background=False)
    verification.wait()
    if found:
        raise found[0]
    if not verification.is_verified:
        raise StorageError(f"{file.path} was opened and could not be verified: it was replaced or cannot be read again")
