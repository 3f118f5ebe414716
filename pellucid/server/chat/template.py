"""From a conversation to the text of its prompt: the model's chat template, and what it needs to be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pellucid.errors import InvalidRequestError
from pellucid.server.chat.protocol import Message
from pellucid.server.chat.turns import Turn
from pellucid.text.chat_prefill import Messages, Render, content_text, left_open, text_behind
from pellucid.text.reasoning_parser import ReasoningDialect, opens_in_prompt
from pellucid.text.tokenizer import Tokenizer
from pellucid.text.tool_dialects import ToolDialect
from pellucid.text.tool_prompt import shows_calls, shows_tools, with_calls, with_tools

_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "chat_template", "clock", "self"})


@dataclass(frozen=True)
class ChatPrompt:
    """The text of a prompt. `begun` is what of the answer stands at its end; `opens_reasoning`: the template has opened the
    reasoning in front of that."""

    text: str
    begun: str = ""
    opens_reasoning: bool = False


class ChatText:
    """The chat template of a model. `dialect` is how calls are written where the template does not write them; `reasoning` is how
    the model marks its reasoning, None where it is not known to reason."""

    def __init__(self, tokenizer: Tokenizer, dialect: ToolDialect, reasoning: ReasoningDialect | None) -> None:
        self._tokenizer, self._dialect, self._reasoning = tokenizer, dialect, reasoning

    def prompt(self, turn: Turn) -> ChatPrompt:
        """The prompt.

        Raises:
            InvalidRequestError: the template refuses the conversation, or does not read what is asked for.
            TokenizerError: there is no template, or it is broken.
        """
        tools = list(turn.tools.definitions) if turn.tools.is_allowed else None
        template = (self._tokenizer.tool_template if tools else self._tokenizer.chat_template) or ""
        messages: Messages = [_for_template(message, template) for message in turn.messages]
        is_open = bool(turn.continue_final_message)
        if not shows_calls(template):
            ended = len(messages) - is_open  # a message that is left open keeps its calls, and is refused for them
            messages = [*with_calls(messages[:ended], self._dialect), *messages[ended:]]
        if tools and not shows_tools(template):
            messages, tools = with_tools(messages, tools, self._dialect), None
        variables = {**self._effort(turn.reasoning_effort, template), **_variables(turn.template_kwargs)}
        opens_turn = not is_open if turn.add_generation_prompt is None else turn.add_generation_prompt
        now = datetime.now()

        def render(messages: Messages) -> str:
            return self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=opens_turn, tools=tools, clock=lambda: now, **variables
            )

        if not is_open:
            text = render(messages)
            return ChatPrompt(text, opens_reasoning=self._opens_reasoning(text, messages, render))
        found = left_open(render, messages)
        before = found.text.removesuffix(found.begun)
        return ChatPrompt(
            found.text, found.begun, self._reasoning is not None and opens_in_prompt(self._reasoning, before)
        )

    def _opens_reasoning(self, text: str, messages: Messages, render: Render) -> bool:
        """True when the prompt ends with an opening marker, and it is not the last message that says so."""
        dialect = self._reasoning
        if dialect is None or not opens_in_prompt(dialect, text):
            return False
        if not opens_in_prompt(dialect, content_text(messages[-1])):
            return True
        behind = text_behind(render, messages)
        return behind is None or opens_in_prompt(dialect, behind)

    def _effort(self, effort: str | None, template: str) -> dict[str, Any]:
        """The variables that ask a template for an effort of reasoning."""
        if effort is None:
            return {}
        if "reasoning_effort" in template:
            return {"reasoning_effort": effort}
        if effort == "none" and "enable_thinking" in template:
            return {"enable_thinking": False}
        if effort == "none" and self._reasoning is None:
            return {}
        raise InvalidRequestError("reasoning_effort", "is", effort, "the model's chat template does not read it")


def _for_template(message: Message, template: str) -> dict[str, Any]:
    given = message.to_template()
    if given["role"] == "developer" and "developer" not in template:
        given["role"] = "system"
    return given


def _variables(given: Mapping[str, Any]) -> dict[str, Any]:
    taken = _RESERVED & given.keys()
    if taken:
        raise InvalidRequestError(f"chat_template_kwargs.{min(taken)}", "is reserved")
    return dict(given)
