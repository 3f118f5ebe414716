"""What a step's batch holds of the cache, in blocks: the numbers of step records, and a say in who is admitted."""

from __future__ import annotations

from collections.abc import Sequence

from pellucid.scheduling.block_manager import BlockManager
from pellucid.scheduling.request import Request


class BatchAccount:
    """The account of policies that pad nothing: a request holds the blocks that it was given, and reserves no more."""

    tkv = 0  # the common length of a padded batch, in tokens

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks

    @property
    def n_reserved_blocks(self) -> int:
        """Blocks that the batch may come to need."""
        return self._blocks.num_used_blocks

    @property
    def n_used_blocks(self) -> int:
        """Blocks that the batch holds."""
        return self._blocks.num_used_blocks

    @property
    def n_free_blocks(self) -> int:
        """Blocks that nobody reserved."""
        return self._blocks.num_free_blocks

    @property
    def is_open(self) -> bool:
        """True while the account needs one more step, an empty one, to be closed."""
        return False

    @property
    def counts_empty_steps(self) -> bool:
        """True when a step without entries changes the account, so that it has a record."""
        return False

    def why_not(self, request: Request, running: Sequence[Request]) -> str | None:
        """The reason why a request that has its blocks cannot join those that run, or None."""
        return None

    def advance(self, admitted: Request | None, decodes: bool) -> None:
        """A step that computes the prompt of `admitted`, or a token of all that run, or nothing."""

    def check_invariants(self, running: Sequence[Request]) -> None:
        """Compare the account with the requests that run.

        Raises:
            InvariantError: they differ.
        """
