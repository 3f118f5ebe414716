"""From messages and texts to token ids, and back: always on threads of its own, never on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from pellucid.errors import InvalidRequestError
from pellucid.server.protocol_chat import Message
from pellucid.text.tokenizer import Tokenizer

_NUM_THREADS = 2
_Result = TypeVar("_Result")


class Prompts:
    """The tokenizer of a server, off the event loop."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="pellucid-tokenise")
        template = "" if tokenizer is None else tokenizer.chat_template or ""
        self._knows_developer = "developer" in template

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            InvalidRequestError: it has none.
        """
        if self._tokenizer is None:
            raise InvalidRequestError("the model has no tokenizer: give token ids", "prompt")
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

    async def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        add_special_tokens: bool | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The ids of a conversation through the model's chat template."""
        render = partial(
            self._render,
            [self._for_template(message) for message in messages],
            tools,
            bool(continue_final_message),
            not continue_final_message if add_generation_prompt is None else add_generation_prompt,
            dict(template_kwargs or {}),
        )
        return await self.run(lambda: self.tokenizer.encode(render(), bool(add_special_tokens)))

    def _for_template(self, message: Message) -> dict[str, Any]:
        given = message.to_template()
        if given["role"] == "developer" and not self._knows_developer:
            given["role"] = "system"
        return given

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        is_open: bool,
        add_generation_prompt: bool,
        variables: dict[str, Any],
    ) -> str:
        taken = _RESERVED & variables.keys()
        if taken:
            name = min(taken)
            raise InvalidRequestError(f"chat_template_kwargs.{name} is reserved", "chat_template_kwargs")
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
        )
        return _left_open(text, messages[-1]) if is_open else text


_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "chat_template", "clock", "self"})


def _left_open(text: str, last: Mapping[str, Any]) -> str:
    """`text` up to the end of the last message's content, so that the model goes on with it."""
    content = last["content"]
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    content = (content or "").strip()
    at = text.rfind(content) if content else -1
    if at < 0:
        raise InvalidRequestError(
            "continue_final_message: the chat template does not show the last message", "messages"
        )
    return text[: at + len(content)]
