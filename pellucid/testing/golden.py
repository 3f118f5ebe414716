"""Outputs that are told what to say: a reference's tokens, with the engine's own log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pellucid.api.sampling_params import SamplingParams
from pellucid.api.structured_outputs import FIELD, CustomStructure, Grammar, Matcher
from pellucid.errors import InvalidRequestError


class GoldenTokens(CustomStructure):
    """Forces an output to be these tokens; what follows the last of them is free.

    Stands as `structured_outputs` in `SamplingParams`. Before a row is sampled all tokens but one are masked, as a grammar would
    mask them; logprobs are those of the model itself, before the mask. So two engines can be compared behind the first token in
    which they differ.

    Raises:
        InvalidRequestError: there is no token, or one is negative or no integer.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = tuple(int(token_id) for token_id in token_ids)
        if not self.token_ids or min(self.token_ids) < 0:
            raise InvalidRequestError(
                FIELD, (f"golden tokens are {list(self.token_ids)[:8]}",), limit="they must be token ids"
            )

    def compile(self, vocab_size: int) -> Grammar:
        """Raises `InvalidRequestError` when a token is not in the vocabulary."""
        if max(self.token_ids) >= vocab_size:
            raise InvalidRequestError(
                FIELD,
                (f"golden tokens name token {max(self.token_ids)}",),
                limit=f"the vocabulary has {vocab_size:,} tokens",
            )
        return _GoldenGrammar(self.token_ids, vocab_size)

    def __repr__(self) -> str:
        return f"GoldenTokens({list(self.token_ids)})"


def force_tokens(params: SamplingParams, token_ids: Sequence[int]) -> SamplingParams:
    """`params`, but for the tokens, which are these, and their number. An end token among them ends nothing.

    Raises:
        InvalidRequestError: as `GoldenTokens`.
    """
    golden = GoldenTokens(token_ids)
    return replace(
        params,
        structured_outputs=golden,  # type: ignore[arg-type]  # the field's type is what can be sent to another process
        max_tokens=len(golden.token_ids),
        ignore_eos=True,
    )


class _GoldenGrammar:
    def __init__(self, token_ids: tuple[int, ...], vocab_size: int) -> None:
        self.token_ids, self.vocab_size = token_ids, vocab_size

    def matcher(self, output_token_ids: Sequence[int] = ()) -> Matcher:
        made = _GoldenMatcher(self)
        for token_id in output_token_ids:
            made.accept(token_id)
        return made


class _GoldenMatcher:
    def __init__(self, grammar: _GoldenGrammar) -> None:
        self._token_ids, self._position = grammar.token_ids, 0
        self.mask: npt.NDArray[np.uint32] = np.zeros((grammar.vocab_size + 31) // 32, np.uint32)
        self.is_complete = False
        self.error: str | None = None

    def fill(self) -> None:
        if self._position >= len(self._token_ids):
            self.mask[:] = 0xFFFFFFFF
            return
        token_id = self._token_ids[self._position]
        self.mask[:] = 0
        self.mask[token_id // 32] = np.uint32(1 << (token_id % 32))

    def accept(self, token_id: int) -> bool:
        position, self._position = self._position, self._position + 1
        if position < len(self._token_ids) and token_id != self._token_ids[position]:
            self.error = f"golden token {position} is {self._token_ids[position]}, but {token_id} was sampled"
        return self.error is None
