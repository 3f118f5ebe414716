"""What a campaign found, grouped by kind, with one reproduction each."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_NAME = re.compile(r"\b[0-9a-f]{16,}\b")
_NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?(e[+-]?\d+)?")


def signature_of(text: str) -> str:
    """`text` without its quotations and numbers, so that two messages of one kind are equal."""
    plain = _QUOTED.sub("'…'", text.split("\n", 1)[0])
    return _NUMBER.sub("N", _NAME.sub("…", plain))[:160]


@dataclass
class Found:
    """One kind: how often it came, and the first time."""

    signature: str
    detail: str
    case: int
    times: int = 1


@dataclass
class Findings:
    """Kinds in the order in which they came."""

    kinds: dict[str, Found] = field(default_factory=dict)

    def add(self, signature: str, detail: str, case: int) -> None:
        """Counts a finding; the first of its kind is kept whole."""
        known = self.kinds.get(signature)
        if known is None:
            self.kinds[signature] = Found(signature, detail, case)
        else:
            known.times += 1

    @property
    def times(self) -> int:
        """All findings of all kinds."""
        return sum(found.times for found in self.kinds.values())

    def __bool__(self) -> bool:
        return bool(self.kinds)
