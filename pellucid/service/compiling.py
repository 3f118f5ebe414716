"""Requests whose structure has to be compiled before they are queued: a thread does it while the owner goes on with its steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from pellucid.service.inbox import Compiled, Inbox
from pellucid.service.messages import Submit


class Compiling:
    """The owner's own; only `_compile` runs on the thread."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._waiting: dict[str, Submit] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pellucid-owner-compiler")

    def put(self, submit: Submit, compile_: Callable[[], Any]) -> None:
        """Has `compile_` called; the inbox gets a `Compiled` behind it, whatever becomes of it."""
        self._waiting[submit.request_id] = submit
        self._thread.submit(self._compile, submit, compile_)

    def _compile(self, submit: Submit, compile_: Callable[[], Any]) -> None:
        with suppress(Exception):  # the owner asks again, and is told the same
            compile_()
        self._inbox.put(Compiled(submit))

    def take(self, compiled: Compiled) -> bool:
        """Whether the request is still wanted."""
        is_wanted = self._waiting.get(compiled.submit.request_id) is compiled.submit
        if is_wanted:
            del self._waiting[compiled.submit.request_id]
        return is_wanted

    def drop(self, request_id: str | None = None) -> list[Submit]:
        """Forgets one request, or all; gives those that it was."""
        names = list(self._waiting) if request_id is None else [request_id]
        return [self._waiting.pop(name) for name in names if name in self._waiting]

    def close(self) -> None:
        """Starts no more; the one that runs ends by itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)
