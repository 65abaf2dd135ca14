"""The free blocks of a pool, and which of them is reused next: a prefix cache that tenants share fairly. Pure.

Blocks that hold nothing go first. Then the one that was free for longest (LRU), unless its tenant is protected: who has
at most an equal share of what is cached loses nothing to others, and the tenant that has most loses its oldest block
instead. So a flood of new prompts evicts its own. What nobody asks for while the pool is handed out many times over
loses that protection, or blocks of tenants that are gone would stay for ever. With one tenant this is LRU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

PATIENCE = 8  # times that the whole pool is handed out


class FreeBlocks:
    """Every operation costs O(1)."""

    def __init__(self) -> None:
        self._empty: OrderedDict[int, None] = OrderedDict()  # next to be reused first
        self._cached: OrderedDict[int, tuple[str, int]] = OrderedDict()  # owner, and when it became free; oldest first
        self._of_owner: dict[str, OrderedDict[int, None]] = {}  # oldest first; none is empty
        self._by_size: dict[int, OrderedDict[str, None]] = {}  # owners by the number of their blocks; none is empty
        self._largest = 0
        self._reused = 0  # so far

    def __len__(self) -> int:
        return len(self._empty) + len(self._cached)

    def __contains__(self, block: int) -> bool:
        return block in self._empty or block in self._cached

    def __iter__(self) -> Iterator[int]:
        yield from self._empty
        yield from self._cached

    def add_empty(self, block: int, is_new: bool = False) -> None:
        """Of all, it is reused first; if it is new, after the others that hold nothing."""
        self._empty[block] = None
        self._empty.move_to_end(block, last=is_new)

    def add_cached(self, block: int, owner: str) -> None:
        """It holds something of this tenant."""
        self._cached[block] = owner, self._reused
        blocks = self._of_owner.setdefault(owner, OrderedDict())
        blocks[block] = None
        self._resized(owner, len(blocks) - 1, len(blocks))

    def remove(self, block: int) -> None:
        if block in self._empty:
            del self._empty[block]
            return
        owner, _ = self._cached.pop(block)
        blocks = self._of_owner[owner]
        del blocks[block]
        self._resized(owner, len(blocks) + 1, len(blocks))
        if not blocks:
            del self._of_owner[owner]

    def pop(self, num_blocks: int) -> int:
        """The one that is reused next, of a pool of so many blocks."""
        self._reused += 1
        if self._empty:
            return self._empty.popitem(last=False)[0]
        block = self._next(num_blocks)
        self.remove(block)
        return block

    def _next(self, num_blocks: int) -> int:
        oldest, (owner, since) = next(iter(self._cached.items()))
        owners = len(self._of_owner)
        if len(self._of_owner[owner]) * owners > len(self._cached) or self._reused - since > PATIENCE * num_blocks:
            return oldest
        return next(iter(self._of_owner[next(iter(self._by_size[self._largest]))]))

    def _resized(self, owner: str, before: int, now: int) -> None:
        """An owner has one block more, or one less."""
        if before:
            owners = self._by_size[before]
            del owners[owner]
            if not owners:
                del self._by_size[before]
        if now:
            self._by_size.setdefault(now, OrderedDict())[owner] = None
        if now > self._largest or (before == self._largest and before not in self._by_size):
            self._largest = now
