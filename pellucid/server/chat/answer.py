"""/v1/chat/completions: from messages to an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pellucid.api.outputs import CompletionOutput, EngineCoreOutput, RequestOutput
from pellucid.server.chat.parsing import Message, OutputReader, Part
from pellucid.server.chat.protocol import ChatCompletionRequest
from pellucid.server.generate.answers import Identity, finish_fields
from pellucid.server.generate.generation import Usage
from pellucid.server.generate.logprobs import LogprobFormat
from pellucid.server.generate.states import state_fields
from pellucid.text.chat_prefill import content_text
from pellucid.text.deltas import ContentDelta, ToolCallDelta

CHUNK, WHOLE = "chat.completion.chunk", "chat.completion"


class ChatAnswer:
    """One answer in OpenAI's shape, as a whole or chunk by chunk. `begun` is what of it the prompt ends with."""

    def __init__(
        self,
        request: ChatCompletionRequest,
        identity: Identity,
        prompt_token_ids: Sequence[int],
        num_choices: int,
        logprobs: LogprobFormat,
        reader: OutputReader,
        begun: str = "",
    ) -> None:
        self._request, self._logprobs, self._reader = request, logprobs, reader
        self._head, self._whole_head = identity.head(CHUNK), identity.head(WHOLE)
        self._prompt_token_ids, self._num_choices = prompt_token_ids, num_choices
        self._prefix = _echoed(request, begun)

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> dict[str, Any]:
        """The answer that is not streamed."""
        output = outputs[0]
        answer = {
            **self._whole_head,
            "choices": [self._choice(choice) for choice in output.outputs],
            "usage": usage.to_dict(),
            "seed": output.outputs[0].seed,
        }
        if self._request.prompt_logprobs is not None:
            answer["prompt_logprobs"] = self._logprobs.prompt(output.prompt_logprobs)
        if self._request.return_token_ids:
            answer["prompt_token_ids"] = list(self._prompt_token_ids)
        return answer

    def opening(self) -> Iterable[dict[str, Any]]:
        """The role, for each choice."""
        for index in range(self._num_choices):
            delta = {"role": "assistant", "content": self._prefix}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            chunk = {**self._head, "choices": [choice]}
            if self._request.return_token_ids and index == 0:
                chunk["prompt_token_ids"] = list(self._prompt_token_ids)
            yield chunk

    def chunks(self, delta: EngineCoreOutput) -> Iterable[dict[str, Any]]:
        """What is new in a choice."""
        parts = self._reader.read(delta)
        choice: dict[str, Any] = {
            "index": delta.index,
            "delta": {**_spelled(parts), **state_fields(delta, self._request)},
            "logprobs": None if delta.logprobs is None else self._chat_logprobs(delta.token_ids, delta.logprobs),
            **self._finish(delta),
        }
        if self._request.return_token_ids:
            choice["token_ids"] = delta.token_ids
        elif not parts and delta.logprobs is None and delta.finish_reason is None and delta.hidden_states is None:
            return
        yield {**self._head, "choices": [choice]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Token counts, without a choice."""
        return {**self._head, "choices": [], "usage": usage.to_dict()}

    def _choice(self, output: CompletionOutput) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": output.index,
            "message": {**self._message(self._reader.whole(output)), **state_fields(output, self._request)},
            "logprobs": None if output.logprobs is None else self._chat_logprobs(output.token_ids, output.logprobs),
            **self._finish(output),
        }
        if self._request.return_token_ids:
            choice["token_ids"] = output.token_ids
        return choice

    def _message(self, message: Message) -> dict[str, Any]:
        content = self._prefix + message.content
        shown: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if message.reasoning:
            shown.update(_reasoning(message.reasoning))
        if message.calls:
            shown["content"] = content or None
            shown["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.calls
            ]
        return shown

    def _finish(self, end: EngineCoreOutput | CompletionOutput) -> dict[str, Any]:
        has_calls = self._reader.has_calls(end.index)
        return finish_fields(end.finish_reason, end.stop_reason, has_calls=has_calls)

    def _chat_logprobs(self, token_ids: Sequence[int], rows: Sequence[Any]) -> dict[str, Any]:
        return self._logprobs.chat(token_ids, rows, self._request.top_logprobs or 0)


def _reasoning(text: str) -> dict[str, str]:
    """Under the names of vLLM's present and of DeepSeek's API."""
    return {"reasoning": text, "reasoning_content": text}


def _spelled(parts: Iterable[Part]) -> dict[str, Any]:
    """A chunk's `delta`."""
    texts: dict[str, str] = {}
    calls: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, ToolCallDelta):
            calls.append(_call_chunk(part))
        else:
            name = "content" if isinstance(part, ContentDelta) else "reasoning"
            texts[name] = texts.get(name, "") + part.text
    shown: dict[str, Any] = _reasoning(texts["reasoning"]) if "reasoning" in texts else {}
    if "content" in texts:
        shown["content"] = texts["content"]
    return {**shown, "tool_calls": calls} if calls else shown


def _call_chunk(part: ToolCallDelta) -> dict[str, Any]:
    if part.id is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": part.index, "id": part.id, "type": "function", "function": function}


def _echoed(request: ChatCompletionRequest, begun: str) -> str:
    """The assistant's last message, when it is asked to stand before the answer; where that goes on, what it goes on from."""
    last = request.messages[-1].to_template()
    if not request.echo or last["role"] != "assistant":
        return ""
    return begun if request.continue_final_message else content_text(last)
