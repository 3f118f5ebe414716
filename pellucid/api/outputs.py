"""What a caller gets back: `RequestOutput` and its parts. vLLM's attributes; reads as a mapping too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FinishReason = Literal["stop", "length", "abort", "error"]

_KEYS = ("request_id", "status", "finish_reason", "token_ids", "text", "usage")


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position under the model's own distribution (before penalties and temperature)."""

    token_id: int
    logprob: float
    rank: int  # 1 = most likely
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first, ties by lower id


@dataclass(frozen=True)
class Logprob:
    """One candidate at one position: its log-probability, its rank (1 = most likely) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One choice. `token_ids` holds eos and stop tokens, `text` does not."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    seed: int | None = None
    error: str | None = None
    hidden_states: npt.NDArray[np.float32] | None = (
        None  # [D], or [rows, D] with positions, or [rows, layers, D] with layers
    )
    hidden_states_positions: list[int] | None = None  # of the rows, where positions or layers were asked for
    captured: dict[str, npt.NDArray[np.float32]] | None = None  # activations [rows, width], row i of position i

    @property
    def finished(self) -> bool:
        """True when this choice has ended."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestMetrics:
    """Times in seconds, from when the request was submitted unless said otherwise; None where it did not get so far."""

    queue_time: float | None = None
    time_to_first_token: float | None = None
    e2e_time: float | None = None
    num_preemptions: int = 0
    prefill_time: float | None = None  # from the first step to the first token
    decode_time: float | None = None  # from the first token to the last


@dataclass
class RequestOutput(Mapping[str, Any]):
    """A request's outputs. As a mapping it has the keys `request_id, status, finish_reason, token_ids, text, usage` of output 0."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    status: str = "waiting"
    # One entry a prompt token: None for the first, and for those that were not computed before the request ended.
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None

    @property
    def usage(self) -> dict[str, int]:
        """Token counts; completion tokens of all choices."""
        completion = sum(len(output.token_ids) for output in self.outputs)
        prompt = len(self.prompt_token_ids)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def __getitem__(self, key: str) -> Any:
        if key not in _KEYS:
            raise KeyError(key)
        if key in ("request_id", "status", "usage"):
            return getattr(self, key)
        return getattr(self.outputs[0], key)

    def __iter__(self) -> Iterator[str]:
        return iter(_KEYS)

    def __len__(self) -> int:
        return len(_KEYS)


class RequestOutputDict(dict[str, Any], RequestOutput):
    """A `RequestOutput` that is a dict: its storage holds the six keys, so that `json.dumps`, `dict(out)` and `==` are those of a
    dict. All else (`outputs`, `prompt`, arrays, `metrics`) are attributes alone. What `LLM` and `AsyncLLMEngine` give."""

    def __init__(self, *values: Any, **fields: Any) -> None:
        """Takes what `RequestOutput` takes, so that `dataclasses.replace` works."""
        RequestOutput.__init__(self, *values, **fields)
        super().__init__((key, RequestOutput.__getitem__(self, key)) for key in _KEYS)

    @classmethod
    def of(cls, output: RequestOutput) -> RequestOutputDict:
        """The same output, whose parts are shared."""
        return cls(**vars(output))

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class EngineCoreOutput:
    """News of one choice: what was added since the news before. The last ones have a `finish_reason`. Also called `StreamChunk`."""

    request_id: str
    index: int = 0
    text: str = ""
    new_token_ids: list[int] = field(default_factory=list)
    new_logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None  # what went wrong, where the finish reason is `error`
    # With the last news of a choice as in its output; with `hidden_states_stream` in all of them a row for each of their tokens.
    hidden_states: npt.NDArray[np.float32] | None = None
    hidden_states_positions: list[int] | None = None
    captured: dict[str, npt.NDArray[np.float32]] | None = None  # with the last news

    @property
    def token_ids(self) -> list[int]:
        """`new_token_ids`."""
        return self.new_token_ids

    @property
    def logprobs(self) -> list[dict[int, Logprob]] | None:
        """`new_logprobs`."""
        return self.new_logprobs

    @property
    def has_states(self) -> bool:
        """True when it carries hidden states or activations."""
        return self.hidden_states is not None or self.captured is not None


StreamChunk = EngineCoreOutput
