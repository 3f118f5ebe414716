"""What a request may ask for under a policy: the one rule of whoever checks it before it is queued and of the scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from pellucid.errors import FieldName, InvalidRequestError


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that so many tokens fill or begin."""
    return -(-num_tokens // block_size)


def padded_to(num_tokens: int, block_size: int) -> int:
    """Tokens rounded up to whole blocks."""
    return blocks_for(num_tokens, block_size) * block_size


@dataclass(frozen=True)
class RequestLimits:
    """Limits of one request alone. What is within them can run; when, is for the scheduler to say."""

    max_model_len: int
    num_blocks: int
    block_size: int
    policy: str = "mixed"
    most_prompt_tokens: int | None = None  # of policies that never cut a prompt: what one step may compute
    max_batch_tkv_limit: int | None = None  # of policies that pad prompts to whole blocks; None: nothing is padded

    def max_tokens(self, num_prompt: int, asked: int | None) -> int:
        """How many tokens a prompt brings at most. More than there is room for is cut to that, but refused where prompts are padded."""
        if self.max_batch_tkv_limit is None:
            room = self.max_model_len - num_prompt
            return room if asked is None else min(asked, room)
        if asked is not None:
            return asked
        length = min(self.max_model_len, self.max_batch_tkv_limit, self.num_blocks * self.block_size)
        return max(1, length - padded_to(num_prompt, self.block_size) + 1)  # the last token is never computed

    def refuse_impossible(self, num_prompt: int, max_tokens: int) -> None:
        """Refuses what could not run even alone.

        Raises:
            InvalidRequestError: with the numbers.
        """
        if num_prompt == 0:
            raise InvalidRequestError(
                "prompt", ("the ", FieldName("prompt"), " is empty"), limit="it needs at least 1 token"
            )
        if num_prompt + 1 > self.max_model_len:
            raise InvalidRequestError(
                "prompt",
                f"has {num_prompt:,} tokens and needs room for 1 more",
                limit=f"max_model_len is {self.max_model_len:,}",
            )
        if max_tokens < 1:
            raise InvalidRequestError("max_tokens", f"is {max_tokens}", limit="it must be at least 1")
        needs = blocks_for(num_prompt + 1, self.block_size)
        if needs > self.num_blocks:
            raise InvalidRequestError(
                "prompt",
                f"of {num_prompt:,} tokens + 1 needs {needs:,} blocks of {self.block_size} tokens",
                limit=f"{self.num_blocks:,} exist",
            )
        if self.max_batch_tkv_limit is not None:
            self._refuse_padded(num_prompt, max_tokens, self.max_batch_tkv_limit)
        if self.most_prompt_tokens is not None and num_prompt > self.most_prompt_tokens:
            raise InvalidRequestError(
                "prompt",
                f"has {num_prompt:,} tokens",
                limit=f"policy {self.policy} computes whole prompts and max_num_batched_tokens is {self.most_prompt_tokens:,}",
            )

    def _refuse_padded(self, num_prompt: int, max_tokens: int, max_batch_tkv_limit: int) -> None:
        padded = padded_to(num_prompt, self.block_size)
        length = padded + max_tokens - 1
        needs = blocks_for(length, self.block_size)
        if length > self.max_model_len:
            problem, limit = f"comes to {length:,}", f"max_model_len is {self.max_model_len:,}"
        elif needs > self.num_blocks:
            problem, limit = f"needs {needs:,} blocks of {self.block_size} tokens", f"{self.num_blocks:,} exist"
        elif length > max_batch_tkv_limit:
            problem, limit = f"comes to {length:,}", f"max_batch_tkv_limit is {max_batch_tkv_limit:,}"
        else:
            return
        padding = f" of {num_prompt:,} tokens, padded to {padded:,}, with "
        asked = (FieldName("prompt"), padding, FieldName("max_tokens"), f" {max_tokens:,} {problem}")
        raise InvalidRequestError("max_tokens", asked, limit=limit)
