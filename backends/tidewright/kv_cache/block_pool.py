"""Who owns which block of the KV cache: reference counts, and the free blocks (free_blocks.py).

Pure bookkeeping over block numbers; what the blocks hold is known to prefix_cache.py, the tensors to storage.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from tidewright.kv_cache.free_blocks import FreeBlocks


class BlockPoolError(RuntimeError):
    """The pool was asked for what it can't give, or its books don't add up: always a bug of the caller."""


class BlockPool:
    """Hands out blocks 0 … num_blocks - 1. Every operation costs O(1) a block; `resize`, a block that comes or goes."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise BlockPoolError(f"a block pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._free = FreeBlocks()
        for block in range(num_blocks):
            self._free.add_empty(block, is_new=True)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def references(self, block: int) -> int:
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """Takes the `count` blocks that are to be reused first; each starts with one reference."""
        if count > len(self._free):
            raise BlockPoolError(f"{count} blocks wanted, {len(self._free)} of {self.num_blocks} free")
        blocks = [self._free.pop(self.num_blocks) for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each block; a free block comes back with its content."""
        for block in blocks:
            if self._references[block] == 0:
                self._free.remove(block)
            self._references[block] += 1

    def free(self, block: int, reuse_first: bool = False, owner: str = "") -> None:
        """Drops a reference. A block that becomes free is the first to be reused if it holds nothing.

        Else it stays in the cache for its `owner`, a tenant, and is the last of that one's to be reused.
        """
        if self._references[block] == 0:
            raise BlockPoolError(f"block {block} is freed more often than it was taken")
        self._references[block] -= 1
        if self._references[block] == 0:
            if reuse_first:
                self._free.add_empty(block)
            else:
                self._free.add_cached(block, owner)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def resize(self, num_blocks: int) -> dict[int, int]:
        """Adds blocks at the end, or takes those at the end away; to which blocks the used ones of these move.

        Whoever has a block must know it by its new number from now on.
        """
        if num_blocks < max(self.num_used, 1):
            raise BlockPoolError(f"{self.num_used} blocks are in use, which do not fit into {num_blocks}")
        # Up to the highest that was ever used, blocks count as memory that is taken: so the lowest are used first.
        for block in range(self.num_blocks, num_blocks):
            self._free.add_empty(block, is_new=True)
        self._references += [0] * (num_blocks - self.num_blocks)
        gone = range(num_blocks, self.num_blocks)
        for block in gone:
            if block in self._free:
                self._free.remove(block)
        moves: dict[int, int] = {}
        for block in gone:
            if references := self._references[block]:
                moves[block] = self._free.pop(num_blocks)
                self._references[moves[block]] = references
        del self._references[num_blocks:]
        self.num_blocks = num_blocks
        return moves

    def check_integrity(self, blocks: range) -> None:
        """Raises BlockPoolError unless exactly those of `blocks` without a reference are in the free list."""
        for block in blocks:
            references = self._references[block]
            if references < 0 or (references == 0) != (block in self._free):
                listed = "in" if block in self._free else "not in"
                raise BlockPoolError(f"block {block} has {references} references and is {listed} the free list")
