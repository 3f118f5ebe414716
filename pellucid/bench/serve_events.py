"""Server-sent events from bytes that may be split anywhere. WHATWG HTML, section 9.2, less carriage returns alone as line ends."""

from __future__ import annotations

from pellucid.errors import PellucidError

MAX_LINE_BYTES = 2**20


class StreamError(PellucidError, ValueError):
    """Bytes that are no stream of events."""


class EventParser:
    """Feed it bytes, get the data of whole events. What is wrong but can be passed over is kept in `problems`."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._left = bytearray()
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[str]:
        """The data of the events that are whole now.

        Raises:
            StreamError: a line is longer than MAX_LINE_BYTES.
        """
        self._left += piece
        if b"\n" not in piece:
            if len(self._left) > MAX_LINE_BYTES:
                raise StreamError(f"a line of the stream is longer than {MAX_LINE_BYTES:,} bytes")
            return []
        *lines, left = bytes(self._left).split(b"\n")
        self._left = bytearray(left)
        if max(map(len, lines)) > MAX_LINE_BYTES:
            raise StreamError(f"a line of the stream is longer than {MAX_LINE_BYTES:,} bytes")
        return [event for line in lines if (event := self._line(line.removesuffix(b"\r"))) is not None]

    def end(self) -> None:
        """Notes what stands at the end without a line's or an event's end."""
        if self._left or self._data:
            self.problems.append("the stream ends within an event")

    def _line(self, line: bytes) -> str | None:
        if not line:
            event, self._data = "\n".join(self._data), []
            return event or None
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(self._text(value.removeprefix(b" ")))
        elif name not in (b"", b"event", b"id", b"retry"):
            self.problems.append(f"a line of the stream is no event: {line[:40]!r}")
        return None

    def _text(self, value: bytes) -> str:
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            self.problems.append(f"the stream is not UTF-8: {error.reason} at byte {error.start} of a line")
            return value.decode(errors="replace")
