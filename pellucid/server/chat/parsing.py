"""From a model's text to typed parts: the one place where content, reasoning and tool calls are told apart.

`OutputStyle` says how the outputs of one request are written; `prepare` of turns.py makes it. Its `reader()` follows one request:
`read(delta)` gives the parts of each `EngineCoreOutput` of a stream, `whole(output)` the message of an output that has ended. Both
go through the same parser, so a stream's parts join to the whole. An API spells the parts (`ContentDelta`, `ReasoningDelta`,
`ToolCallDelta` of text/deltas.py) in its own shape; see chat.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pellucid.api.outputs import CompletionOutput, EngineCoreOutput
from pellucid.text.deltas import ContentDelta, ReasoningDelta, ToolCallDelta
from pellucid.text.reasoning_parser import ReasoningDialect
from pellucid.text.tool_dialects import Tool, ToolDialect
from pellucid.text.tool_parsers import OutputParser

Part = ContentDelta | ReasoningDelta | ToolCallDelta

PIECE = 1024  # characters that a whole text is fed by: parts are joined within a piece


@dataclass(frozen=True)
class OutputStyle:
    """How the outputs of one request are written, and what of them is shown."""

    reasoning: ReasoningDialect | None = None
    tools: ToolDialect | None = None  # None: no tool may be called, and the text is left as it is
    known: tuple[Tool, ...] = ()
    starts_inside: bool = False  # the prompt has opened the reasoning
    has_begun: bool = False  # and ends within the answer, or within the reasoning
    parallel: bool = True  # False: the first call alone
    shows_reasoning: bool = True

    @property
    def is_plain(self) -> bool:
        """True when all text is content."""
        return self.reasoning is None and self.tools is None

    def reader(self) -> OutputReader:
        """Of one request."""
        return OutputReader(self)


@dataclass
class Call:
    """A tool call. `arguments` is JSON, unless the model broke off or did not keep to it."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Message:
    """A whole output."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)


class OutputReader:
    """The outputs of one request, a parser for each choice."""

    def __init__(self, style: OutputStyle) -> None:
        self.style = style
        self._parsers: dict[int, OutputParser] = {}

    def read(self, delta: EngineCoreOutput) -> list[Part]:
        """What is new in a choice; with the last delta also what was held back."""
        if self.style.is_plain:
            return [ContentDelta(delta.text)] if delta.text else []
        parser = self._parser(delta.index)
        parts = parser.feed(delta.text)
        return self._shown([*parts, *parser.finish()] if delta.finish_reason is not None else parts)

    def whole(self, output: CompletionOutput) -> Message:
        """An output that has ended."""
        if self.style.is_plain:
            return Message(output.text)
        parser, parts = self._parser(output.index), list[Part]()
        for start in range(0, len(output.text), PIECE):
            parts += parser.feed(output.text[start : start + PIECE])
        return joined_message(self._shown([*parts, *parser.finish()]))

    def has_calls(self, index: int) -> bool:
        """True when this choice has called a tool."""
        return index in self._parsers and self._parsers[index].num_calls > 0

    def _parser(self, index: int) -> OutputParser:
        style = self.style
        if index not in self._parsers:
            self._parsers[index] = OutputParser(
                style.reasoning,
                style.tools,
                style.known,
                starts_inside=style.starts_inside,
                has_begun=style.has_begun,
            )
        return self._parsers[index]

    def _shown(self, parts: Iterable[Part]) -> list[Part]:
        return [part for part in parts if self._is_shown(part)]

    def _is_shown(self, part: Part) -> bool:
        if isinstance(part, ReasoningDelta):
            return self.style.shows_reasoning
        return isinstance(part, ContentDelta) or self.style.parallel or part.index == 0


def joined_message(parts: Sequence[Part]) -> Message:
    """All parts of one output as a message."""
    calls: list[Call] = []
    arguments: list[list[str]] = []
    for part in parts:
        if isinstance(part, ToolCallDelta):
            if part.id is not None:
                calls.append(Call(part.id, part.name or ""))
                arguments.append([])
            arguments[-1].append(part.arguments)
    for call, texts in zip(calls, arguments, strict=True):
        call.arguments = "".join(texts)
    content = "".join(part.text for part in parts if isinstance(part, ContentDelta))
    reasoning = "".join(part.text for part in parts if isinstance(part, ReasoningDelta))
    return Message(content, reasoning, calls)
