"""From a conversation to the text of its prompt: the model's chat template, and what it needs to be told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pellucid.errors import InvalidRequestError
from pellucid.server.protocol_base import shown
from pellucid.server.protocol_chat import Message
from pellucid.server.turns import Turn
from pellucid.text.tokenizer import Tokenizer
from pellucid.text.tool_dialects import ToolDialect
from pellucid.text.tool_prompt import shows_calls, shows_tools, with_calls, with_tools

_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "chat_template", "clock", "self"})


class ChatText:
    """The chat template of a model. `dialect` is how calls are written where the template does not write them; `reasons` tells
    whether the model is known to reason."""

    def __init__(self, tokenizer: Tokenizer, dialect: ToolDialect, *, reasons: bool) -> None:
        self._tokenizer, self._dialect, self._reasons = tokenizer, dialect, reasons

    def text(self, turn: Turn) -> str:
        """The prompt.

        Raises:
            InvalidRequestError: the template refuses the conversation, or does not read what is asked for.
            TokenizerError: there is no template, or it is broken.
        """
        tools = list(turn.tools.definitions) if turn.tools.is_allowed else None
        template = (self._tokenizer.tool_template if tools else self._tokenizer.chat_template) or ""
        messages = [_for_template(message, template) for message in turn.messages]
        if not shows_calls(template):
            messages = with_calls(messages, self._dialect)
        if tools and not shows_tools(template):
            messages, tools = with_tools(messages, tools, self._dialect), None
        is_open = bool(turn.continue_final_message)
        text = self._tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=not is_open if turn.add_generation_prompt is None else turn.add_generation_prompt,
            tools=tools,
            **{**self._effort(turn.reasoning_effort, template), **_variables(turn.template_kwargs)},
        )
        return _left_open(text, messages[-1]) if is_open else text

    def _effort(self, effort: str | None, template: str) -> dict[str, Any]:
        """The variables that ask a template for an effort of reasoning."""
        if effort is None:
            return {}
        if "reasoning_effort" in template:
            return {"reasoning_effort": effort}
        if effort == "none" and "enable_thinking" in template:
            return {"enable_thinking": False}
        if effort == "none" and not self._reasons:
            return {}
        raise InvalidRequestError(
            f"reasoning_effort is {shown(effort)}; the model's chat template does not read it", "reasoning_effort"
        )


def _for_template(message: Message, template: str) -> dict[str, Any]:
    given = message.to_template()
    if given["role"] == "developer" and "developer" not in template:
        given["role"] = "system"
    return given


def _variables(given: Mapping[str, Any]) -> dict[str, Any]:
    taken = _RESERVED & given.keys()
    if taken:
        raise InvalidRequestError(f"chat_template_kwargs.{min(taken)} is reserved", "chat_template_kwargs")
    return dict(given)


def _left_open(text: str, last: Mapping[str, Any]) -> str:
    """`text` up to the end of the last message's content, so that the model goes on with it."""
    content = last["content"]
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    content = (content or "").strip()
    at = text.rfind(content) if content else -1
    if at < 0:
        raise InvalidRequestError(
            "continue_final_message: the chat template does not show the last message", "messages"
        )
    return text[: at + len(content)]
