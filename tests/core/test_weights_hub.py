"""Finding and fetching models: against a local HTTP server that can break off, lie and forget how to resume."""

from __future__ import annotations

import hashlib
import random
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from utils.disks import small_disk

from pellucid.errors import DownloadError, ModelNotFoundError
from pellucid.weights import fetch, hub, pip_index
from pellucid.weights.fetch import ChecksumError, download, redacted
from pellucid.weights.packaged import PACKAGED_MODELS, PackagedModel, Piece
from pellucid.weights.pip_index import Wheel

BODY = bytes(range(256)) * 4_096  # 1 MiB
SHA256 = hashlib.sha256(BODY).hexdigest()


class Site(ThreadingHTTPServer):
    """Serves `files`; notes the Range header of each request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"/body": BODY}
        self.ranges: list[str | None] = []
        self.authorization: list[str | None] = []
        self.can_resume = True
        self.break_after: int | None = None  # bytes of the next answer
        self.statuses: list[int] = []  # answers before the good ones

    def url(self, path: str = "/body") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        site = self.server
        wanted = self.headers.get("Range")
        site.ranges.append(wanted)
        site.authorization.append(self.headers.get("Authorization"))
        if site.statuses:
            self.send_error(site.statuses.pop(0))
            return
        body = site.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and site.can_resume else 0
        if start and start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        stop, site.break_after = site.break_after, None
        self.wfile.write(body[start:] if stop is None else body[start : start + stop])

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(fetch, "_RETRY_SECONDS", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Site()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join(60)
    server.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PELLUCID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fetched(url: str, part: Path, sha256: str | None = SHA256, limit: int = 2 * len(BODY)) -> bytes:
    return download(url, part, sha256=sha256, limit=limit, label="x", progress=False).read_bytes()


def test_url_when_downloaded_then_the_bytes_and_one_request(site: Site, tmp_path: Path) -> None:
    assert fetched(site.url(), tmp_path / "p") == BODY
    assert site.ranges == [None]


def test_transfer_that_breaks_off_when_repeated_then_goes_on_where_it_stopped(site: Site, tmp_path: Path) -> None:
    site.break_after = 300_000
    assert fetched(site.url(), tmp_path / "p") == BODY
    assert site.ranges == [None, "bytes=300000-"]


def test_part_of_an_earlier_run_when_downloaded_then_only_the_rest_is_asked_for(site: Site, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(BODY[:1_000])
    assert fetched(site.url(), tmp_path / "p") == BODY
    assert site.ranges == ["bytes=1000-"]


def test_complete_part_when_downloaded_then_nothing_is_asked_for(site: Site, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(BODY)
    assert fetched(site.url(), tmp_path / "p") == BODY
    assert site.ranges == []


def test_server_that_cannot_resume_when_resumed_then_starts_over(site: Site, tmp_path: Path) -> None:
    site.can_resume = False
    (tmp_path / "p").write_bytes(BODY[:1_000])
    assert fetched(site.url(), tmp_path / "p") == BODY


def test_part_longer_than_the_file_when_resumed_then_starts_over(site: Site, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(BODY + b"more")
    assert fetched(site.url(), tmp_path / "p") == BODY


def test_part_of_another_file_when_resumed_then_fetched_afresh_once(site: Site, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"\xff" * 1_000)
    assert fetched(site.url(), tmp_path / "p") == BODY
    assert site.ranges == ["bytes=1000-", None]


def test_wrong_checksum_when_downloaded_then_typed_error_and_nothing_is_kept(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ChecksumError, match=f"has SHA-256 {SHA256}; expected is {'0' * 64}"):
        fetched(site.url(), tmp_path / "p", sha256="0" * 64)
    assert not (tmp_path / "p").exists()


def test_file_larger_than_the_limit_when_downloaded_then_refused(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=f"the file has {len(BODY)} bytes; at most 1000 are expected"):
        fetched(site.url(), tmp_path / "p", limit=1_000)


@pytest.mark.parametrize(("statuses", "requests"), [([503, 429], 3), ([500], 2)])
def test_passing_failures_when_downloaded_then_tried_again(
    site: Site, tmp_path: Path, statuses: list[int], requests: int
) -> None:
    site.statuses = statuses
    assert fetched(site.url(), tmp_path / "p") == BODY
    assert len(site.ranges) == requests


def test_absent_file_when_downloaded_then_one_request_and_typed_error(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"could not fetch .*/absent: Not Found"):
        fetched(site.url("/absent"), tmp_path / "p")
    assert len(site.ranges) == 1


def test_url_with_a_password_when_downloaded_then_it_is_sent_and_never_shown(site: Site, tmp_path: Path) -> None:
    url = site.url("/absent").replace("//", "//user:s%40cret@") + "?token=t"
    with pytest.raises(DownloadError) as caught:
        fetched(url, tmp_path / "p")
    assert "cret" not in str(caught.value)
    assert "token" not in str(caught.value)
    assert site.authorization == ["Basic dXNlcjpzQGNyZXQ="]
    assert redacted(url) == site.url("/absent")


def test_file_url_when_downloaded_then_copied(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(BODY)
    assert fetched((tmp_path / "f").as_uri(), tmp_path / "p") == BODY


def test_scheme_that_is_not_known_when_downloaded_then_refused(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"must be one of https, http, file"):
        fetched("ftp://127.0.0.1/x", tmp_path / "p")


def test_progress_without_a_terminal_when_downloaded_then_plain_lines(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    download(site.url(), tmp_path / "p", sha256=SHA256, limit=2 * len(BODY), label="tiny", progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tiny: 0.0 of 1.0 MiB"
    assert lines[-1].startswith("tiny: 1.0 of 1.0 MiB, ")


def wheel(members: dict[str, bytes], path: Path) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path.read_bytes()


def register(monkeypatch: pytest.MonkeyPatch, sha256: str = SHA256) -> PackagedModel:
    """A packaged model `tiny` in two pieces of the body."""
    half = len(BODY) // 2
    pieces = tuple(Piece(f"tiny-part{part}", "1.0", f"tiny/data.{part}", half) for part in (1, 2))
    model = PackagedModel("tiny", "tiny.gguf", sha256, pieces, "MIT", "for tests")
    monkeypatch.setitem(PACKAGED_MODELS, "tiny", model)
    return model


@pytest.fixture
def tiny(site: Site, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """`tiny` served by the site, its wheels located without pip."""
    model = register(monkeypatch)
    half = len(BODY) // 2
    for number, piece in enumerate(model.pieces):
        content = BODY[number * half : (number + 1) * half]
        site.files[f"/{piece.package}"] = wheel({piece.member: content, "tiny/x": b"x"}, tmp_path / "w.whl")

    def locate(piece: Piece) -> Wheel:
        return Wheel(site.url(f"/{piece.package}"), hashlib.sha256(site.files[f"/{piece.package}"]).hexdigest())

    monkeypatch.setattr(pip_index, "locate", locate)
    return model


def test_packaged_model_in_pieces_when_pulled_then_joined_verified_and_nothing_else_left(
    tiny: PackagedModel, cache: Path, site: Site
) -> None:
    assert not hub.is_pulled("tiny")
    path = hub.pull("tiny", progress=False)
    assert path == cache / "models" / "tiny" / "tiny.gguf"
    assert path.read_bytes() == BODY
    assert hub.is_pulled("tiny")
    assert [entry.name for entry in sorted(cache.rglob("*")) if entry.is_file()] == [".lock", "tiny.gguf"]
    assert hub.pull("tiny", progress=False) == hub.resolve_model("TINY", progress=False) == path
    assert len(site.ranges) == 2
    hub.pull("tiny", progress=False, force=True)
    assert len(site.ranges) == 4


def test_packaged_model_with_another_checksum_when_pulled_then_refused_and_nothing_is_kept(
    tiny: PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, sha256="0" * 64)
    with pytest.raises(ChecksumError, match="tiny has SHA-256"):
        hub.pull("tiny", progress=False)
    assert not hub.is_pulled("tiny")
    assert [entry.name for entry in cache.rglob("*") if entry.is_file()] == [".lock"]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"other": b"x"}, "no usable tiny/data.1"),
        ({"tiny/data.1": b"short"}, "fewer than the expected"),
        ({"tiny/data.1": BODY}, "more than the expected"),
        (None, "no usable tiny/data.1: File is not a zip file"),
    ],
    ids=["member absent", "member short", "member a bomb", "no zip"],
)
def test_wheel_that_is_not_what_was_expected_when_pulled_then_typed_error(
    tiny: PackagedModel, site: Site, tmp_path: Path, members: dict[str, bytes] | None, words: str
) -> None:
    site.files["/tiny-part1"] = b"no zip" if members is None else wheel(members, tmp_path / "w.whl")
    with pytest.raises(DownloadError, match=words):
        hub.pull("tiny", progress=False)
    assert not hub.is_pulled("tiny")


def damaged(content: bytes, find: bytes, put: bytes, last: bool = False) -> bytes:
    at = content.rindex(find) if last else content.index(find)
    return content[:at] + put + content[at + len(put) :]


def damaged_wheels(path: Path) -> dict[str, bytes]:
    """Wheels of `tiny/data.1` whose parts contradict each other."""
    half = BODY[: len(BODY) // 2]
    good = wheel({"tiny/data.1": half}, path)
    member, central, end = b"tiny/data.1", b"PK\1\2", b"PK\5\6"
    made = {
        "deflate": damaged(good, member, member + b"\xff" * 40),
        "deflate in the middle": good[:600] + bytes([good[600] ^ 255]) * 20 + good[620:],
        "checksum": damaged(good, central, central + good[good.index(central) + 4 : good.index(central) + 16] + b"\0\0\0\1"),
        "central directory cut off": good[: good.index(central) + 20] + good[good.index(end) :],
        "end cut off": good[:-4],
        "only the end": good[good.index(end) :],
        "cut in half": good[: len(good) // 2],
        "no byte": b"",
        "directory beyond the file": damaged(good, end, end + b"\0" * 8 + b"\xff\xff\xff\xff\xff\xff\xff\x7f"),
        "65,535 members": damaged(good, end, end + b"\0" * 4 + b"\xff\xff\xff\xff"),
        "encrypted": damaged(good, central, central + b"\x14\x03\x14\x00\x01\x00"),
        "unknown compression": damaged(good, central, central + b"\x14\x03\x14\x00\x00\x00\x63\x00"),
        "place that lies": good[: good.index(central) + 42] + b"\xff\xff\xff\x7f" + good[good.index(central) + 46 :],
    }  # fmt: skip
    plain = damaged(good, central, central + b"\x14\x03\x14\x00\x00\x08")  # the name is UTF-8
    made["name that is no UTF-8"] = damaged(plain, member, b"tiny/data\xff1", last=True)
    for name, method in (("bzip2", zipfile.ZIP_BZIP2), ("LZMA", zipfile.ZIP_LZMA)):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("tiny/data.1", b"\0" * len(half))
        made[name] = path.read_bytes()
        made[f"{name} damaged"] = damaged(made[name], member, member + b"\xff" * 20)
    return made


def test_damaged_wheels_when_pulled_then_each_gets_a_typed_error_and_none_stays(
    tiny: PackagedModel, site: Site, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pip_index, "locate", lambda piece: Wheel(site.url(f"/{piece.package}"), None)
    )  # an index without hashes
    for name, content in damaged_wheels(tmp_path / "w.whl").items():
        site.files["/tiny-part1"] = content
        with pytest.raises(DownloadError) as caught:
            hub.pull("tiny", progress=False)
        assert "tiny/data.1" in str(caught.value), name
        assert not hub.is_pulled("tiny")
        assert [entry.name for entry in cache.rglob("*") if entry.is_file()] == [".lock"], f"{name}: something was kept"


@pytest.mark.slow
def test_wheel_that_unpacks_to_much_more_when_pulled_then_no_memory_is_taken(
    tiny: PackagedModel, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pip_index, "locate", lambda piece: Wheel(site.url(f"/{piece.package}"), None))
    bombs = []
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "b.whl", "w", method) as archive, archive.open("tiny/data.1", "w") as member:
            for _ in range(256):
                member.write(bytes(2**20))
        bombs.append((tmp_path / "b.whl").read_bytes())
    many = tmp_path / "many.whl"
    with zipfile.ZipFile(many, "w") as archive:
        for index in range(20_000):
            archive.writestr(f"tiny/{index}", b"")
    tracemalloc.start()
    try:
        for content in (*bombs, many.read_bytes()):
            site.files["/tiny-part1"] = content
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with pytest.raises(DownloadError):
                hub.pull("tiny", progress=False)
            assert tracemalloc.get_traced_memory()[1] - before < 32 * 2**20
    finally:
        tracemalloc.stop()


def test_disk_that_fails_while_a_wheel_is_unpacked_when_pulled_then_the_wheel_is_not_blamed(
    tiny: PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "_append", full)
    with pytest.raises(DownloadError, match="No space left on device"):
        hub.pull("tiny", progress=False)
    assert len(list(cache.glob("downloads/*.part"))) == 1


@pytest.mark.parametrize("length", ["\u00b2", "9" * 5_000, "-1", "1e9", "", "0x10"])
def test_length_that_is_none_when_downloaded_then_it_is_not_known(length: str) -> None:
    class Answer:
        status = 200
        headers = {"Content-Length": length}  # noqa: RUF012

    assert fetch._start_of_answer(Answer(), 0) == (0, None)


def test_two_pulls_at_once_when_one_holds_the_lock_then_it_is_fetched_once(tiny: PackagedModel, site: Site) -> None:
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: hub.pull("tiny", progress=False), range(2)))
    assert paths[0].read_bytes() == BODY
    assert paths[0] == paths[1]
    assert len(site.ranges) == 2


def test_pull_that_waits_when_another_is_fetching_then_says_so(
    tiny: PackagedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = pip_index.locate

    def slow(piece: Piece) -> Wheel | None:
        time.sleep(0.3)
        return original(piece)

    monkeypatch.setattr(pip_index, "locate", slow)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: hub.pull("tiny", progress=True), range(2)))
    assert "tiny: another process is fetching it; waiting" in capsys.readouterr().err


@pytest.mark.parametrize(("kib", "words"), [(500, "1048576 bytes are needed in"), (1200, "524288 bytes are needed in")])
def test_disk_when_it_has_no_room_then_typed_error_with_need_and_nothing_is_left(
    tiny: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kib: int, words: str
) -> None:
    with small_disk(tmp_path / "disk", kib) as disk:
        monkeypatch.setenv("PELLUCID_CACHE", str(disk))
        with pytest.raises(DownloadError, match=f"{words} .* are free on that disk"):
            hub.pull("tiny", progress=False)
        assert [path.name for path in disk.rglob("*") if path.is_file()] == [".lock"]


def test_disk_when_it_fills_while_a_wheel_comes_then_typed_error_and_pip_is_not_asked(
    tiny: PackagedModel, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = len(BODY) // 2
    noise = random.Random(1).randbytes(600_000)
    site.files["/tiny-part1"] = wheel({"tiny/data.1": BODY[:half], "tiny/noise": noise}, tmp_path / "w.whl")
    monkeypatch.setattr(pip_index, "pip_download", lambda *_: pytest.fail("pip would fare no better"))
    with small_disk(tmp_path / "disk", 1600) as disk:
        monkeypatch.setenv("PELLUCID_CACHE", str(disk))
        with pytest.raises(DownloadError, match=r"No space left on device; .* bytes are needed in .*downloads"):
            hub.pull("tiny", progress=False)
        left = [path for path in disk.rglob("*") if path.is_file() and path.name != ".lock"]
        assert [path.suffix for path in left] == [".part"], "the transfer goes on from here"


def test_pull_when_its_process_was_killed_then_what_it_had_joined_goes_at_the_next(
    tiny: PackagedModel, cache: Path
) -> None:
    left = cache / "models" / "tiny" / "tiny.gguf.0123.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    hub.pull("tiny", progress=False)
    assert not left.exists()


def test_package_that_is_installed_when_pulled_then_copied_from_there(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = register(monkeypatch)
    half = len(BODY) // 2
    for number, piece in enumerate(model.pieces):
        target = tmp_path / "site" / piece.member
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(BODY[number * half : (number + 1) * half])
        info = tmp_path / "site" / f"{piece.package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {piece.package}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(pip_index, "locate", lambda piece: pytest.fail("nothing needs to be located"))
    assert hub.pull("tiny", progress=False).read_bytes() == BODY


def test_no_network_when_pulled_then_error_says_so_and_that_a_path_works(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    stderr = "WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No matching distribution"
    monkeypatch.setattr(pip_index, "_run", lambda arguments, seconds: (1, "", stderr))
    with pytest.raises(DownloadError) as caught:
        hub.pull("tiny", progress=False)
    for words in (
        "tiny-part1==1.0 could not be fetched; is there a network?",
        "NewConnectionError",
        "local model folder",
    ):
        assert words in str(caught.value)


def test_index_that_only_pip_may_read_when_pulled_then_pip_downloads(
    tiny: PackagedModel, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip_download(piece: Piece, folder: Path) -> Path:
        path = folder / f"{piece.package}.whl"
        path.write_bytes(site.files[f"/{piece.package}"])
        return path

    monkeypatch.setattr(pip_index, "locate", lambda piece: Wheel(site.url("/forbidden"), None))
    monkeypatch.setattr(pip_index, "pip_download", pip_download)
    assert hub.pull("tiny", progress=False).read_bytes() == BODY


def test_environment_without_pip_when_located_then_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pip_index.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(pip_index.shutil, "which", lambda name: None)
    with pytest.raises(DownloadError, match=r"pip is not installed .* `python -m ensurepip` adds it"):
        pip_index.locate(Piece("tiny", "1.0", "x", 1))


def test_links_that_pip_prints_when_located_then_the_wheel_of_that_version(monkeypatch: pytest.MonkeyPatch) -> None:
    link = "  Found link http://h/t/tiny-{0}#sha256={1} (from http://h/s/tiny/) (requires-python:>=3.9), version: {2}"
    lines = [
        "1 location(s) to search for versions of tiny:",
        link.format("0.9-py3-none-any.whl", "a" * 64, "0.9"),
        link.format("1.0.tar.gz", "b" * 64, "1.0"),
        link.format("1.0-py3-none-any.whl", "c" * 64, "1.0"),
        "tiny (1.0)",
    ]
    monkeypatch.setattr(pip_index, "_run", lambda arguments, seconds: (0, "\n".join(lines), ""))
    assert pip_index.locate(Piece("tiny", "1.0", "x", 1)) == Wheel("http://h/t/tiny-1.0-py3-none-any.whl", "c" * 64)
    assert pip_index.locate(Piece("tiny", "2.0", "x", 1)) is None
    lines.append("  Found link file:///w/tiny-1.0-py3-none-any.whl, version: 1.0")
    assert pip_index.locate(Piece("tiny", "1.0", "x", 1)) == Wheel("file:///w/tiny-1.0-py3-none-any.whl", None)


def test_pip_itself_when_asked_about_a_folder_of_wheels_then_the_link_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = "tiny_part1-1.0.dist-info"
    wheel(
        {
            f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-part1\nVersion: 1.0\n",
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        },
        tmp_path / "tiny_part1-1.0-py3-none-any.whl",
    )
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    located = pip_index.locate(Piece("tiny-part1", "1.0", "x", 1))
    assert located == Wheel((tmp_path / "tiny_part1-1.0-py3-none-any.whl").as_uri(), None)
    folder = tmp_path / "out"
    folder.mkdir()
    assert pip_index.pip_download(Piece("tiny-part1", "1.0", "x", 1), folder).parent == folder
    with pytest.raises(DownloadError, match=r"pip download absent==1.0 failed: ERROR: No matching distribution"):
        pip_index.pip_download(Piece("absent", "1.0", "x", 1), folder)


def test_paths_and_names_when_resolved_then_local_first_and_errors_say_what_was_tried(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "m.gguf").write_bytes(b"x")
    (tmp_path / "m.txt").write_bytes(b"x")
    assert hub.resolve_model("org/model") == Path("org/model")
    assert hub.resolve_model(tmp_path / "m.gguf") == tmp_path / "m.gguf"
    with pytest.raises(ModelNotFoundError, match=r"is a file but no .gguf"):
        hub.resolve_model("m.txt")
    with pytest.raises(ModelNotFoundError, match=r"no model 'nope'\. Tried: .* smollm2-135m-instruct.*; a hub id"):
        hub.resolve_model("nope")
    with pytest.raises(ModelNotFoundError, match="Tried"):
        hub.resolve_model(tmp_path / "org" / "absent")


def test_hub_id_when_pulled_then_only_model_files_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    calls: list[tuple[str, list[str], bool]] = []

    def snapshot(repository: str, *, allow_patterns: list[str], force_download: bool) -> str:
        calls.append((repository, allow_patterns, force_download))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ModelNotFoundError, match=r"org/model has no safetensors; .* write org/model:Q4_K_M"):
        hub.pull("org/model", progress=False)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    (tmp_path / "model-Q8_0.gguf").write_bytes(b"x")
    assert hub.pull("org/model", progress=False, force=True) == tmp_path
    assert hub.pull("org/model:Q8_0", progress=False) == tmp_path / "model-Q8_0.gguf"
    assert calls[1] == ("org/model", list(hub.HUB_FILES), True)
    assert calls[2] == ("org/model", ["*Q8_0*.gguf"], False)
    assert not [pattern for pattern in hub.HUB_FILES if pattern in ("*.bin", "*.py", "*")]


def test_hub_out_of_reach_when_pulled_then_error_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot(repository: str, **options: object) -> str:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(DownloadError, match=r"org/model could not be fetched; is there a network.*local model folder"):
        hub.resolve_model("org/model", progress=False)


def test_cache_folder_when_variables_are_set_then_the_own_one_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("PELLUCID_CACHE", "/p")
    assert hub.cache_dir() == Path("/p")
    monkeypatch.delenv("PELLUCID_CACHE")
    assert hub.cache_dir() == Path("/x/pellucid")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_dir() == Path.home() / ".cache" / "pellucid"
