"""Tool calls in a model's text: found, read and passed on while it streams, in the dialect of the model.

What comes out is a function of the text alone, however it was cut into deltas: characters are read one by one. What looks like
a call and is none comes out as content; what breaks off or breaks within the arguments is told in `problems`.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Sequence

from pellucid.json_text import well_formed
from pellucid.text.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta, joined
from pellucid.text.reasoning_parser import Markers, ReasoningDialect, ReasoningParser
from pellucid.text.tokenizer import Tokenizer
from pellucid.text.tool_dialects import Tool, ToolDialect
from pellucid.text.tool_syntax import NamedReader, ObjectReader, ParametersReader, PythonicReader, Reader, State

_LETTERS = string.ascii_letters + string.digits
IdMaker = Callable[[int], str]


def random_id(dialect: ToolDialect) -> IdMaker:
    """Ids of calls as the dialect's template takes them."""
    if dialect.short_ids:
        return lambda index: "".join(secrets.choice(_LETTERS) for _ in range(9))
    return lambda index: f"call_{secrets.token_hex(12)}"


class ToolParser:
    """Splits a stream of text into content and tool calls.

    Where calls stand without a marker (`at_start`), only a call of one of `tools` is one; behind a marker any name is. Content
    of nothing but whitespace around calls is dropped. `has_begun`: the text goes on with an answer, so this is not its beginning.
    """

    def __init__(
        self,
        dialect: ToolDialect,
        tools: Sequence[Tool] = (),
        *,
        has_begun: bool = False,
        make_id: IdMaker | None = None,
    ) -> None:
        self._dialect = dialect
        self._tools = {tool.name: tool for tool in tools}
        self._make_id = random_id(dialect) if make_id is None else make_id
        self._markers = Markers((*dialect.begins, *dialect.silent))
        self._made: list[Delta] = []
        self._reader: Reader | None = None
        self._state = State.MIDST
        self._raw = ""  # what was taken since the calls began: content, should they be none
        self._tail = ""  # what may become the end marker
        self._space = ""
        self._is_marked = False
        self._calls_before = 0  # when the reader began
        self._may_start = dialect.at_start and not has_begun
        self._skips = False  # to the end marker: the call there is broken
        self.num_calls = 0
        self.problems: list[str] = []

    # ---- what callers use -----------------------------------------------------------------------------------------------

    def feed(self, text: str) -> list[Delta]:
        """What is known of the text now that this came."""
        for character in text:
            self._push(character)
        return self._take()

    def finish(self) -> list[Delta]:
        """The rest, when no more comes."""
        if self._reader is not None:
            self._break_off()
        for character in self._markers.flush():
            self._content(character)
        if not self.num_calls:
            self._made.append(ContentDelta(self._space))
        self._space = ""
        return self._take()

    def _take(self) -> list[Delta]:
        made, self._made = self._made, []
        return joined(made)

    # ---- the sink of readers --------------------------------------------------------------------------------------------

    def begin_call(self, name: str) -> bool:
        """Begins a call; False when only known tools count here and this is none."""
        if not self._is_marked and name not in self._tools:
            return False
        self._space = ""
        self._made.append(ToolCallDelta(self.num_calls, self._make_id(self.num_calls), well_formed(name)))
        self.num_calls += 1
        return True

    def arguments(self, text: str) -> None:
        """Passes on more arguments of the newest call. Escapes that were read may be halves of characters: what goes on is text."""
        if text:
            self._made.append(ToolCallDelta(self.num_calls - 1, arguments=well_formed(text)))

    # ---- content ----------------------------------------------------------------------------------------------------------

    def _push(self, character: str) -> None:
        if self._skips:
            self._skip(character)
        elif self._reader is not None:
            self._read(character)
        elif self._may_start and not self._markers.held and character in "{[":
            self._begin(is_marked=False)
            self._read(character)
        else:
            text, marker = self._markers.push(character)
            for one in text:
                self._content(one)
            if marker is not None and marker in self._dialect.begins:
                self._begin(is_marked=True, raw=marker)

    def _content(self, character: str) -> None:
        if character.isspace():
            self._space += character
            return
        self._may_start = False
        self._made.append(ContentDelta(self._space + character))
        self._space = ""

    # ---- calls ------------------------------------------------------------------------------------------------------------

    def _begin(self, *, is_marked: bool, raw: str = "") -> None:
        self._reader, self._state = self._new_reader(), State.MIDST
        self._is_marked, self._raw, self._tail = is_marked, raw, ""
        self._calls_before = self.num_calls

    def _new_reader(self) -> Reader:
        dialect = self._dialect
        if dialect.syntax == "object":
            return ObjectReader(self)
        if dialect.syntax == "named":
            return NamedReader(self, dialect)
        if dialect.syntax == "parameters":
            return ParametersReader(self, dialect, self._tools)
        return PythonicReader(self)

    def _read(self, character: str) -> None:
        """One character of the calls: of the end marker, where they may end and it can be that, else the reader's."""
        end = self._dialect.end if self._is_marked else ""
        if self.num_calls == self._calls_before:
            self._raw += character
        if end and (self._tail or self._state is State.MAY_END) and end.startswith(self._tail + character):
            self._tail += character
            if self._tail == end:
                self._end()
            return
        text, self._tail = self._tail + character, ""
        for index, one in enumerate(text):
            self._state = self._reader.push(one) if self._reader is not None else State.WRONG
            if self._state is State.WRONG:
                self._stumble(text[index:])
                return

    def _end(self) -> None:
        """The end marker has come."""
        if self._reader is not None and not self._reader.close():
            self._tell("has an end before it is complete")
        self._reader, self._raw, self._tail = None, "", ""

    def _stumble(self, rest: str) -> None:
        """`rest` does not fit. Behind a call that is complete it is what follows; within one the call is broken; before one
        nothing of it was a call."""
        reader, raw = self._reader, self._raw
        self._reader, self._raw = None, ""
        if self.num_calls == self._calls_before:
            for character in raw.removesuffix(rest):
                self._content(character)
            self._may_start = False
        elif reader is not None and not reader.close():
            self._tell("does not go on as its syntax says")
            self._skips = bool(self._dialect.end and self._is_marked)
        for character in rest:
            self._push(character)

    def _skip(self, character: str) -> None:
        self._raw += character
        if self._raw.endswith(self._dialect.end):
            self._skips, self._raw = False, ""
        else:
            self._raw = self._raw[-len(self._dialect.end) :]

    def _break_off(self) -> None:
        """The text has ended within calls."""
        reader, self._reader = self._reader, None
        if self.num_calls == self._calls_before:
            for character in self._raw:
                self._content(character)
        elif reader is not None and not reader.close():
            self._tell("breaks off")

    def _tell(self, what: str) -> None:
        self.problems.append(f"tool call {self.num_calls - 1} {what}")


