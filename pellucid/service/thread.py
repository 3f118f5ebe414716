"""How commands come to an engine's owner and events come back. Here: a thread of the same process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Protocol

from pellucid.service.inbox import Inbox
from pellucid.service.messages import Command, Died, Event, LoadFailed, Shutdown, Start
from pellucid.service.owner import EngineOwner

Deliver = Callable[[Sequence[Event]], None]


class Transport(Protocol):
    """A running owner, seen from the front end.

    Events are delivered in order, on one thread of the transport's own. The last one is `Died` or `LoadFailed`, whatever
    happens to the owner.
    """

    def start(self, deliver: Deliver) -> None:
        """Begins to load; events come from now on."""

    def send(self, command: Command) -> None:
        """Hands a command over; never blocks. After the end it is lost."""

    def close(self) -> None:
        """Shuts the owner down and waits for its end; all memory is free then. Harmless when called again."""

    @property
    def is_alive(self) -> bool:
        """True while there is an owner."""


class ThreadTransport:
    """The owner on a thread of this process.

    A second thread delivers: waking readers lets go of the interpreter lock, and the owner should not queue for it behind
    them; it lets go of the lock itself when the core computes.
    """

    def __init__(self, start: Start) -> None:
        self._inbox: Inbox = SimpleQueue()
        self._outbox: SimpleQueue[Sequence[Event]] = SimpleQueue()
        self.owner = EngineOwner(start, self._inbox, self._outbox.put)
        self._owning = Thread(target=self.owner.run, name="pellucid-engine", daemon=True)
        self._delivering: Thread | None = None

    def start(self, deliver: Deliver) -> None:
        """Begins to load; events come from now on."""
        self._delivering = Thread(target=_deliver, args=(self._outbox, deliver), name="pellucid-events", daemon=True)
        self._delivering.start()
        self._owning.start()

    def send(self, command: Command) -> None:
        """Hands a command over."""
        self._inbox.put(command)

    def close(self) -> None:
        """Shuts the owner down behind the step that it is in."""
        self._inbox.put(Shutdown())
        if self._delivering is not None:
            self._owning.join()
            self._delivering.join()

    @property
    def is_alive(self) -> bool:
        """True while there is an owner."""
        return self._owning.is_alive()


def _deliver(outbox: SimpleQueue[Sequence[Event]], deliver: Deliver) -> None:
    while True:
        events = outbox.get()
        deliver(events)
        if isinstance(events[-1], (Died, LoadFailed)):
            return
