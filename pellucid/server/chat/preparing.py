"""From a turn to what is generated and how it is read. All chat-like APIs go through `Preparer.prepare`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pellucid.api.sampling_params import SamplingParams
from pellucid.api.structured_outputs import FIELD, StructuredOutputsParams
from pellucid.errors import FieldName, InvalidRequestError
from pellucid.server.chat.parsing import OutputStyle
from pellucid.server.chat.template import ChatPrompt, ChatText
from pellucid.server.chat.turns import ToolUse, Turn
from pellucid.server.generate.job import CallStructure
from pellucid.server.generate.prompts import Prompts
from pellucid.server.http.settings import AUTO, OFF, ServerSettings
from pellucid.structure.tool_grammar import calls_or_answer, forced_calls
from pellucid.text.reasoning_parser import REASONING_DIALECTS, ReasoningDialect, detect_reasoning, stands_behind
from pellucid.text.tokenizer import Tokenizer
from pellucid.text.tool_dialects import TOLD_DIALECT, TOOL_DIALECTS, Tool, ToolDialect, detect_dialect, tools_of
from pellucid.text.tool_parsers import needs_special_tokens
from pellucid.text.tool_prompt import shows_tools


@dataclass(frozen=True)
class Prepared:
    """What is generated, and how it is read. `calls`: what its structure is made of beside tools; `begun`: what of the answer the
    prompt ends with."""

    prompt_token_ids: list[int]
    params: SamplingParams
    style: OutputStyle
    calls: CallStructure | None
    begun: str = ""


class Preparer:
    """The chat template and the dialects of a server's model.

    Args:
        prompts: the tokenizer, and threads to work on.
        settings: the dialects that were named.
        model_type: the model's family, where its template tells nothing.
    """

    def __init__(self, prompts: Prompts, settings: ServerSettings, model_type: str) -> None:
        self._prompts = prompts
        self._tools: ToolDialect | None = None
        self._reasoning: ReasoningDialect | None = None
        if prompts.has_tokenizer:
            self._set_dialects(prompts.tokenizer, settings, model_type)

    def _set_dialects(self, tokenizer: Tokenizer, settings: ServerSettings, model_type: str) -> None:
        self._tools = _tool_dialect(settings.tool_dialect, tokenizer.tool_template, model_type)
        self._reasoning = _reasoning_dialect(settings.reasoning_dialect, tokenizer.chat_template)
        self._text = ChatText(tokenizer, self._tools or TOLD_DIALECT, self._reasoning)
        self._special = {
            dialect.name
            for dialect in (self._tools, self._reasoning)
            if dialect is not None and needs_special_tokens(tokenizer, dialect)
        }

    async def encode(self, turn: Turn) -> list[int]:
        """The ids of a turn's prompt. Raises as `prepare`."""
        return (await self.prepare(turn, SamplingParams())).prompt_token_ids

    async def prepare(self, turn: Turn, params: SamplingParams) -> Prepared:
        """Templates and tokenises a turn, and makes the grammar of calls; on a thread of the prompts' own.

        Raises:
            InvalidRequestError: naming what cannot be honoured.
            TokenizerError: there is no chat template, or it is broken.
        """
        return await self._prompts.run(self._prepare, turn, params)

    def _prepare(self, turn: Turn, params: SamplingParams) -> Prepared:
        tokenizer = self._prompts.tokenizer
        known = self._known(turn.tools)
        prompt = self._text.prompt(turn)
        style = self._style(turn, known, prompt)
        params, calls = self._constrained(turn, params, style, tokenizer)
        dialects = (style.reasoning, style.tools)
        if any(dialect is not None and dialect.name in self._special for dialect in dialects):
            params = dataclasses.replace(params, skip_special_tokens=False)  # markers must be in the text
        ids = tokenizer.encode(prompt.text, bool(turn.add_special_tokens))
        return Prepared(ids, params, style, calls, prompt.begun)

    def _known(self, tools: ToolUse) -> tuple[Tool, ...]:
        """The tools, checked also where none may be called."""
        known = tools_of(tools.definitions)
        if tools.choice == "required" and not known:
            raise InvalidRequestError("tool_choice", "asks for a call, but there are no tools")
        if tools.name is not None and tools.name not in {tool.name for tool in known}:
            names = ", ".join(tool.name for tool in known)
            raise InvalidRequestError("tool_choice", "names", tools.name, f"the tools are: {names}")
        if tools.is_allowed and self._tools is None:
            raise InvalidRequestError("tools", ": tool calling is switched off on this server (tool_dialect)")
        return known

    def _style(self, turn: Turn, known: tuple[Tool, ...], prompt: ChatPrompt) -> OutputStyle:
        inside, has_begun = stands_behind(self._reasoning, prompt.begun, starts_inside=prompt.opens_reasoning)
        allowed = turn.tools.is_allowed
        return OutputStyle(
            reasoning=self._reasoning,
            tools=self._tools if allowed else None,
            known=known if allowed else (),
            starts_inside=inside,
            has_begun=has_begun,
            parallel=turn.tools.parallel,
            shows_reasoning=turn.shows_reasoning,
        )

    def _constrained(
        self, turn: Turn, params: SamplingParams, style: OutputStyle, tokenizer: Tokenizer
    ) -> tuple[SamplingParams, CallStructure | None]:
        """The parameters with the structure that calls, reasoning and the request's own make together, and its parts."""
        forced = turn.tools.choice == "required" and style.tools is not None
        own = params.structured_outputs
        # A response_format speaks of the answer's text. A forced call has none, so that both hold.
        if forced and own is not None and not turn.speaks_of_text:
            problem = (FieldName(FIELD), " is given beside a ", FieldName("tool_choice"), " that forces a call")
            raise InvalidRequestError("tool_choice", problem, limit="only one can hold")
        calls = None if style.tools is None else CallStructure(None if forced else own)
        try:
            spec = _structure(turn.tools, own, style, tokenizer)
            if spec is not own:
                params = dataclasses.replace(params, structured_outputs=spec)
            return params, calls
        except InvalidRequestError as error:
            raise error if calls is None else calls.named(error) from None


def _structure(
    tools: ToolUse, spec: StructuredOutputsParams | None, style: OutputStyle, tokenizer: Tokenizer
) -> StructuredOutputsParams | None:
    reasoning = style.reasoning if style.starts_inside else None
    how: dict[str, Any] = {"parallel": tools.parallel, "reasoning": reasoning}
    if style.tools is not None and tools.choice == "required":
        return forced_calls(style.tools, style.known, tokenizer, name=tools.name, **how)
    if style.tools is not None and spec is not None:
        return calls_or_answer(style.tools, style.known, tokenizer, spec, **how)
    if reasoning is not None and spec is not None and spec.after is None:
        return dataclasses.replace(spec, after=reasoning.closes[0])
    return spec


def _tool_dialect(name: str, template: str | None, model_type: str) -> ToolDialect | None:
    if name == OFF:
        return None
    if name != AUTO:
        return TOOL_DIALECTS[name]
    return detect_dialect(template, model_type) if shows_tools(template or "") else TOLD_DIALECT


def _reasoning_dialect(name: str, template: str | None) -> ReasoningDialect | None:
    if name == OFF:
        return None
    return detect_reasoning(template) if name == AUTO else REASONING_DIALECTS[name]
