"""Reasoning in a model's text: what stands between two markers, told apart from the answer while it streams.

What comes out is a function of the text alone, however it was cut into deltas: characters are read one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

from pellucid.text.deltas import ContentDelta, Delta, ReasoningDelta, joined


@dataclass(frozen=True)
class ReasoningDialect:
    """How a family of models marks its reasoning. `silent` markers are no text at all."""

    name: str
    opens: tuple[str, ...]
    closes: tuple[str, ...]
    silent: tuple[str, ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        """All that is no text."""
        return (*self.opens, *self.closes, *self.silent)


REASONING_DIALECTS = {
    dialect.name: dialect
    for dialect in (
        ReasoningDialect("think", ("<think>",), ("</think>",)),
        ReasoningDialect("thinking", ("<thinking>",), ("</thinking>",)),
        ReasoningDialect("mistral", ("[THINK]",), ("[/THINK]",)),
        ReasoningDialect("kimi", ("◁think▷",), ("◁/think▷",)),
        ReasoningDialect("seed", ("<seed:think>",), ("</seed:think>",)),
        ReasoningDialect("command", ("<|START_THINKING|>",), ("<|END_THINKING|>",)),
        ReasoningDialect(
            "granite",
            ("Here is my thought process:", "Here's my thought process:"),
            ("Here is my response:", "Here's my response:"),
        ),
        ReasoningDialect(
            "harmony",
            ("<|channel|>analysis<|message|>",),
            ("<|end|>",),
            ("<|start|>assistant", "<|channel|>final<|message|>", "<|return|>"),
        ),
    )
}


def detect_reasoning(chat_template: str | None) -> ReasoningDialect | None:
    """The dialect whose opening or closing marker stands in a chat template; None when none does."""
    for dialect in REASONING_DIALECTS.values():
        if any(marker in (chat_template or "") for marker in (*dialect.opens, *dialect.closes)):
            return dialect
    return None


def opens_in_prompt(dialect: ReasoningDialect, prompt: str) -> bool:
    """True when the prompt ends with an opening marker: the output then begins inside of the reasoning."""
    return prompt.rstrip().endswith(dialect.opens)


def stands_behind(dialect: ReasoningDialect | None, begun: str, *, starts_inside: bool = False) -> tuple[bool, bool]:
    """(the reasoning is open, something of the reasoning or of the answer stands there) behind the beginning of an output."""
    if dialect is None:
        return False, bool(begun.strip())
    parser = ReasoningParser(dialect, starts_inside=starts_inside)
    parser.feed(begun)
    parser.finish()
    return parser.is_inside, parser.has_begun


class Markers:
    """Finds markers in a text that comes character by character, and holds back what may become one."""

    def __init__(self, markers: tuple[str, ...]) -> None:
        self._markers = markers
        self._beginnings = frozenset(marker[:end] for marker in markers for end in range(1, len(marker)))
        self.held = ""

    def push(self, character: str) -> tuple[str, str | None]:
        """(text that is none of a marker, the marker that is complete now); what is held comes out later."""
        self.held += character
        if self.held in self._markers:
            marker, self.held = self.held, ""
            return "", marker
        released = 0
        while released < len(self.held) and self.held[released:] not in self._beginnings:
            released += 1
            if self.held[released:] in self._markers:
                text, marker = self.held[:released], self.held[released:]
                self.held = ""
                return text, marker
        text, self.held = self.held[:released], self.held[released:]
        return text, None

    def flush(self) -> str:
        """What was held back, when no more comes."""
        text, self.held = self.held, ""
        return text


class ReasoningParser:
    """Splits a stream of text into reasoning and content.

    Reasoning opens at the beginning of the output alone, behind nothing but whitespace and other reasoning: an answer that
    speaks of the markers is left as it is. It ends at the first closing marker; an opening one inside of it is text. Without
    a closing marker all the rest is reasoning. Whitespace around reasoning is dropped.

    Args:
        dialect: the markers.
        starts_inside: the prompt has opened the reasoning (`opens_in_prompt`).
        has_begun: the prompt ends within the present part (`stands_behind`): its whitespace counts, and an answer has no
            reasoning any more.
    """

    def __init__(self, dialect: ReasoningDialect, *, starts_inside: bool = False, has_begun: bool = False) -> None:
        self._dialect = dialect
        self._inside, self._may_open = starts_inside, starts_inside or not has_begun
        self._is_first = not has_begun  # nothing but whitespace has come in the present part
        self._space = ""
        self._has_reasoned = starts_inside
        self._look_for(dialect.markers if self._may_open else dialect.silent)

    @property
    def is_inside(self) -> bool:
        """True where the text stands within the reasoning."""
        return self._inside

    @property
    def has_begun(self) -> bool:
        """True when something of the present part has come."""
        return not self._is_first

    def _look_for(self, markers: tuple[str, ...]) -> None:
        self._markers = Markers(markers)

    def feed(self, text: str) -> list[Delta]:
        """What is known of the text now that this came."""
        made: list[Delta] = []
        for character in text:
            released, marker = self._markers.push(character)
            self._text(released, made)
            if marker is not None:
                self._marker(marker, made)
        return joined(made)

    def finish(self) -> list[Delta]:
        """The rest, when no more comes."""
        made: list[Delta] = []
        self._text(self._markers.flush(), made)
        if not self._inside and (not self._is_first or not self._has_reasoned):
            made.append(ContentDelta(self._space))
        self._space = ""
        return joined(made)

    def _marker(self, marker: str, made: list[Delta]) -> None:
        if self._inside and marker in self._dialect.closes:
            self._turn(inside=False)
        elif not self._inside and self._may_open and marker in self._dialect.opens:
            self._turn(inside=True)
        elif marker not in self._dialect.silent and not (self._inside and self._is_first):
            self._text(marker, made)  # a prompt that opened it, and a model that does so again: said once

    def _turn(self, *, inside: bool) -> None:
        self._inside, self._is_first, self._space = inside, True, ""
        self._has_reasoned = True

    def _text(self, text: str, made: list[Delta]) -> None:
        """Text of the present part. Whitespace waits for what comes behind it."""
        if not text:
            return
        body = text.rstrip()
        if not body:
            self._space += text
            return
        before = self._space + text[: len(text) - len(text.lstrip())]
        keeps = not self._is_first or not (self._inside or self._has_reasoned)
        self._space, core = text[len(body) :], body.lstrip()
        kind = ReasoningDelta if self._inside else ContentDelta
        made.append(kind((before if keeps else "") + core))
        if self._is_first:
            self._is_first = False
            if not self._inside:
                self._open_no_more(made)

    def _open_no_more(self, made: list[Delta]) -> None:
        """The answer has begun: only what is no text is looked for from now on."""
        self._may_open = False
        held = self._markers.flush()
        self._look_for(self._dialect.silent)
        for character in held:
            released, marker = self._markers.push(character)
            self._text(released, made)
            if marker is not None:
                self._marker(marker, made)
