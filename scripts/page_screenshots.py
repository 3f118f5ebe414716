#!/usr/bin/env python3
"""Makes the pictures of docs/page.md: a real server, the small model, a headless Chromium.

    python scripts/page_screenshots.py [folder]

The pictures differ a little from run to run: times are real.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT / "tests"))

from utils.browser import Browser, Page, running_browser  # noqa: E402
from utils.http_server import running_server  # noqa: E402

_MODEL = "smollm2-135m-instruct"
_QUESTION = "Explain in two sentences what a lighthouse does."
_WIDE = {"width": 1360, "height": 850}
_MAX_BYTES = 200_000


def _ask(page: Page, text: str) -> None:
    page.run("document.getElementById('message').focus()")
    page.type(text)
    page.press("Enter")


def _settle(page: Page) -> None:
    page.wait_for("document.getElementById('stop').hidden")
    page.wait_for("document.getElementById('tile-running').textContent === '0'")


def _warm(page: Page) -> None:
    """A question and its answer, as the page remembers them."""
    page.run("document.getElementById('setting-temperature').value = '0'")
    _ask(page, _QUESTION)
    page.wait_for("document.getElementById('stop').hidden")


def _chat(page: Page) -> None:
    _warm(page)
    _ask(page, "Write a list of three things that a lighthouse keeper needs.")
    _settle(page)


def _phone(page: Page) -> None:
    _warm(page)
    page.run("document.getElementById('message').blur()")


def _live(page: Page) -> None:
    """Nine requests, of which six may run and which need more blocks than there are."""
    _warm(page)
    page.run("document.getElementById('setting-max_tokens').value = '300'")
    _ask(page, "Tell me a long story about a lighthouse.")
    time.sleep(0.5)
    page.click("#burst")
    page.wait_for("Number(document.getElementById('tile-waiting-sub').textContent.split(' ')[0]) > 0")
    page.run("document.getElementById('burst').blur()")
    time.sleep(0.1)


_PICTURES: tuple[tuple[str, Callable[[Page], None], dict[str, object]], ...] = (
    ("page-chat-light", _chat, {**_WIDE, "scheme": "light"}),
    ("page-chat-dark", _chat, {**_WIDE, "scheme": "dark"}),
    ("page-phone", _phone, {"width": 360, "height": 740, "scale": 2}),
    ("page-live", _live, {**_WIDE, "height": 1060}),
)


def _take(browser: Browser, url: str, path: Path, prepare: Callable[[Page], None], options: dict[str, object]) -> None:
    with browser.page(**options) as page:
        page.open(f"{url}/")
        prepare(page)
        page.screenshot(path)
        if page.problems:
            raise SystemExit(f"{path.name}: {page.problems}")
    size = path.stat().st_size
    print(f"{path} {size:,} bytes")
    if size > _MAX_BYTES:
        raise SystemExit(f"{path.name} has {size:,} bytes; at most {_MAX_BYTES:,} are kept in the repository")


def main() -> None:
    """All pictures."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else _ROOT / "docs" / "img"
    with running_server(_MODEL, num_blocks=24, max_num_seqs=6) as server, running_browser() as browser:
        for name, prepare, options in _PICTURES:
            _take(browser, server.url, folder / f"{name}.png", prepare, options)


if __name__ == "__main__":
    main()
