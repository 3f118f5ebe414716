"""From texts to token ids, and back: always on threads of its own, never on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from pellucid.errors import InvalidRequestError
from pellucid.text.tokenizer import Tokenizer

_NUM_THREADS = 2
_Result = TypeVar("_Result")


class Prompts:
    """The tokenizer of a server, off the event loop."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="pellucid-tokenise")

    @property
    def has_tokenizer(self) -> bool:
        """False when prompts can only be ids."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            InvalidRequestError: it has none.
        """
        if self._tokenizer is None:
            raise InvalidRequestError("prompt", ("the model has no tokenizer: give token ids",))
        return self._tokenizer

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, function: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """`function(*args, **kwargs)` on a thread of the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(function, *args, **kwargs))

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text."""
        return await self.run(self.tokenizer.encode, text, add_special_tokens)

    async def count(self, text: str) -> int:
        """The number of tokens of a text."""
        return len(await self.encode(text, add_special_tokens=False)) if text else 0

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of ids."""
        return await self.run(self.tokenizer.decode, ids, skip_special_tokens)
