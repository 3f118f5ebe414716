"""`LLM`: the offline API. Prompts in, outputs out, in the same process."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pellucid.api.hidden_states import CaptureParams, HiddenStatesParams, SteeringParams
from pellucid.api.outputs import RequestOutput, RequestOutputDict, StreamChunk
from pellucid.api.request_options import RequestOptions
from pellucid.api.sampling_params import SamplingParams, check_well_formed
from pellucid.config import EngineConfig
from pellucid.engine.admission import Prompt
from pellucid.engine.client import EngineClient, Reader, Submission
from pellucid.engine.engine import LLMEngine
from pellucid.engine.factory import load_engine
from pellucid.errors import InvalidRequestError, RequestFailedError, items_of, shown
from pellucid.text.tokenizer import Tokenizer

Inputs = str | Sequence[str] | Sequence[Sequence[int]]
Params = SamplingParams | Sequence[SamplingParams] | None
Message = Mapping[str, Any]

_MOST_INPUTS = 2**24
_INPUTS_ERROR = "inputs must be str, list[str], or list[list[int]] for batch mode"


class LLM:
    """A model for offline use. Keyword arguments are the fields of `EngineConfig`; `max_batch_size` is an alias of `max_num_seqs`.

    `progress(done, total)` is told bytes while the first start packs the weights.

    Any thread may call any method at any time. Requests of all threads are computed together, and each thread gets what it would
    get alone, bit for bit: one thread at a time takes the steps, the others sleep until they have their outputs. Ctrl-C and
    whatever else ends a call early ends its own requests and nobody else's. `close` tells all who wait by an `EngineDeadError`.
    Within a step (in a signal handler, say) methods raise `WrongThreadError`, and in a process that was forked from the model's
    they raise `ForkedError`; `close` is harmless in both.

    Raises:
        TypeError: an unknown keyword, by name.
        ConfigError, ModelNotFoundError, UnsupportedModelError, WeightFormatError: what cannot be loaded, and why.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        **kwargs: Any,
    ) -> None:
        if model is None:
            model = kwargs.pop("model_path", None) or EngineConfig.model
        elif "model_path" in kwargs:
            raise TypeError("LLM() got 'model' twice: as 'model_path' too")
        self.config = EngineConfig.from_kwargs(model, kwargs)
        self.client = EngineClient(load_engine(self.config, progress))

    @property
    def engine(self) -> LLMEngine:
        """The engine behind; its `trace` has a record of every step."""
        return self.client.engine

    # ---- generating -----------------------------------------------------------------------------------------------

    def generate(
        self,
        inputs: Inputs,
        sampling_params: Params = None,
        *,
        priority: int | Sequence[int] = 0,
        cache_salt: str | None = None,
        return_hidden_states: bool = False,
        hidden_states_for_tokens: Sequence[int] | None = None,
        hidden_states_layers: Sequence[int] | None = None,
        capture: Sequence[str] | None = None,
        steering: Mapping[str, Sequence[float]] | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutputDict]:
        """Completes raw texts or token ids; no chat template. Outputs stand in the order of the inputs, also for one prompt.

        Args:
            inputs: one text, a list of texts, or a list of lists of token ids.
            sampling_params: one for all, or one each.
            priority: lower is served first; one for all, or one each.
            cache_salt: requests share cached prompt blocks only with requests of the same salt.
            return_hidden_states: each output has `hidden_states`: float32, torch tensors where torch is installed, else numpy
                arrays. [D] of the last generated token's row; or [rows, D] with `hidden_states_positions` beside it; or
                [rows, layers, D].
            hidden_states_for_tokens: positions in prompt + output; negative ones count from the last row.
            hidden_states_layers: 0 is the embedding's output, i the residual stream behind block i, -1 what the head reads.
            capture: names of activations, with `*` for what lies between dots, such as `layers.*.mlp`; each output then has
                `captured`: name -> [rows, width], row i of position i of prompt + output.
            steering: name of an activation -> vector that is added to it at every position.
            use_tqdm: a progress bar; by default on a terminal and for more than one prompt.

        Raises:
            TypeError: the inputs are of another shape.
            ValueError: a list of parameters has another length than the inputs, or a request is refused: then nothing runs.
        """
        prompts = _prompts(inputs)
        params = _one_each("sampling_params", sampling_params, len(prompts), SamplingParams())
        if priority is not None and not isinstance(priority, (int, Sequence)):
            raise InvalidRequestError("priority", "is", priority, "it must be one int, or a list with one each")
        priorities = _one_each("priority", priority, len(prompts), 0)
        hidden = HiddenStatesParams.from_request(return_hidden_states, hidden_states_for_tokens, hidden_states_layers)
        captured, steered = CaptureParams.from_request(capture), SteeringParams.from_request(steering)
        submissions = [
            Submission(prompt, one, RequestOptions(rank, cache_salt, hidden, captured, steered), stream=False)
            for prompt, one, rank in zip(prompts, params, priorities, strict=True)
        ]
        outputs = self._run(submissions, use_tqdm)
        return [RequestOutputDict.of(output) for output in (_as_tensors(outputs) if hidden or captured else outputs)]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutputDict]:
        """Answers one conversation or a list of them, through the model's chat template.

        Raises:
            TokenizerError: the model has no chat template, or it cannot take these messages.
            ValueError, TypeError: as `generate`.
        """
        tokenizer = self.get_tokenizer()
        given: Any = items_of("messages", messages, "messages or of conversations", _MOST_INPUTS)
        variables = {} if chat_template_kwargs is None else chat_template_kwargs
        if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
            raise InvalidRequestError("chat_template_kwargs", "is", variables, "it must map names to values")
        prompts = [
            tokenizer.encode_chat(
                conversation,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                **variables,
            )
            for conversation in ([given] if given and isinstance(given[0], Mapping) else given)
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, cache_salt: str | None = None
    ) -> Iterator[StreamChunk]:
        """Yields news of one request as it is made; leaving the loop early cancels it.

        Steps are taken while the caller asks for the next chunk, here or by any other call of this model: a stream that is read
        slowly finds all that came in the meantime, and loses nothing to a `generate` inside its loop. Chunks have no
        `prompt_logprobs`.
        """
        if not isinstance(prompt, str):
            prompt = _prompts([prompt])[0]
        reader = Reader(is_eager=True)
        try:
            options = RequestOptions(cache_salt=cache_salt)
            self.client.submit_all([Submission(prompt, sampling_params, options)], reader)
            is_open = True
            while is_open:
                self.client.wait(reader)
                is_open = bool(reader.open)  # asked first: chunks are there before their request has ended
                while reader.chunks:
                    yield reader.chunks.popleft()
        finally:
            self.client.abandon(reader)

    def score(
        self, prompts: Sequence[str | Sequence[int]], continuations: Sequence[str | Sequence[int]]
    ) -> list[list[float]]:
        """Log-probabilities of each token of given continuations, each behind its prompt.

        Raises:
            ValueError: the lengths differ, or a prompt or a continuation is empty.
            RequestFailedError: the engine ended a request with an error, or it was cancelled.
        """
        prompts = items_of("prompts", prompts, "texts or lists of token ids", _MOST_INPUTS)
        continuations = items_of("continuations", continuations, "texts or lists of token ids", _MOST_INPUTS)
        if len(prompts) != len(continuations):
            problem = f": there are {len(prompts)} prompts and {len(continuations)} continuations"
            raise InvalidRequestError("continuations", problem, limit="each prompt needs one")
        pairs = [
            (self._ids("prompts", p, True), self._ids("continuations", c, False))
            for p, c in zip(prompts, continuations, strict=True)
        ]
        for index, (prompt, continuation) in enumerate(pairs):
            if not prompt or not continuation:
                raise InvalidRequestError("inputs", (f"prompts[{index}] or continuations[{index}] has no tokens",))
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        outputs = self.generate([prompt + continuation for prompt, continuation in pairs], params, use_tqdm=False)
        scores = []
        for index, (output, (prompt, continuation)) in enumerate(zip(outputs, pairs, strict=True)):
            rows = [row for row in (output.prompt_logprobs or ())[len(prompt) :] if row is not None]
            if len(rows) < len(continuation):
                error = output.outputs[0].error or f"the request ended with {output['finish_reason']!r}"
                raise RequestFailedError(f"continuations[{index}] has no scores: {error}")
            scores.append([row[token].logprob for row, token in zip(rows, continuation, strict=True)])
        return scores

    def encode(self, texts: str | Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as `generate` would compute them."""
        given = [texts] if isinstance(texts, str) else items_of("texts", texts, "texts", _MOST_INPUTS)
        return [self._encoded("texts", text, True) for text in given]

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            InvalidRequestError: the model has none.
        """
        if self.engine.tokenizer is None:
            raise InvalidRequestError("inputs", ("the model has no tokenizer: give token ids",))
        return self.engine.tokenizer

    # ---- the engine -----------------------------------------------------------------------------------------------

    def kv_cache_stats(self) -> dict[str, int | float]:
        """Blocks in use and free, and what the prefix cache saved."""
        return self.client.kv_cache_stats()

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached blocks; False while requests hold blocks."""
        return self.client.reset_prefix_cache()

    def close(self) -> None:
        """Frees the model; harmless when called again."""
        self.client.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _ids(self, name: str, text: str | Sequence[int], add_special_tokens: bool) -> list[int]:
        if isinstance(text, str):
            return self._encoded(name, text, add_special_tokens)
        return items_of(name, text, "token ids", self.engine.checker.max_model_len)

    def _encoded(self, name: str, text: str, add_special_tokens: bool) -> list[int]:
        if isinstance(text, str):
            check_well_formed(name, text)
        return self.get_tokenizer().encode(text, add_special_tokens=add_special_tokens)

    def _run(self, submissions: Sequence[Submission], use_tqdm: bool | None) -> list[RequestOutput]:
        """The outputs of requests, when all have ended. Whatever keeps the caller from waiting ends them."""
        advance, done = _progress(len(submissions), use_tqdm)
        reader = Reader(is_eager=advance is not None)
        try:
            ids = self.client.submit_all(submissions, reader)
            while reader.open:
                self.client.wait(reader)
                if advance is not None:
                    for _ in range(reader.take_ended()):
                        advance()
        except BaseException:
            self.client.abandon(reader)
            raise
        finally:
            done()
        self.client.settle()
        return [reader.outputs[request_id] for request_id in ids]


def _as_tensors(outputs: list[RequestOutput]) -> list[RequestOutput]:
    """Hidden states and activations as torch tensors on the same memory, where torch is installed."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        for output in outputs:
            for choice in output.outputs:
                if choice.hidden_states is not None:
                    choice.hidden_states = torch.from_numpy(choice.hidden_states)  # type: ignore[assignment]
                if choice.captured is not None:
                    choice.captured = {name: torch.from_numpy(rows) for name, rows in choice.captured.items()}  # type: ignore[misc]
    return outputs


def _prompts(inputs: Any) -> list[Prompt]:
    if isinstance(inputs, str):
        return [inputs]
    if isinstance(inputs, (bytes, Mapping)) or not isinstance(inputs, Sequence):
        raise TypeError(_INPUTS_ERROR)
    if all(isinstance(item, str) for item in inputs):
        return list(inputs)
    is_ids = all(isinstance(item, Sequence) and not isinstance(item, (str, bytes)) for item in inputs)
    if not is_ids:
        raise TypeError(_INPUTS_ERROR)
    return [list(item) for item in inputs]


def _one_each(name: str, given: Any, count: int, default: Any) -> list[Any]:
    if given is None:
        return [default] * count
    if isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) != count:
            raise InvalidRequestError(name, f"has {len(given)} entries", limit=f"there are {count} inputs")
        return list(given)
    if not isinstance(given, type(default)):
        raise TypeError(f"{name} is {shown(given)}; it must be one {type(default).__name__}, or a list with one each")
    return [given] * count


def _progress(total: int, wanted: bool | None) -> tuple[Callable[[], None] | None, Callable[[], None]]:
    """(advance, done) of a progress bar on standard error; None where there is no bar to advance."""
    if wanted is not None and not isinstance(wanted, bool):
        raise TypeError(f"use_tqdm is {shown(wanted)}; it must be true, false or None")
    show = sys.stderr.isatty() and total > 1 if wanted is None else wanted
    if not show:
        return None, (lambda: None)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    )
    task = bar.add_task("requests", total=total)
    bar.start()
    return (lambda: bar.advance(task)), bar.stop
