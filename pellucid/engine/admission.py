"""What can be said of a request before the engine sees it: its tokens, and whether its values are allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pellucid.errors import InvalidRequestError
from pellucid.params import SamplingParams, check_vocabulary
from pellucid.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class RequestChecker:
    """Tokenises prompts and refuses what can never run. Safe to share between threads."""

    tokenizer: Tokenizer | None
    vocab_size: int
    max_model_len: int

    def tokenise(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """The text, where it is one, and the token ids.

        Raises:
            InvalidRequestError: a text without a tokenizer, or an id that is none.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequestError("prompt is text, but the model has no tokenizer: give token ids", "prompt")
            return prompt, self.tokenizer.encode(prompt)
        token_ids = list(prompt)
        if set(map(type, token_ids)) != {int} or min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            self._refuse_ids(token_ids)
        return None, token_ids

    def _refuse_ids(self, token_ids: list[int]) -> None:
        """Names the first id that is none; there may be none, as in an empty list."""
        for index, token in enumerate(token_ids):
            if isinstance(token, bool) or not isinstance(token, int):
                raise InvalidRequestError(f"prompt[{index}] is {token!r}; token ids are integers", "prompt")
            if not 0 <= token < self.vocab_size:
                raise InvalidRequestError(
                    f"prompt[{index}] is {token:,}; token ids are in [0, {self.vocab_size:,})", "prompt"
                )

    def check(self, token_ids: list[int], params: SamplingParams) -> None:
        """Checks lengths and what the parameters ask of the model.

        Raises:
            InvalidRequestError: naming the field, the value and the limit.
        """
        if not token_ids:
            raise InvalidRequestError("the prompt is empty; it needs at least 1 token", "prompt")
        if len(token_ids) + 1 > self.max_model_len:
            raise InvalidRequestError(
                f"prompt has {len(token_ids):,} tokens and needs room for 1 more; max_model_len is "
                f"{self.max_model_len:,}",
                "prompt",
            )
        check_vocabulary(params, self.vocab_size)
        if params.stop and self.tokenizer is None:
            raise InvalidRequestError("stop strings need a tokenizer, and the model has none", "stop")
        if params.bad_words and self.tokenizer is None:
            raise InvalidRequestError("bad_words need a tokenizer, and the model has none", "bad_words")
