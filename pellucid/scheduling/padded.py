"""What a batch of static shape would hold: the accounting of policy `padded`. Numbers only; nothing is padded.

A device of static shapes computes rectangles. The batch stands flush right at one common length `tkv`; each sequence is
padded on the left up to it, and blocks that would hold padding alone are not allocated. A step is one whole prompt or one
token of every sequence. The rules are those of vllm-spyre's continuous batching; docs/scheduler.md has them in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pellucid.errors import ConfigError, InvariantError
from pellucid.scheduling.account import BatchAccount
from pellucid.scheduling.block_manager import BlockManager
from pellucid.scheduling.config import SchedulerConfig
from pellucid.scheduling.limits import blocks_for, padded_to
from pellucid.scheduling.passes import Step
from pellucid.scheduling.request import Request
from pellucid.scheduling.wait import WAIT_NO_BLOCKS, WAIT_TKV_LENGTH, WAIT_TKV_VOLUME


def take(step: Step) -> None:
    """One whole prompt, as soon as the static shapes let it in; else a decode of all that runs."""
    step.admit_waiting(whole_prompts=True, one_prompt=True)
    if step.is_empty:
        step.continue_running(step.running)


def account(config: SchedulerConfig, blocks: BlockManager) -> BatchAccount:
    """An account for these limits.

    Raises:
        ConfigError: `max_batch_tkv_limit` is below 1.
    """
    return PaddedBatch(
        blocks.block_size, blocks.num_blocks, config.max_num_seqs, config.max_model_len, config.max_batch_tkv_limit
    )


def tkv_limit(asked: int | None, max_num_seqs: int, max_model_len: int) -> int:
    """Most sequences x length of a batch.

    Raises:
        ConfigError: it is below 1.
    """
    if asked is not None and asked < 1:
        raise ConfigError(f"max_batch_tkv_limit is {asked}; it must be at least 1")
    return asked or max_model_len * max_num_seqs


@dataclass
class _Sequence:
    request: Request
    left_pad: int  # tokens
    n_reserved: int  # blocks, until its last token
    n_used: int  # blocks of them that it holds now


class PaddedBatch(BatchAccount):
    """The batch as it stands behind the step that was planned last: what the next step is decided by.

    A request that has ended holds its blocks until the next step begins. `max_batch_tkv_limit` bounds sequences x length; None:
    `max_num_seqs` sequences of `max_model_len`.

    Raises:
        ConfigError: `max_batch_tkv_limit` is below 1.
    """

    def __init__(
        self, block_size: int, num_blocks: int, max_num_seqs: int, max_model_len: int, max_batch_tkv_limit: int | None
    ) -> None:
        self.block_size, self.num_blocks, self.max_model_len = block_size, num_blocks, max_model_len
        self.max_batch_tkv_limit = tkv_limit(max_batch_tkv_limit, max_num_seqs, max_model_len)
        self.tkv = 0
        self._sequences: dict[str, _Sequence] = {}

    # ---- questions -------------------------------------------------------------------------------------------------

    @property
    def n_reserved_blocks(self) -> int:
        """Blocks that the batch may come to need, those of requests that ended in the last step included."""
        return sum([sequence.n_reserved for sequence in self._sequences.values()])

    @property
    def n_used_blocks(self) -> int:
        """Blocks that the batch holds, counted in the same way."""
        return sum([sequence.n_used for sequence in self._sequences.values()])

    @property
    def n_free_blocks(self) -> int:
        """Blocks that nobody reserved."""
        return self.num_blocks - self.n_reserved_blocks

    @property
    def is_open(self) -> bool:
        """True until the step after the last request ended."""
        return bool(self._sequences or self.tkv)

    @property
    def counts_empty_steps(self) -> bool:
        return True

    def why_not(self, request: Request, running: Sequence[Request]) -> str | None:
        """The reason why a prompt cannot join those that run, or None. Alone it always can."""
        if not running:
            return None
        num_prompt, max_tokens = request.num_prompt_tokens, request.core.max_tokens
        shift = self._padded(max(0, num_prompt - self.tkv))
        tkv = self.tkv + shift
        length = tkv + max([max_tokens, *([_num_left(other) for other in running] if shift else ())])
        if length > self.max_model_len:
            return WAIT_TKV_LENGTH.format(limit=self.max_model_len, length=length, tkv=tkv)
        needs = self._reserved(tkv, num_prompt, max_tokens)
        if needs > self.n_free_blocks:
            return WAIT_NO_BLOCKS.format(needs=needs, free=self.n_free_blocks)
        volume = _volume(tkv + max_tokens - 1, [tkv + _num_left(other) - 1 for other in running])
        if volume > self.max_batch_tkv_limit:
            return WAIT_TKV_VOLUME.format(limit=self.max_batch_tkv_limit, volume=volume, tkv=tkv)
        return None

    # ---- a step ----------------------------------------------------------------------------------------------------

    def advance(self, admitted: Request | None, decodes: bool) -> None:
        """A step that computes the prompt of `admitted`, or a token of all that run, or nothing."""
        self._sequences = {name: one for name, one in self._sequences.items() if not one.request.is_finished}
        if admitted is None and not decodes:
            self.tkv = 0
            return
        self._reduce_padding()
        if admitted is not None:
            self._prefill(admitted)
        else:
            self._decode()

    def _reduce_padding(self) -> None:
        """Whole blocks that are padding in every row go."""
        if self._sequences:
            pad = min([sequence.left_pad for sequence in self._sequences.values()])
            self._shift(-(pad // self.block_size) * self.block_size)

    def _shift(self, num_tokens: int) -> None:
        self.tkv += num_tokens
        for sequence in self._sequences.values():
            sequence.left_pad += num_tokens

    def _prefill(self, request: Request) -> None:
        num_prompt = request.num_prompt_tokens
        if self._sequences:
            self._shift(self._padded(max(0, num_prompt - self.tkv)))
        else:
            self.tkv = self._padded(num_prompt)
        left_pad = self.tkv - num_prompt
        n_used = self._blocks_for(self.tkv) - left_pad // self.block_size
        n_reserved = self._reserved(self.tkv, num_prompt, request.core.max_tokens)
        self._sequences[request.request_id] = _Sequence(request, left_pad, n_reserved, n_used)

    def _decode(self) -> None:
        if self.tkv % self.block_size == 0:
            for sequence in self._sequences.values():
                sequence.n_used += 1
        self.tkv += 1

    # ---- arithmetic ------------------------------------------------------------------------------------------------

    def _blocks_for(self, num_tokens: int) -> int:
        return blocks_for(num_tokens, self.block_size)

    def _padded(self, num_tokens: int) -> int:
        return padded_to(num_tokens, self.block_size)

    def _reserved(self, tkv: int, num_prompt: int, max_tokens: int) -> int:
        """Blocks of a sequence whose prompt ends at `tkv`, without those that padding alone would fill."""
        return self._blocks_for(tkv + max_tokens - 1) - (tkv - num_prompt) // self.block_size

    # ---- self-check ------------------------------------------------------------------------------------------------

    def check_invariants(self, running: Sequence[Request]) -> None:
        """Compare the batch with the requests that run.

        Raises:
            InvariantError: a sequence holds more than it reserved, or all of them more than there is; or one that runs is not counted, or
                does not end at `tkv`.
        """
        if self.n_reserved_blocks > self.num_blocks:
            raise InvariantError(f"{self.n_reserved_blocks} blocks are reserved; {self.num_blocks} exist")
        for name, one in self._sequences.items():
            if not 0 < one.n_used <= one.n_reserved or one.left_pad < 0:
                raise InvariantError(f"{name!r} uses {one.n_used} of {one.n_reserved} blocks, padding {one.left_pad}")
            if not one.request.is_finished and one.request.next_start != self.tkv - one.left_pad:
                raise InvariantError(f"{one.request} does not end at tkv {self.tkv} with padding {one.left_pad}")
        counted = {name for name, one in self._sequences.items() if not one.request.is_finished}
        if counted != {request.request_id for request in running}:
            raise InvariantError(f"{sorted(counted)} are counted but {[r.request_id for r in running]} run")


def _num_left(request: Request) -> int:
    """How far behind `tkv` a running request may still come: the newest token is not computed yet."""
    return request.core.max_tokens - (request.num_output_tokens - 1)


def _volume(new: int, others: Sequence[int]) -> int:
    """Sequences x length of the batch at its largest, as sequences of these final lengths end one after the other."""
    largest, num_seqs = 0, len(others) + 1
    for length in sorted(others):
        if new <= length:
            return max(largest, num_seqs * new)
        largest = max(largest, num_seqs * length)
        num_seqs -= 1
    return largest
