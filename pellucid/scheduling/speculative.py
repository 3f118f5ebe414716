"""Guesses at what comes next, taken from the request's own text: prompt lookup.

A draft is only a guess: the engine computes its logits together with those of the newest token, samples as it would have
anyway, and keeps a draft exactly where it is the token that was sampled. So drafts change the time, never a token.

The idea: A. Saxena, "Prompt Lookup Decoding" (2023), https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence


class PromptLookup:
    """Finds the last few tokens of a text earlier in it, and proposes what followed there.

    The longest tail found wins, from `longest` down to `shortest` tokens; of its places, the latest. A tail is found in
    constant time: for each length the place behind every sequence of tokens is kept. Costs memory in proportion to
    tokens x (longest - shortest + 1).
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        # For each length: tail -> the place behind it. A tail enters when a token has come behind it.
        self._behind: list[dict[tuple[int, ...], int]] = [{} for _ in self._lengths]
        self._num_read = 0

    def propose(self, token_ids: Sequence[int], most: int) -> tuple[int, ...]:
        """At most `most` tokens that may follow `token_ids`; often none.

        `token_ids` must begin with those of the call before.
        """
        self._read(token_ids)
        end = len(token_ids)
        for length, behind in zip(self._lengths, self._behind, strict=True):
            if length < end and (place := behind.get(tuple(token_ids[end - length :]))) is not None:
                return _continue(token_ids, place, most)
        return ()

    def _read(self, token_ids: Sequence[int]) -> None:
        for place in range(self._num_read, len(token_ids)):
            for length, behind in zip(self._lengths, self._behind, strict=True):
                if length <= place:
                    behind[tuple(token_ids[place - length : place])] = place
        self._num_read = len(token_ids)


def _continue(token_ids: Sequence[int], place: int, most: int) -> tuple[int, ...]:
    """What stands at `place` and behind; a text that ends too soon repeats itself from there on."""
    period = len(token_ids) - place
    return tuple(token_ids[place + index % period] for index in range(most))
