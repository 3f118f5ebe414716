"""What an engine's owner finds in its inbox: commands of the front end, and words of threads of its own."""

from __future__ import annotations

from dataclasses import dataclass
from queue import SimpleQueue

from pellucid.errors import PellucidError
from pellucid.service.messages import Command, Submit


@dataclass(frozen=True)
class Compiled:
    """What this request asks for is compiled, or known to be refused."""

    submit: Submit


@dataclass(frozen=True)
class Failed:
    """The engine cannot go on."""

    error: PellucidError


Word = Command | Compiled | Failed
Inbox = SimpleQueue[Word]
