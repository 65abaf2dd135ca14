"""Finds the blocks that already hold the beginning of a sequence, so that equal beginnings are computed once.

A full block is known by the hash of its tokens and of all tokens before it (a hash chain, as in vLLM's automatic
prefix caching), rooted in the number format and in a salt that keeps tenants apart. Blocks keep their content, and stay
findable, after their last owner is gone; they are forgotten when the pool gives them to someone else.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain as chained

from tidewright.kv_cache.block_pool import BlockPool, BlockPoolError


class HashChain:
    """The digests of a sequence's full blocks, made as the sequence grows.

    `cache_format` names the number format of the blocks. It is part of every digest: one that outlives its cache never
    names a block of another format. `adapter` is the digest of the LoRA adapter that computes them; empty: none.
    """

    def __init__(
        self, salt: str | None, block_size: int, cache_format: str = "", tenant: str = "", adapter: str = ""
    ) -> None:
        self._block_size = block_size
        root = b"" if salt is None else b"salt:" + salt.encode()
        if tenant:
            root = f"tenant:{len(tenant)}:{tenant}".encode() + root
        if adapter:
            root = f"adapter:{len(adapter)}:{adapter}".encode() + root
        self._last = blake2b(cache_format.encode() + b"\0" + root, digest_size=16).digest()
        self.digests: list[bytes] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        """`token_ids` are all of the sequence's; those that were there before must not have changed."""
        size = self._block_size
        for first in range(len(self.digests) * size, len(token_ids) - size + 1, size):
            content = array("q", token_ids[first : first + size]).tobytes()
            self._last = blake2b(self._last + content, digest_size=16).digest()
            self.digests.append(self._last)


@dataclass(frozen=True)
class _Entry:
    block: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Lookup:
    """What `find` found, and the digests that this depends on: those found, and the first that was not."""

    chain: HashChain
    num_tokens: int
    blocks: list[int]
    digests: frozenset[bytes]


