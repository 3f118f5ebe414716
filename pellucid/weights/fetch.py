"""Fetching one file by URL: resumed where it stopped, bounded in size, checked by its SHA-256."""

from __future__ import annotations

import base64
import errno
import hashlib
import http.client
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from pellucid.errors import DownloadError, StorageError
from pellucid.files import NO_ROOM, hold, storage_errors
from pellucid.weights.progress import Report, transfer_progress

CHUNK_BYTES = 2**20
TIMEOUT_SECONDS = 30.0
ATTEMPTS = 4
_RETRY_SECONDS = 0.5
_SCHEMES = ("https", "http", "file")
_LENGTH = re.compile(r"[0-9]{1,19}")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-[0-9]{1,19}/([0-9]{1,19}|\*)")

# Answers that another attempt may turn into a success.
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_DISK_ERRORS = NO_ROOM | {errno.EROFS, errno.EACCES, errno.EPERM}


class ChecksumError(DownloadError):
    """What arrived is not what was asked for."""


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def redacted(url: str) -> str:
    """`url` without user, password, query and fragment, for messages."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def check_space(folder: Path, needed: int) -> None:
    """DownloadError when the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(f"{needed} bytes are needed in {folder}; {free} are free on that disk")


def _request(url: str, offset: int) -> urllib.request.Request:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in _SCHEMES:
        raise DownloadError(f"cannot fetch {redacted(url)}: the scheme must be one of {', '.join(_SCHEMES)}")
    user, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urllib.parse.urlunsplit((parts.scheme, host, parts.path, parts.query, "")))
    request.add_header("Accept-Encoding", "identity")
    if user:
        token = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    if offset and parts.scheme != "file":
        request.add_header("Range", f"bytes={offset}-")
    return request


def _start_of_answer(answer: Any, offset: int) -> tuple[int, int | None]:
    """Where in the file the answer's body begins, and the size of the whole file when it is told."""
    headers = answer.headers
    found = (
        _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "")) if getattr(answer, "status", None) == 206 else None
    )
    if found is not None and int(found[1]) == offset:
        return offset, None if found[2] == "*" else int(found[2])
    length = headers.get("Content-Length", "")
    return 0, int(length) if _LENGTH.fullmatch(length) else None


def _copy(source: IO[bytes], target: IO[bytes], done: int, limit: int, report: Report) -> int:
    """Copies to the end of `source`; DownloadError when the file would grow beyond `limit` bytes."""
    while chunk := source.read(CHUNK_BYTES):
        done += len(chunk)
        if done > limit:
            raise DownloadError(f"the server sent more than {limit} bytes; nothing that large is expected")
        target.write(chunk)
        report(done)
    return done


def _attempt(url: str, part: Path, limit: int, label: str, shown: bool) -> None:
    """One request that appends to `part`; OSError or HTTPException when it breaks off."""
    offset = part.stat().st_size if part.exists() else 0
    try:
        answer = urllib.request.urlopen(_request(url, offset), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.unlink()  # longer than the file on the server: not a part of it
        answer = urllib.request.urlopen(_request(url, 0), timeout=TIMEOUT_SECONDS)
        offset = 0
    with answer:
        start, total = _start_of_answer(answer, offset)
        if total is not None and total > limit:
            raise DownloadError(f"the file has {total} bytes; at most {limit} are expected")
        with (
            storage_errors(part, total or 0, NO_ROOM),
            part.open("ab" if start else "wb") as target,
            transfer_progress(label, total, shown=shown) as report,
        ):
            hold(target.fileno())
            report(start)
            done = _copy(answer, target, start, limit, report)
    if total is not None and done < total:
        raise http.client.IncompleteRead(b"", total - done)


def _is_transient(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in _TRANSIENT_STATUS
    return getattr(error, "errno", None) not in _DISK_ERRORS


def _repeat(action: Callable[[], None], url: str) -> None:
    """Up to ATTEMPTS tries with growing pauses; DownloadError with the last reason when all failed."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except (DownloadError, StorageError):
            raise
        except (OSError, http.client.HTTPException) as error:
            if attempt == ATTEMPTS or not _is_transient(error):
                reason = getattr(error, "reason", None) or error
                raise DownloadError(f"could not fetch {redacted(url)}: {reason}") from error
            time.sleep(_RETRY_SECONDS * 2 ** (attempt - 1))


def download(url: str, part: Path, *, sha256: str | None, limit: int, label: str, progress: bool) -> Path:
    """Fetches `url` into `part`, going on where an earlier try stopped, and returns it.

    `limit` bounds the size in bytes. A finished file with another `sha256` is deleted; if it had been resumed, it is
    fetched once more from its start. Raises DownloadError saying whether network, size, checksum or disk failed.
    """
    for resumed in (part.exists() and part.stat().st_size > 0, False):
        if not (sha256 is not None and resumed and sha256_of(part) == sha256):
            _repeat(lambda: _attempt(url, part, limit, label, progress), url)
        if sha256 is None:
            return part
        actual = sha256_of(part)
        if actual == sha256:
            return part
        part.unlink()
        if not resumed:
            raise ChecksumError(f"{redacted(url)} has SHA-256 {actual}; expected is {sha256}: nothing was kept")
    raise AssertionError("unreachable")
