"""kv_cache/idle_audit.py: every block is looked at, a bounded number in a call, also if work comes in between."""

from __future__ import annotations

import pytest

from tidewright.kv_cache.block_pool import BlockPool, BlockPoolError
from tidewright.kv_cache.idle_audit import BLOCKS, IdleAudit
from tidewright.kv_cache.prefix_cache import HashChain, PrefixCache

CALLS = 4


class CountingPool(BlockPool):
    """Counts the blocks that are asked about."""

    asked = 0

    def references(self, block: int) -> int:
        self.asked += 1
        return super().references(block)


@pytest.fixture
def cache() -> PrefixCache:
    """All blocks are free; the first 64 hold something."""
    made = PrefixCache(CountingPool((CALLS - 1) * BLOCKS + 5), block_size=2)
    tokens = list(range(128))
    table = made.take([], 64)
    made.register(table, tokens, 128, HashChain(None, 2), 0)
    made.free(table)
    return made


def calls(audit: IdleAudit) -> int:
    count = 0
    while audit.is_due:
        audit.check_some()
        count += 1
    return count


def test_a_call_looks_at_few_blocks_and_all_calls_at_all(cache: PrefixCache) -> None:
    audit, pool = IdleAudit(cache), cache.pool
    assert isinstance(pool, CountingPool)
    assert not audit.is_due
    pool.asked = 0
    audit.begin()
    assert cache.num_cached == 64
    assert pool.asked == 0
    audit.check_some()
    assert pool.asked == BLOCKS
    assert calls(audit) == CALLS - 1
    assert pool.asked == pool.num_blocks
    assert calls(audit) == 0


@pytest.mark.parametrize("block", [0, BLOCKS - 1, BLOCKS, (CALLS - 1) * BLOCKS + 4])
@pytest.mark.parametrize("calls_before", [0, 1, CALLS])
def test_a_broken_book_is_found_wherever_the_last_audit_stopped(
    cache: PrefixCache, block: int, calls_before: int
) -> None:
    audit = IdleAudit(cache)
    audit.begin()
    for _ in range(calls_before):
        audit.check_some()
    cache.pool._references[block] = 1
    audit.begin()
    with pytest.raises(BlockPoolError, match=f"block {block} has 1 references and is in the free list"):
        calls(audit)


def test_a_block_that_the_index_mixes_up_is_found(cache: PrefixCache) -> None:
    audit = IdleAudit(cache)
    digests = cache._digests
    digests[3], digests[9] = digests[9], digests[3]
    audit.begin()
    with pytest.raises(BlockPoolError, match="does not find block 3"):
        calls(audit)


def test_totals_that_do_not_add_up_are_found_at_once(cache: PrefixCache) -> None:
    audit = IdleAudit(cache)
    table = cache.take([], 2)
    with pytest.raises(BlockPoolError, match="2 blocks are in use, but by no sequence"):
        audit.begin()
    cache.free(table)
    cache._digests.popitem()
    with pytest.raises(BlockPoolError, match="63 blocks have a digest, but 64 are in the prefix index and 64"):
        audit.begin()


def test_an_audit_goes_on_over_a_pool_that_shrank(cache: PrefixCache) -> None:
    audit = IdleAudit(cache)
    audit.begin()
    for _ in range(CALLS - 1):
        audit.check_some()
    cache.resize(BLOCKS)
    assert calls(audit) == 1
