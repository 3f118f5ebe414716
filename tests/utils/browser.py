"""A headless Chromium for tests, spoken to over its own pipe (Chrome DevTools Protocol). Needs nothing but the browser itself."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, TimeoutExpired
from typing import Any

from utils.children import child

PATIENCE = 120.0  # the machine may stand still for a while
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# Chromium reads commands from descriptor 3 and writes to 4.
_LAUNCHER = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 64) for n in sys.argv[1:3])
os.dup2(read, 3); os.dup2(write, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
# key -> (code, windows key code, text)
_KEYS = {
    "Tab": ("Tab", 9, ""),
    "Enter": ("Enter", 13, "\r"),
    "Escape": ("Escape", 27, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
    " ": ("Space", 32, " "),
}


def find_chromium() -> str | None:
    """The browser's program; None where there is none. `CHROMIUM` names another one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


class BrowserError(RuntimeError):
    """The browser refused a command, a script threw, or something did not come."""


class Browser:
    """One Chromium process with a profile of its own."""

    def __init__(self, program: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="pellucid-chromium-", ignore_cleanup_errors=True)
        command_read, self._command_write = os.pipe()
        self._answer_read, answer_write = os.pipe()
        arguments = [program, *_FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        launcher = [sys.executable, "-c", _LAUNCHER, str(command_read), str(answer_write), *arguments]
        self._ending = ExitStack()
        self._process = self._ending.enter_context(
            child(launcher, pass_fds=(command_read, answer_write), stdout=DEVNULL, stderr=DEVNULL)
        )
        os.close(command_read)
        os.close(answer_write)
        self._next_id = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._listeners: dict[str, Callable[[str, dict[str, Any]], None]] = {}
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, name="chromium-pipe", daemon=True)
        self._reader.start()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Sends a command and gives its result."""
        number = self.send(method, session, **params)
        with self._changed:
            if not self._changed.wait_for(lambda: number in self._answers or not self._reader.is_alive(), PATIENCE):
                raise BrowserError(f"{method}: no answer")
            answer = self._answers.pop(number, {"error": "the browser has ended"})
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def send(self, method: str, session: str | None = None, **params: Any) -> int:
        """Sends a command whose answer nobody needs; event listeners must use this."""
        with self._changed:
            self._next_id += 1
            number = self._next_id
            message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
            os.write(self._command_write, json.dumps(message).encode() + b"\0")
        return number

    @contextmanager
    def page(self, **options: Any) -> Iterator[Page]:
        """A tab in a context of its own: nothing is shared with others. Options as of `Page.emulate`."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        try:
            page.start()
            page.emulate(**options)
            yield page
        finally:
            self._listeners.pop(session, None)
            self.call("Target.disposeBrowserContext", browserContextId=context)

    def listen(self, session: str, listener: Callable[[str, dict[str, Any]], None]) -> None:
        """`listener(method, params)` gets every event of a session, on the pipe's thread."""
        self._listeners[session] = listener

    def close(self) -> None:
        """Ends the browser and all of its processes."""
        with suppress(OSError, TimeoutExpired):
            self.send("Browser.close")
            self._process.wait(10)
        self._ending.close()
        self._reader.join(10)
        os.close(self._command_write)
        os.close(self._answer_read)
        self._profile.cleanup()

    def _read(self) -> None:
        rest = b""
        while data := os.read(self._answer_read, 1 << 20):
            *messages, rest = (rest + data).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    with self._changed:
                        self._answers[message["id"]] = message
                        self._changed.notify_all()
                elif (listener := self._listeners.get(message.get("sessionId", ""))) is not None:
                    listener(message["method"], message["params"])
        with self._changed:
            self._changed.notify_all()


class Page:
    """One tab. `problems` are console errors, exceptions and violations of the content policy; `hosts` those asked."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.problems: list[str] = []
        self.urls: list[str] = []
        self._answer_for: dict[str, tuple[int, str, str]] = {}

    def start(self) -> None:
        """Begins to note what happens."""
        self._browser.listen(self._session, self._note)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol, for this tab."""
        return self._browser.call(method, self._session, **params)

    # ---- the world around ------------------------------------------------------------------------------------------

    def emulate(
        self, width: int = 1280, height: int = 800, scheme: str = "light", scale: float = 1, reduced_motion: bool = True
    ) -> None:
        """The size of the window in CSS pixels, dark or light, pixels of the screen for one of CSS."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce" if reduced_motion else "no-preference"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)

    def answer(self, path: str, body: str, status: int = 200, media_type: str = "text/event-stream") -> None:
        """From now on, requests whose path ends in `path` get this instead of the server's answer."""
        self._answer_for[path] = (status, body, media_type)
        self.call("Fetch.enable", patterns=[{"urlPattern": f"*{known}"} for known in self._answer_for])

    # ---- doing -----------------------------------------------------------------------------------------------------

    def open(self, url: str) -> None:
        """Loads a page and waits until it says that it is ready."""
        self.call("Page.navigate", url=url)
        self.wait_for("document.getElementById('is-ready') !== null")

    def run(self, script: str) -> Any:
        """The value of an expression; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise BrowserError(f"{script}: {result['exceptionDetails'].get('exception', {}).get('description')}")
        return result["result"].get("value")

    def wait_for(self, condition: str) -> Any:
        """The value of an expression as soon as it is true."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                if value := self.run(condition):
                    return value
            except BrowserError:
                if time.monotonic() + 1 > deadline:
                    raise
            time.sleep(0.05)
        raise BrowserError(f"did not come: {condition}; problems: {self.problems}")

    def press(self, key: str, shift: bool = False) -> None:
        """One key, as a person presses it."""
        code, number, text = _KEYS[key]
        shared = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **shared)
        self.call("Input.dispatchKeyEvent", type="keyUp", **shared)

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)

    def point_at(self, x: float, y: float) -> None:
        """Moves the pointer."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """The middle of an element."""
        box = self.run(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)}); node.scrollIntoView({{block: 'nearest'}});"
            " const box = node.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def focused(self) -> str:
        """The id of what has the focus, else its text."""
        return str(self.run("document.activeElement.id || document.activeElement.textContent.trim()"))

    def screenshot(self, path: Path) -> None:
        """What can be seen, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    # ---- events ----------------------------------------------------------------------------------------------------

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"].get("exception", {}).get("description")))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str([one.get("value", one.get("description")) for one in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.urls.append(params["request"]["url"])
        elif method == "Fetch.requestPaused":
            self._fulfil(params)

    def _fulfil(self, params: dict[str, Any]) -> None:
        path = params["request"]["url"].partition("?")[0]
        found = next((answer for known, answer in self._answer_for.items() if path.endswith(known)), None)
        if found is None:
            self._browser.send("Fetch.continueRequest", self._session, requestId=params["requestId"])
            return
        status, body, media_type = found
        self._browser.send(
            "Fetch.fulfillRequest",
            self._session,
            requestId=params["requestId"],
            responseCode=status,
            responseHeaders=[{"name": "content-type", "value": media_type}],
            body=base64.b64encode(body.encode()).decode(),
        )


@contextmanager
def running_browser() -> Iterator[Browser]:
    """A browser while the block runs.

    Raises:
        BrowserError: there is none on this machine.
    """
    program = find_chromium()
    if program is None:
        raise BrowserError("no Chromium on this machine: install it, or name it in CHROMIUM")
    browser = Browser(program)
    try:
        yield browser
    finally:
        browser.close()
