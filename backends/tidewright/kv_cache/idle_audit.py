"""Checks the books of an idle KV cache, a few blocks a call, so that no request has to wait for it."""

from __future__ import annotations

from tidewright.kv_cache.prefix_cache import PrefixCache

BLOCKS = 2048  # looked at in one call: half a millisecond


class IdleAudit:
    """Used while nothing runs or waits, so that no block may be in use.

    Each block is checked for itself, so an audit that work interrupts goes on where it was.
    """

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._next = 0  # block
        self._left = 0  # blocks

    @property
    def is_due(self) -> bool:
        return self._left > 0

    def begin(self) -> None:
        """Checks the totals, in O(1), and makes a look at each block due. Raises BlockPoolError."""
        self._cache.check_totals()
        self._left = self._cache.pool.num_blocks

    def check_some(self) -> None:
        """Looks at some of the blocks that are due. Raises BlockPoolError if one is not what it is said to be."""
        self._next %= self._cache.pool.num_blocks  # which may be fewer than at the last call
        blocks = range(self._next, min(self._next + min(BLOCKS, self._left), self._cache.pool.num_blocks))
        self._cache.check_integrity([], blocks)
        self._left -= len(blocks)
        self._next = blocks.stop % self._cache.pool.num_blocks
