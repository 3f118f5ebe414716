"""Stop strings in a stream of text: what may be released now, and where the text ends."""

from __future__ import annotations

from collections.abc import Sequence

from pellucid.errors import InvalidRequestError


class StopChecker:
    """Watches streamed text for stop strings and never releases a part of one that matched.

    The match is the one that *completes* first in the text; of several that complete on the same
    character the one that starts first (the longest) wins, and of equal strings the first listed.
    So the result depends on the text alone and not on how it was cut into deltas.

    Args:
        stop: non-empty stop strings; may be empty.
        include_stop_str_in_output: whether the matched string is part of the released text.

    Raises:
        InvalidRequestError: a stop string is not a `str` or is empty (`param` is "stop").
    """

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool = False) -> None:
        if isinstance(stop, str):
            stop = (stop,)
        for index, string in enumerate(stop):
            if not isinstance(string, str) or not string:
                raise InvalidRequestError(f"stop[{index}]", f"is {string!r}", limit="it must be a non-empty string")
        self._stop = tuple(dict.fromkeys(stop))
        self._first_characters = frozenset(string[0] for string in self._stop)
        self._longest = max(map(len, self._stop), default=0)
        self._include = include_stop_str_in_output
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._matched

    def push(self, delta: str) -> tuple[str, str | None]:
        """Takes the next piece of text; returns (text that may be released, stop string that matched or None).

        After a match, text is swallowed: ("", the stop string that matched).
        """
        if self._matched is not None:
            return "", self._matched
        if not self._stop:
            return delta, None
        text = self._held + delta
        match = min(
            ((start + len(string), start, string) for string in self._stop if (start := text.find(string)) >= 0),
            default=None,
        )
        if match is not None:
            end, start, self._matched = match
            self._held = ""
            return text[: end if self._include else start], self._matched
        held_from = self._possible_start(text)
        self._held = text[held_from:]
        return text[:held_from], None

    def flush(self) -> str:
        """The text still held back; to be called once when the stream ends without a match."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """The earliest position from which the rest of `text` is the beginning of a stop string."""
        for position in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[position] in self._first_characters:
                tail = text[position:]
                if any(string.startswith(tail) for string in self._stop):
                    return position
        return len(text)
