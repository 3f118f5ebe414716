"""A conversation whose last message is left open, so that the model goes on with it.

Where that message ends in the rendered text is never found by what it says, for a template may write the same words itself. A tag
that stands nowhere else is put at the message's end, the conversation is rendered, and the text is cut at the tag.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pellucid.errors import FieldName, InvalidRequestError

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages], str]


@dataclass(frozen=True)
class LeftOpen:
    """`text` is the prompt; `begun` is what of the last message stands at its end."""

    text: str
    begun: str


def left_open(render: Render, messages: Messages) -> LeftOpen:
    """The prompt up to the end of the last message's content, as the template writes it.

    It is a beginning of what `render` gives. Whitespace at the content's end stays where the template keeps it.

    Args:
        render: the template; what else it reads, the time among it, must be the same at each call.

    Raises:
        InvalidRequestError: the last message has calls, or the template does not write its content once and as it is; or as
            `render` does.
    """
    last = messages[-1]
    if last.get("tool_calls"):
        raise _refused("the last message has tool_calls; only a text can be left open")
    as_given, tag = render(messages), _new_tag()
    end, body_end = _end(last), _body_end(last)
    before, behind = _cut(render(_tagged(messages, end, tag)), tag)
    if body_end != end:
        # With the tag in front of the whitespace at the end, what the template keeps of that stands between the tag and `behind`.
        start, rest = _cut(render(_tagged(messages, body_end, tag)), tag)
        before = min(before, start + rest.removesuffix(behind), key=len)
    if not as_given.startswith(before):
        raise _refused("the chat template does not write the last message as it is given")
    return LeftOpen(before, _begun(render, messages, tag, before))


def text_behind(render: Render, messages: Messages) -> str | None:
    """What the template writes behind the last message's content; None where that cannot be told."""
    tag = _new_tag()
    parts = render(_tagged(messages, _end(messages[-1]), tag)).split(tag)
    return parts[1] if len(parts) == 2 else None


def content_text(message: Mapping[str, Any]) -> str:
    """The text of a message, its parts joined."""
    return "".join(_texts(message))


def _begun(render: Render, messages: Messages, tag: str, before: str) -> str:
    """What of `before` comes from the last message: all behind a tag at its beginning. The content as it was given where the
    template does not write the whole of it."""
    start, found, _ = render(_tagged(messages, (0, 0), tag)).partition(tag)
    return before[len(start) :] if found and before.startswith(start) else content_text(messages[-1])


def _new_tag() -> str:
    """Digits alone: no change of case and no escaping alters them. Nobody can have written them before."""
    return str(10**38 + secrets.randbelow(10**38))


def _cut(text: str, tag: str) -> tuple[str, str]:
    parts = text.split(tag)
    if len(parts) != 2:
        shown = "does not show the last message" if len(parts) == 1 else "shows the last message more than once"
        raise _refused(f"the chat template {shown}")
    return parts[0], parts[1]


_Place = tuple[int, int]  # a part of the content, and a position in its text


def _texts(message: Mapping[str, Any]) -> list[str]:
    """The texts of a content's parts: one where it is a text, or nothing."""
    content = message.get("content") or ""
    return [content] if isinstance(content, str) else [one if isinstance(one, str) else one["text"] for one in content]


def _end(message: Mapping[str, Any]) -> _Place:
    texts = _texts(message)
    return len(texts) - 1, len(texts[-1])


def _body_end(message: Mapping[str, Any]) -> _Place:
    """Where whitespace alone follows."""
    texts = [text.rstrip() for text in _texts(message)]
    number = max((number for number, text in enumerate(texts) if text), default=0)
    return number, len(texts[number])


def _tagged(messages: Messages, place: _Place, tag: str) -> Messages:
    """The conversation with the tag at a place of its last message's content."""
    (number, at), texts = place, _texts(messages[-1])
    texts[number] = texts[number][:at] + tag + texts[number][at:]
    is_list = bool(messages[-1].get("content")) and not isinstance(messages[-1]["content"], str)
    content: Any = [{"type": "text", "text": text} for text in texts] if is_list else texts[0]
    return [*messages[:-1], {**messages[-1], "content": content}]


def _refused(why: str) -> InvalidRequestError:
    return InvalidRequestError("messages", (FieldName("continue_final_message"), f": {why}"))
