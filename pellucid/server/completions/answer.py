"""/v1/completions: from prompts to continuations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pellucid.api.outputs import CompletionOutput, EngineCoreOutput, RequestOutput
from pellucid.server.completions.protocol import CompletionRequest
from pellucid.server.generate.answers import Identity, finish_fields
from pellucid.server.generate.generation import Usage
from pellucid.server.generate.logprobs import LogprobFormat
from pellucid.server.generate.states import state_fields

KIND = "text_completion"


class CompletionAnswer:
    """One answer in OpenAI's shape, as a whole or chunk by chunk. `prompt_texts` are needed for `echo` alone."""

    def __init__(
        self,
        request: CompletionRequest,
        identity: Identity,
        prompts: Sequence[Sequence[int]],
        num_choices: int,
        logprobs: LogprobFormat,
        prompt_texts: Sequence[str] = (),
    ) -> None:
        self._request, self._logprobs = request, logprobs
        self._head = identity.head(KIND)
        self._prompts, self._prompt_texts, self._n = prompts, prompt_texts, num_choices
        self._offsets: dict[int, int] = {}

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> dict[str, Any]:
        """The answer that is not streamed; the choices of each prompt in order."""
        choices = [
            self._choice(number, output, choice) for number, output in enumerate(outputs) for choice in output.outputs
        ]
        if self._request.echoes_alone:
            usage = Usage(usage.prompt_tokens, 0, usage.cached_tokens)
        return {**self._head, "choices": choices, "usage": usage.to_dict(), "seed": outputs[0].outputs[0].seed}

    def opening(self) -> Iterable[dict[str, Any]]:
        """The prompts, when they are echoed, and their ids, when they are wanted."""
        for index in range(len(self._prompts) * self._n):
            choice = {"index": index, "text": self._echo(index // self._n), "logprobs": None, "finish_reason": None}
            if self._request.return_token_ids:
                choice.update(prompt_token_ids=list(self._prompts[index // self._n]), token_ids=[])
            if self._request.return_token_ids or self._request.echo:
                yield {**self._head, "choices": [choice]}

    def chunks(self, delta: EngineCoreOutput) -> Iterable[dict[str, Any]]:
        """What is new in a choice."""
        alone = self._request.echoes_alone
        text = "" if alone else delta.text
        is_empty = not text and delta.logprobs is None and delta.finish_reason is None and delta.hidden_states is None
        if is_empty and not self._request.return_token_ids:
            return
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": text,
            "logprobs": None if delta.logprobs is None else self._chunk_logprobs(delta),
            **finish_fields(delta.finish_reason, delta.stop_reason),
            **state_fields(delta, self._request),
        }
        if self._request.return_token_ids:
            choice["token_ids"] = [] if alone else delta.token_ids
        yield {**self._head, "choices": [choice]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Token counts, without a choice."""
        if self._request.echoes_alone:
            usage = Usage(usage.prompt_tokens, 0, usage.cached_tokens)
        return {**self._head, "choices": [], "usage": usage.to_dict()}

    def _choice(self, number: int, output: RequestOutput, choice: CompletionOutput) -> dict[str, Any]:
        alone = self._request.echoes_alone
        shown: dict[str, Any] = {
            "index": number * self._n + choice.index,
            "text": self._echo(number) + ("" if alone else choice.text),
            "logprobs": None if choice.logprobs is None else self._choice_logprobs(output, choice),
            **finish_fields("length" if alone else choice.finish_reason, None if alone else choice.stop_reason),
            **state_fields(choice, self._request),
        }
        if self._request.prompt_logprobs is not None:
            shown["prompt_logprobs"] = self._logprobs.prompt(output.prompt_logprobs)
        if self._request.return_token_ids:
            shown.update(prompt_token_ids=list(output.prompt_token_ids), token_ids=[] if alone else choice.token_ids)
        return shown

    def _echo(self, number: int) -> str:
        return self._prompt_texts[number] if self._request.echo else ""

    def _choice_logprobs(self, output: RequestOutput, choice: CompletionOutput) -> dict[str, Any]:
        token_ids: list[int] = [] if self._request.echoes_alone else list(choice.token_ids)
        rows: list[Any] = [] if self._request.echoes_alone else list(choice.logprobs or ())
        if self._request.echo:
            token_ids = [*output.prompt_token_ids, *token_ids]
            rows = [*(output.prompt_logprobs or [None] * len(output.prompt_token_ids)), *rows]
        return self._logprobs.completion(token_ids, rows, 0)[0]

    def _chunk_logprobs(self, delta: EngineCoreOutput) -> dict[str, Any]:
        start = self._offsets.get(delta.index, 0)
        shown, self._offsets[delta.index] = self._logprobs.completion(delta.token_ids, delta.logprobs or (), start)
        return shown
