"""/v1/chat/completions: from messages to an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pellucid.outputs import CompletionOutput, RequestOutput
from pellucid.server.answers import Identity, finish_fields
from pellucid.server.generation import Delta, Usage
from pellucid.server.logprobs import LogprobFormat
from pellucid.server.protocol_chat import ChatCompletionRequest
from pellucid.server.states import state_fields

CHUNK, WHOLE = "chat.completion.chunk", "chat.completion"


class ChatAnswer:
    """One answer in OpenAI's shape, as a whole or chunk by chunk."""

    def __init__(
        self,
        request: ChatCompletionRequest,
        identity: Identity,
        prompt_token_ids: Sequence[int],
        num_choices: int,
        logprobs: LogprobFormat,
    ) -> None:
        self._request, self._logprobs = request, logprobs
        self._head, self._whole_head = identity.head(CHUNK), identity.head(WHOLE)
        self._prompt_token_ids, self._num_choices = prompt_token_ids, num_choices
        self._prefix = _echoed(request)

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

    def chunks(self, delta: Delta) -> Iterable[dict[str, Any]]:
        """What is new in a choice."""
        choice: dict[str, Any] = {
            "index": delta.index,
            "delta": {**({"content": delta.text} if delta.text else {}), **state_fields(delta, self._request)},
            "logprobs": None if delta.logprobs is None else self._chat_logprobs(delta.token_ids, delta.logprobs),
            **finish_fields(delta.finish_reason, delta.stop_reason),
        }
        if self._request.return_token_ids:
            choice["token_ids"] = delta.token_ids
        elif not delta.text and delta.logprobs is None and delta.finish_reason is None and delta.hidden_states is None:
            return
        yield {**self._head, "choices": [choice]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Token counts, without a choice."""
        return {**self._head, "choices": [], "usage": usage.to_dict()}

    def _choice(self, output: CompletionOutput) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": output.index,
            "message": {
                "role": "assistant",
                "content": self._prefix + output.text,
                "refusal": None,
                **state_fields(output, self._request),
            },
            "logprobs": None if output.logprobs is None else self._chat_logprobs(output.token_ids, output.logprobs),
            **finish_fields(output.finish_reason, output.stop_reason),
        }
        if self._request.return_token_ids:
            choice["token_ids"] = output.token_ids
        return choice

    def _chat_logprobs(self, token_ids: Sequence[int], rows: Sequence[Any]) -> dict[str, Any]:
        return self._logprobs.chat(token_ids, rows, self._request.top_logprobs or 0)


def _echoed(request: ChatCompletionRequest) -> str:
    """The assistant's last message, when it is asked to stand before the answer."""
    last = request.messages[-1].to_template()
    if not request.echo or last["role"] != "assistant":
        return ""
    content = last["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())