class PrefixCache:
    """A block pool whose blocks can be found again by what they hold."""

    def __init__(self, pool: BlockPool, block_size: int, enabled: bool = True) -> None:
        self.pool = pool
        self._block_size = block_size
        self._enabled = enabled
        self._entries: dict[bytes, _Entry] = {}
        self._digests: dict[int, bytes] = {}  # of the blocks that can be found
        self._latest: _Lookup | None = None  # as long as it is true
        self._unwritten: deque[list[bytes]] = deque()  # of the blocks that steps not yet computed will fill
        self.evictions = 0
        self.num_cached = 0  # free blocks whose content can still be found

    def find(self, token_ids: Sequence[int], chain: HashChain) -> list[int]:
        """Blocks that hold the beginning of `token_ids`, without taking them.

        The last token is never among them: it must be computed, for its logits are wanted. A request that waits for
        memory asks again in each step; until a block that matters comes or goes, that costs nothing.
        """
        if not self._enabled:
            return []
        latest = self._latest
        if latest and latest.chain is chain and latest.num_tokens == len(token_ids):
            return latest.blocks
        chain.extend(token_ids)
        blocks: list[int] = []
        size = self._block_size
        for index in range(min((len(token_ids) - 1) // size, len(chain.digests))):
            entry = self._entries.get(chain.digests[index])
            if entry is None or entry.token_ids != tuple(token_ids[index * size : (index + 1) * size]):
                break
            blocks.append(entry.block)
        self._latest = _Lookup(chain, len(token_ids), blocks, frozenset(chain.digests[: len(blocks) + 1]))
        return blocks

    def free_after(self, shared: Sequence[int], count: int, tables: Iterable[Sequence[int]] = ()) -> Iterator[int]:
        """Blocks that would be left if `shared` were taken and `count` allocated; negative if it can't be.

        First as things are, then as if one more of `tables` had been freed, after each. Frees nothing itself.
        """
        references = self.pool.references
        left = self.pool.num_free - count - sum(1 for block in shared if references(block) == 0)
        yield left
        wanted = set(shared)
        dropped: Counter[int] = Counter()
        for table in tables:
            for block in table:
                dropped[block] += 1
                # A block that others share becomes free with its last owner, and one that is wanted is taken again.
                left += dropped[block] == references(block) and block not in wanted
            yield left

    def take(self, shared: list[int], count: int) -> list[int]:
        """A block table: the shared blocks, then `count` fresh ones."""
        self.num_cached -= sum(1 for block in shared if self.pool.references(block) == 0)
        self.pool.retain(shared)
        fresh = self.pool.allocate(count)
        self._evict(fresh)
        return shared + fresh

    def resize(self, num_blocks: int) -> dict[int, int]:
        """As BlockPool's. Blocks that go, or that others move to, are forgotten; those that move are found there."""
        gone = range(num_blocks, self.pool.num_blocks)
        self._evict(block for block in gone if not self.pool.references(block))
        moves = self.pool.resize(num_blocks)
        self._evict(moves.values())
        for block, place in moves.items():
            if digest := self._digests.pop(block, None):
                self._entries[digest] = replace(self._entries[digest], block=place)
                self._digests[place] = digest
                self._doubt_latest(digest)
        return moves

    def _evict(self, blocks: Iterable[int]) -> None:
        """What these hold, which were free, can no longer be found."""
        for block in blocks:
            if digest := self._digests.pop(block, None):
                self._drop(digest)
                self.num_cached -= 1
                self.evictions += 1

    def register(
        self, block_table: Sequence[int], token_ids: Sequence[int], end: int, chain: HashChain, first: int
    ) -> int:
        """Makes the blocks from number `first` on findable that are full of the first `end` tokens; returns their end.

        Keys and values may still be on the way, as long as they are written before anyone reads them: each layer of
        a step writes all of them before its attention reads any, so sequences of one step can share.
        """
        size = self._block_size
        if not self._enabled or end // size == first:
            return end // size
        chain.extend(token_ids)
        for index in range(first, end // size):
            digest, block = chain.digests[index], block_table[index]
            if digest not in self._entries:  # else someone else computed the same, and was first
                self._entries[digest] = _Entry(block, tuple(token_ids[index * size : (index + 1) * size]))
                self._digests[block] = digest
                self._doubt_latest(digest)
                if self._unwritten:
                    self._unwritten[-1].append(digest)
        return end // size

    def begin_step(self) -> None:
        """What is registered from here on belongs to this step, and is in the cache once it is computed."""
        self._unwritten.append([])

    def cancel_step(self) -> None:
        """The latest step that was begun computes nothing."""
        self._unwritten.pop()

    def step_computed(self) -> None:
        """The oldest step that was begun: what it registered stays findable."""
        self._unwritten.popleft()

    def forget_unwritten(self) -> None:
        """The steps that were begun will not be computed: the blocks that they were to fill hold nothing."""
        for digest in chained.from_iterable(self._unwritten):
            if entry := self._entries.get(digest):  # else it was evicted meanwhile
                self.num_cached -= self.pool.references(entry.block) == 0
                del self._digests[entry.block]
                self._drop(digest)
        self._unwritten.clear()

    def free(self, block_table: list[int], owner: str = "") -> None:
        """Gives a table back, last block first: the end of a sequence is the least likely to be of use to others.

        `owner`: the tenant whose sequence it was; others have chains of their own, and find none of its blocks.
        """
        for block in reversed(block_table):
            is_findable = block in self._digests
            self.pool.free(block, reuse_first=not is_findable, owner=owner)
            self.num_cached += is_findable and self.pool.references(block) == 0

    def _drop(self, digest: bytes) -> None:
        del self._entries[digest]
        self._doubt_latest(digest)

    def _doubt_latest(self, digest: bytes) -> None:
        """A block with that digest came or went."""
        if self._latest and digest in self._latest.digests:
            self._latest = None

    def check_totals(self) -> None:
        """Raises BlockPoolError unless all blocks have come back, as they must when there is no table. O(1)."""
        if self.pool.num_free != self.pool.num_blocks:
            raise BlockPoolError(f"{self.pool.num_blocks - self.pool.num_free} blocks are in use, but by no sequence")
        if not len(self._entries) == len(self._digests) == self.num_cached:
            raise BlockPoolError(
                f"{len(self._digests)} blocks have a digest, but {len(self._entries)} are in the prefix index "
                f"and {self.num_cached} are counted"
            )

    def check_integrity(self, tables: Iterable[Sequence[int]], blocks: range | None = None) -> None:
        """Raises BlockPoolError unless `tables` hold exactly the references of `blocks`, and the index finds them.

        Walks `tables` and `blocks`, which are all there are by default; then what is counted is recounted as well.
        """
        every = range(self.pool.num_blocks)
        blocks, references = every if blocks is None else blocks, self.pool.references
        self.pool.check_integrity(blocks)
        counts = Counter(block for table in tables for block in table)
        for block in blocks:
            if counts.get(block, 0) != references(block):
                raise BlockPoolError(f"block {block} is in {counts[block]} tables, with {references(block)} references")
            digest = self._digests.get(block)
            entry = None if digest is None else self._entries.get(digest)
            if digest is not None and (entry is None or entry.block != block):
                raise BlockPoolError(f"the prefix index does not find block {block} by its digest")
        if blocks == every:
            if len(self._entries) != len(self._digests):
                raise BlockPoolError("the prefix index finds blocks that have no digest")
            cached = sum(1 for block in self._digests if references(block) == 0)
            if cached != self.num_cached:
                raise BlockPoolError(f"{cached} free blocks can be found, but {self.num_cached} are counted")