class OutputParser:
    """Reasoning first, then tool calls in what is left: either part may be missing.

    Args:
        reasoning: how reasoning is marked; None for none.
        tools: how tool calls are written; None where no tool may be called: the text is then left as it is.
        known: the tools of the request.
        starts_inside: the prompt has opened the reasoning.
        has_begun: the prompt ends within the answer, or within the reasoning.
    """

    def __init__(
        self,
        reasoning: ReasoningDialect | None = None,
        tools: ToolDialect | None = None,
        known: Sequence[Tool] = (),
        *,
        starts_inside: bool = False,
        has_begun: bool = False,
        make_id: IdMaker | None = None,
    ) -> None:
        self._reasoning = self._tools = None
        if reasoning is not None:
            self._reasoning = ReasoningParser(reasoning, starts_inside=starts_inside, has_begun=has_begun)
        if tools is not None:
            self._tools = ToolParser(tools, known, has_begun=has_begun and not starts_inside, make_id=make_id)

    def feed(self, text: str) -> list[Delta]:
        """What is known of the text now that this came."""
        first: list[Delta] = [ContentDelta(text)] if self._reasoning is None else self._reasoning.feed(text)
        return self._through(first)

    def finish(self) -> list[Delta]:
        """The rest, when no more comes."""
        made = [] if self._reasoning is None else self._through(self._reasoning.finish())
        return joined([*made, *([] if self._tools is None else self._tools.finish())])

    def _through(self, deltas: list[Delta]) -> list[Delta]:
        tools = self._tools
        if tools is None:
            return deltas
        made: list[Delta] = []
        for delta in deltas:
            made += tools.feed(delta.text) if isinstance(delta, ContentDelta) else [delta]
        return joined(made)

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return 0 if self._tools is None else self._tools.num_calls

    @property
    def problems(self) -> list[str]:
        """What is wrong with calls that had begun."""
        return [] if self._tools is None else self._tools.problems


def needs_special_tokens(tokenizer: Tokenizer, *dialects: ToolDialect | ReasoningDialect | None) -> bool:
    """True when a marker is or holds a special token: its text is there only with `skip_special_tokens` off."""
    special = {tokenizer.raw_token(token_id) for token_id in tokenizer.special_token_ids} - {None, ""}
    markers = [marker for dialect in dialects if dialect is not None for marker in dialect.markers]
    return any(token in marker for token in special if token for marker in markers)


__all__ = ["ContentDelta", "OutputParser", "ReasoningDelta", "ToolCallDelta", "ToolParser", "needs_special_tokens"]
