"""The page at `/`: files of this package, read once, revalidated by their hash. Nothing is fetched from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from fastapi import FastAPI, Request, Response

from pellucid.server.http.errors import plain_error

_FOLDER = Path(__file__).resolve().parent.parent / "static"
_INDEX = "index.html"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # Keys are typed into this page, so no foreign code may run in it and no foreign page may frame it.
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # keep it, and ask whether it is still the same
}


@dataclass(frozen=True)
class _File:
    body: bytes
    etag: str
    media_type: str


class Page:
    """The files by path. They carry no secret, so they are open where everything else needs a key."""

    def __init__(self) -> None:
        files = {path.name: _read(path) for path in sorted(_FOLDER.iterdir()) if path.suffix in _MEDIA_TYPES}
        self._index = files.pop(_INDEX)
        self._files = files

    @property
    def paths(self) -> frozenset[str]:
        """Every path that is answered."""
        return frozenset({"/", *(f"/static/{name}" for name in self._files)})

    def add_to(self, app: FastAPI) -> None:
        """Registers the paths; they are no part of the API, so the OpenAPI does not list them."""
        for path, answer in (("/", self._answer_index), ("/static/{name}", self._answer_file)):
            app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)(answer)

    async def _answer_index(self, http: Request) -> Response:
        return _answer(http, self._index)

    async def _answer_file(self, http: Request, name: str) -> Response:
        if name not in self._files:
            raise plain_error(404, f"there is no file {name[:80]!r} of the page")
        return _answer(http, self._files[name])


def _read(path: Path) -> _File:
    body = path.read_bytes()
    return _File(body, f'"{blake2b(body, digest_size=12).hexdigest()}"', _MEDIA_TYPES[path.suffix])


def _answer(http: Request, file: _File) -> Response:
    headers = {**_HEADERS, "etag": file.etag}
    known = http.headers.get("if-none-match", "")
    if known == "*" or file.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)
