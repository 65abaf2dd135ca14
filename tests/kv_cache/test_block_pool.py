"""kv_cache/block_pool.py: blocks are conserved, reused oldest first, and misuse is an error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewright.kv_cache.block_pool import BlockPool, BlockPoolError


def test_blocks_are_reused_in_the_order_in_which_they_became_free() -> None:
    pool = BlockPool(4)
    assert pool.allocate(4) == [0, 1, 2, 3]
    for block in (2, 0, 3):
        pool.free(block)
    assert pool.allocate(3) == [2, 0, 3]


def test_a_block_without_content_is_reused_before_those_that_have_some() -> None:
    pool = BlockPool(3)
    pool.allocate(3)
    pool.free(0)
    pool.free(1, reuse_first=True)
    pool.free(2)
    assert pool.allocate(3) == [1, 0, 2]


def test_too_much_is_refused_and_changes_nothing() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(BlockPoolError, match="2 blocks wanted, 1 of 2 free"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.check_integrity(range(pool.num_blocks))


def test_a_shared_block_is_free_only_after_its_last_user() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.retain([block])
    pool.free(block)
    assert pool.num_free == 0
    pool.free(block)
    assert pool.num_free == 1


def test_a_free_block_can_be_taken_back_from_the_middle_of_the_list() -> None:
    pool = BlockPool(3)
    pool.retain([1])
    assert pool.references(1) == 1
    assert pool.allocate(2) == [0, 2]
    pool.check_integrity(range(pool.num_blocks))


def test_freeing_twice_is_an_error() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.free(block)
    with pytest.raises(BlockPoolError, match="block 0 is freed more often"):
        pool.free(block)


def test_a_pool_without_blocks_is_an_error() -> None:
    with pytest.raises(BlockPoolError, match="at least one"):
        BlockPool(0)


def test_integrity_check_sees_a_lost_block() -> None:
    pool = BlockPool(2)
    pool._references[1] = 1
    with pytest.raises(BlockPoolError, match="block 1 has 1 references and is in the free list"):
        pool.check_integrity(range(pool.num_blocks))
    pool.check_integrity(range(1))


@given(st.integers(1, 8), st.lists(st.tuples(st.sampled_from(["allocate", "retain", "free"]), st.integers(0, 9))))
def test_random_use_agrees_with_a_plain_count(size: int, operations: list[tuple[str, int]]) -> None:
    pool, counts = BlockPool(size), [0] * size
    for name, number in operations:
        if name == "allocate" and number <= counts.count(0):
            for block in pool.allocate(number):
                assert counts[block] == 0
                counts[block] = 1
        elif name == "retain":
            pool.retain([number % size])
            counts[number % size] += 1
        elif name == "free" and counts[number % size]:
            pool.free(number % size)
            counts[number % size] -= 1
        assert [pool.references(block) for block in range(size)] == counts
        assert pool.num_free == counts.count(0)
        pool.check_integrity(range(pool.num_blocks))


def test_a_pool_that_grows_gives_its_new_blocks_out_after_the_unused_ones_and_before_what_is_cached() -> None:
    """Those that were never used take no memory yet, and it is the highest used one that tells which those are."""
    pool = BlockPool(4)
    assert pool.allocate(2) == [0, 1]
    assert pool.resize(3) == {}
    assert pool.resize(6) == {}
    assert (pool.num_blocks, pool.num_free) == (6, 4)
    pool.free(0)
    assert pool.allocate(5) == [2, 3, 4, 5, 0]


def test_a_pool_that_shrinks_moves_what_is_used_at_its_end_into_what_is_free() -> None:
    pool = BlockPool(6)
    pool.allocate(6)
    pool.retain([5])
    for block in (4, 1, 2):
        pool.free(block)
    with pytest.raises(BlockPoolError, match="3 blocks are in use, which do not fit into 2"):
        pool.resize(2)
    assert pool.resize(4) == {5: 1}
    assert [pool.references(block) for block in range(4)] == [1, 2, 0, 1]
    pool.check_integrity(range(4))
    assert pool.allocate(1) == [2]
    with pytest.raises(BlockPoolError, match="4 blocks are in use"):
        pool.resize(3)
