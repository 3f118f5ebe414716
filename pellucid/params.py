"""How a request is sampled: `SamplingParams`, validated when it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pellucid.errors import InvalidRequestError

MAX_N = 128
MAX_STOPS = 32
MAX_STOP_CHARACTERS = 1024
MAX_LOGPROBS = 100
MAX_LOGIT_BIASES = 1024
MAX_BAD_WORDS = 256
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters, with vLLM's names and defaults.

    Greedy when `temperature` is 0 or `top_k` is 1. `top_k` 0 or -1 means all. `logprobs` is the number of most likely tokens reported
    beside the chosen one (0: the chosen one alone; None: nothing). `max_tokens` None means as many as the model length allows.
    `logit_bias` maps token ids to values in [-100, 100]. `seed` None: the engine draws one and reports it.

    Raises:
        InvalidRequestError: naming the field, the value and the limit.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[str] = ()
    allowed_token_ids: Sequence[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    @property
    def is_greedy(self) -> bool:
        """True when the most likely token is taken without a draw."""
        return self.temperature == 0.0 or self.top_k == 1
