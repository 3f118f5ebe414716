"""Who holds which KV block: reference counts, a free queue and the prefix cache. Accounting only; no tensor in sight.

A block of `block_size` token slots is either held (count of owners > 0) or in the free queue. A full block that has
been computed gets a chained hash (its tokens and everything before them), and keeps it after its last owner has gone,
until the block is reused: that is the prefix cache. Hashing by blocks follows vLLM's automatic prefix caching
(design: vLLM docs, "Automatic Prefix Caching").
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from pellucid.errors import ConfigError, InvariantError
from pellucid.scheduling.request import Request, RequestStatus

_DIGEST_BYTES = 16

# What a cached block stands for: the hash of the chain before it and its own tokens. Compared on every hit, so that
# equal hashes of different content can never share a block.
_Content = tuple[bytes, tuple[int, ...]]


class BlockManager:
    """Blocks 0 .. num_blocks - 1 and their owners.

    With caching off, the choices of one request (same `group_id`) still share the full blocks of their common tokens;
    such sharing is not counted in the statistics and the blocks are forgotten when their last owner frees them.

    Raises:
        ConfigError: `num_blocks` or `block_size` is below 1.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True, model_fingerprint: str = ""
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(f"num_blocks {num_blocks} and block_size {block_size} must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._fingerprint = model_fingerprint
        self._num_owners = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next to be reused first
        self._hash_of_block: list[bytes | None] = [None] * num_blocks
        self._content_of_block: list[_Content | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        self._tainted: set[int] = set()  # held, but computed by a request that failed: never cached
        self._num_cached_free = 0
        self._peak_used = 0
        self._num_hits = 0
        self._num_misses = 0
        self._num_saved_tokens = 0

    # ---- questions -------------------------------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        """Blocks without an owner, cached ones included."""
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        """Blocks with at least one owner."""
        return self.num_blocks - len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks without an owner whose content can still be found: a part of the free ones."""
        return self._num_cached_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_owners(self, block_id: int) -> int:
        """How many block tables hold this block."""
        return self._num_owners[block_id]

    def lookup(self, request: Request) -> tuple[list[int], int]:
        """The cached blocks that a request without blocks could start from, and the tokens that it need not compute.

        Changes nothing. At least the last token is always computed, so the second number is at most `num_tokens - 1`:
        where all blocks are hits, the last token is computed again in place, which writes the same bits over
        themselves.
        """
        shared = self._match(request)
        return shared, min(len(shared) * self.block_size, request.num_tokens - 1)

    def num_blocks_needed(self, request: Request, num_tokens: int) -> int:
        """Blocks that `allocate(request, num_tokens)` would take from the free queue."""
        if request.block_table:
            return max(0, self.blocks_for(num_tokens) - len(request.block_table))
        shared = self._match(request)
        return self._num_taken(shared, num_tokens)

    def stats(self) -> dict[str, int | float]:
        """Counters since the start. Each request counts as one hit or one miss, when it is first given blocks."""
        return {
            "block_size": self.block_size,
            "num_blocks": self.num_blocks,
            "used_blocks": self.num_used_blocks,
            "peak_used_blocks": self._peak_used,
            "free_blocks": self.num_free_blocks,
            "usage": self.num_used_blocks / self.num_blocks,
            "prefix_hits": self._num_hits,
            "prefix_misses": self._num_misses,
            "prefix_saved_tokens": self._num_saved_tokens,
        }

    # ---- changes ---------------------------------------------------------------------------------------------------

    def allocate(self, request: Request, num_tokens: int) -> list[int] | None:
        """Make the request's block table long enough for its first `num_tokens` tokens: all or nothing.

        A request without blocks first takes what the prefix cache has for it; its `num_computed_tokens` then begins
        behind the hit. Returns the blocks that were added behind the shared ones, or None, with nothing changed, when
        there are too few free blocks.
        """
        is_admission = not request.block_table
        shared = self._match(request) if is_admission else []
        if is_admission and self._num_taken(shared, num_tokens) > self.num_free_blocks:
            return None
        num_new = self.blocks_for(num_tokens) - len(request.block_table) - len(shared)
        if not is_admission and num_new > self.num_free_blocks:
            return None
        for block_id in shared:
            self._acquire(block_id)
        new_block_ids = [self._take_free() for _ in range(num_new)]
        request.block_table += shared + new_block_ids
        if is_admission:
            self._start_behind_hit(request, len(shared) * self.block_size)
        self._peak_used = max(self._peak_used, self.num_used_blocks)
        return new_block_ids

    def cache_full_blocks(self, request: Request, num_computed: int) -> None:
        """Let others share the blocks that the first `num_computed` tokens, all really computed, have filled."""
        if not self._may_share(request):
            return
        num_full = self._num_trusted(request, num_computed // self.block_size)
        self._extend_hashes(request, num_full)
        for index in range(num_full - 1, -1, -1):
            block_id, digest = request.block_table[index], request.block_hashes[index]
            if self._hash_of_block[block_id] is not None or digest in self._block_of_hash:
                break  # what stands before a cached block was cached with it or before
            self._block_of_hash[digest] = block_id
            self._hash_of_block[block_id] = digest
            self._content_of_block[block_id] = self._content(request, index)
            request.cached_blocks.append((block_id, digest))

    def free(self, request: Request, discard: bool = False) -> None:
        """Give all blocks of a request back, the last first, so that tails are reused before what others may share.

        With `discard` what it computed is not trusted any more: nobody will share it from now on. Blocks that it shared stay
        with those who computed them.
        """
        if discard:
            self._distrust(request)
        for block_id in reversed(request.block_table):
            if self._num_owners[block_id] < 1:
                raise InvariantError(f"block {block_id} of request {request.request_id!r} is freed but has no owner")
            self._release(block_id)
        request.block_table.clear()

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks. False, with nothing changed, while any block is held."""
        if self.num_used_blocks:
            return False
        for block_id in list(self._block_of_hash.values()):
            self._forget_hash(block_id)
        return True

    # ---- what failed requests leave --------------------------------------------------------------------------------

    def _distrust(self, request: Request) -> None:
        """Forget what a request has cached, wherever it stands by now, and all that was computed on top of it."""
        caches = {block_id for block_id, digest in request.cached_blocks if self._hash_of_block[block_id] == digest}
        for block_id in self._with_followers(caches) if caches else ():
            self._forget_hash(block_id)
            if self._num_owners[block_id] > (block_id in request.block_table):
                self._tainted.add(block_id)
        request.cached_blocks.clear()

    def _with_followers(self, block_ids: set[int]) -> set[int]:
        """Cached blocks and those whose chain goes through them."""
        followers: dict[bytes, list[int]] = {}
        for block_id in self._block_of_hash.values():
            content = self._content_of_block[block_id]
            if content is not None:
                followers.setdefault(content[0], []).append(block_id)
        found, pending = set(block_ids), list(block_ids)
        while pending:
            digest = self._hash_of_block[pending.pop()]
            new = [] if digest is None else [one for one in followers.get(digest, ()) if one not in found]
            found.update(new)
            pending += new
        return found

    def _num_trusted(self, request: Request, num_full: int) -> int:
        """How many of its full blocks stand before the first that a failed request computed."""
        if not self._tainted:
            return num_full
        table = request.block_table[:num_full]
        return next((index for index, block_id in enumerate(table) if block_id in self._tainted), num_full)

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _num_taken(self, shared: list[int], num_tokens: int) -> int:
        idle = sum(1 for block_id in shared if self._num_owners[block_id] == 0)
        return max(0, self.blocks_for(num_tokens) - len(shared)) + idle

    def _may_share(self, request: Request) -> bool:
        return self.enable_prefix_caching or request.group_id is not None

    def _match(self, request: Request) -> list[int]:
        """The longest run of cached blocks that the request's tokens begin with."""
        wants_prompt_rows = request.sampling_params.prompt_logprobs is not None and request.core.choice_index == 0
        if wants_prompt_rows or not self._may_share(request):
            return []
        num_full = request.num_tokens // self.block_size
        self._extend_hashes(request, num_full)
        shared: list[int] = []
        for index in range(num_full):
            block_id = self._block_of_hash.get(request.block_hashes[index])
            if block_id is None or self._content_of_block[block_id] != self._content(request, index):
                break
            shared.append(block_id)
        return self._without_wanted(request, shared)

    def _without_wanted(self, request: Request, shared: list[int]) -> list[int]:
        """Rows that are wanted have to be computed, so a hit ends before the first of them."""
        first = request.first_wanted_row
        if first is None or min(len(shared) * self.block_size, request.num_tokens - 1) <= first:
            return shared
        return shared[: first // self.block_size]

    def _start_behind_hit(self, request: Request, num_shared_tokens: int) -> None:
        request.num_computed_tokens = min(num_shared_tokens, request.num_tokens - 1)
        if not self.enable_prefix_caching or request.num_preemptions:
            return
        request.num_cached_tokens = request.num_computed_tokens
        if num_shared_tokens:
            self._num_hits += 1
            self._num_saved_tokens += num_shared_tokens
        else:
            self._num_misses += 1

    def _chain_root(self, request: Request) -> bytes:
        group_id = None if self.enable_prefix_caching else request.group_id
        core = request.core
        steering = None if core.steering is None else core.steering.digest
        parts = (self._fingerprint, core.adapter, core.cache_salt, group_id, steering)
        return blake2b(repr(parts).encode(), digest_size=_DIGEST_BYTES).digest()

    def _tokens(self, request: Request, index: int) -> tuple[int, ...]:
        return tuple(request.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _content(self, request: Request, index: int) -> _Content:
        before = request.block_hashes[index - 1] if index else self._chain_root(request)
        return before, self._tokens(request, index)

    def _extend_hashes(self, request: Request, num_full: int) -> None:
        for index in range(len(request.block_hashes), num_full):
            before, tokens = self._content(request, index)
            digest = blake2b(before + array("q", tokens).tobytes(), digest_size=_DIGEST_BYTES).digest()
            request.block_hashes.append(digest)

    def _acquire(self, block_id: int) -> None:
        if self._num_owners[block_id] == 0:
            del self._free[block_id]
            self._num_cached_free -= self._hash_of_block[block_id] is not None
        self._num_owners[block_id] += 1

    def _take_free(self) -> int:
        block_id = next(iter(self._free))
        self._forget_hash(block_id)
        del self._free[block_id]
        self._num_owners[block_id] = 1
        return block_id

    def _release(self, block_id: int) -> None:
        self._num_owners[block_id] -= 1
        if self._num_owners[block_id]:
            return
        self._tainted.discard(block_id)
        if not self.enable_prefix_caching:
            self._forget_hash(block_id)
        self._free[block_id] = None
        if self._hash_of_block[block_id] is None:
            self._free.move_to_end(block_id, last=False)  # nobody can share it: reuse it before any cached block
        else:
            self._num_cached_free += 1

    def _forget_hash(self, block_id: int) -> None:
        digest = self._hash_of_block[block_id]
        if digest is not None:
            del self._block_of_hash[digest]
            self._hash_of_block[block_id] = None
            self._content_of_block[block_id] = None
            self._num_cached_free -= block_id in self._free

    # ---- self-check ------------------------------------------------------------------------------------------------

    def check_invariants(self, requests: Iterable[Request]) -> None:
        """Compare the books with the block tables of all living requests.

        Raises:
            InvariantError: a leak, a double owner, a free block in use, or a cached block whose content is not its
            owner's.
        """
        requests = list(requests)
        self._check_owners(requests)
        self._check_hashes()
        for request in requests:
            self._check_request(request)

    def _check_owners(self, requests: list[Request]) -> None:
        owners = Counter(block_id for request in requests for block_id in request.block_table)
        for block_id, num_owners in enumerate(self._num_owners):
            if num_owners != owners[block_id]:
                raise InvariantError(f"block {block_id} counts {num_owners} owners but {owners[block_id]} hold it")
            if (num_owners == 0) != (block_id in self._free):
                raise InvariantError(f"block {block_id} has {num_owners} owners and free is {block_id in self._free}")
        if self._peak_used < self.num_used_blocks:
            raise InvariantError(f"peak of {self._peak_used} blocks is below the {self.num_used_blocks} in use")

    def _check_hashes(self) -> None:
        hashed = [block_id for block_id, digest in enumerate(self._hash_of_block) if digest is not None]
        if sorted(self._block_of_hash.values()) != hashed:
            raise InvariantError(f"cached blocks {sorted(self._block_of_hash.values())} but hashes on {hashed}")
        num_cached_free = sum(1 for block_id in hashed if block_id in self._free)
        if self._num_cached_free != num_cached_free:
            raise InvariantError(f"{self._num_cached_free} free blocks count as cached but {num_cached_free} are")
        for block_id in self._tainted:
            if self._hash_of_block[block_id] is not None or block_id in self._free:
                raise InvariantError(f"block {block_id} of a failed request is cached or free")
        for block_id in hashed:
            if not self.enable_prefix_caching and block_id in self._free:
                raise InvariantError(f"free block {block_id} is cached although prefix caching is off")

    def _check_request(self, request: Request) -> None:
        table = request.block_table
        if len(set(table)) != len(table):
            raise InvariantError(f"request {request.request_id!r} holds a block twice: {table}")
        if table and request.status is not RequestStatus.RUNNING:
            raise InvariantError(f"request {request.request_id!r} is {request.status.value} but holds blocks {table}")
        if len(table) < self.blocks_for(request.next_start):
            raise InvariantError(
                f"request {request.request_id!r} has {request.next_start} tokens in {len(table)} blocks "
                f"of {self.block_size}"
            )
        for index, block_id in enumerate(table):
            content = self._content_of_block[block_id]
            if content is not None and content[1] != self._tokens(request, index):
                raise InvariantError(
                    f"block {block_id} is cached for tokens that request {request.request_id!r} has not"
                )
