"""kv_cache/prefix_cache.py: what is found is what was stored, also when hashes collide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewright.kv_cache import prefix_cache
from tidewright.kv_cache.block_pool import BlockPool, BlockPoolError
from tidewright.kv_cache.prefix_cache import HashChain, PrefixCache


def chain(token_ids: list[int], salt: str | None = None) -> HashChain:
    made = HashChain(salt, block_size=2)
    made.extend(token_ids)
    return made


def stored(token_ids: list[int], blocks: int = 4) -> tuple[PrefixCache, list[int]]:
    """A cache in which a sequence has been computed, and its block table."""
    cache = PrefixCache(BlockPool(blocks), block_size=2)
    table = cache.take([], -(-len(token_ids) // 2))
    cache.register(table, token_ids, len(token_ids), chain(token_ids), 0)
    return cache, table


def test_a_chain_grows_as_if_it_had_been_made_at_once() -> None:
    grown = HashChain(None, block_size=2)
    for end in range(8):
        grown.extend(list(range(end)))
    assert grown.digests == chain(list(range(7))).digests
    assert len(grown.digests) == 3


def test_blocks_of_another_format_or_salt_have_other_digests() -> None:
    chains = [HashChain(salt, 2, name) for salt in (None, "", "int8") for name in ("int8", "fp8", "int8salt:")]
    for made in chains:
        made.extend([1, 2])
    assert len({made.digests[0] for made in chains}) == len(chains)


def test_tenants_have_chains_of_their_own() -> None:
    roots = [(salt, tenant) for salt in (None, "", "a", "tenant:1:a") for tenant in ("", "a", "salt:", "asalt:a")]
    chains = [HashChain(salt, 2, "int8", tenant) for salt, tenant in roots]
    for made in chains:
        made.extend([1, 2])
    assert len({made.digests[0] for made in chains}) == len(chains)


def test_a_block_is_found_only_behind_the_same_beginning() -> None:
    cache, table = stored([1, 2, 3, 4])
    assert cache.find([1, 2, 3, 4, 5], chain([1, 2, 3, 4, 5])) == table
    assert cache.find([1, 2, 9, 4, 5], chain([1, 2, 9, 4, 5])) == table[:1]
    assert cache.find([9, 2, 3, 4, 5], chain([9, 2, 3, 4, 5])) == []
    assert cache.find([3, 4, 5], chain([3, 4, 5])) == []


def test_only_computed_blocks_can_be_found() -> None:
    cache = PrefixCache(BlockPool(4), block_size=2)
    tokens = [1, 2, 3, 4, 5, 6]
    table = cache.take([], 3)
    assert cache.register(table, tokens, 3, chain(tokens), 0) == 1
    assert cache.find([*tokens, 7], chain([*tokens, 7])) == table[:1]
    assert cache.register(table, tokens, 6, chain(tokens), 1) == 3
    assert cache.find([*tokens, 7], chain([*tokens, 7])) == table


def test_colliding_hashes_do_not_mix_up_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant:
        def __init__(self, *_: object, **__: object) -> None: ...
        def digest(self) -> bytes:
            return b"same"

    monkeypatch.setattr(prefix_cache, "blake2b", Constant)
    cache, _ = stored([1, 2])
    assert cache.find([3, 4, 5], chain([3, 4, 5])) == []


def test_a_reused_block_is_forgotten_and_an_unreferenced_one_is_not() -> None:
    cache, table = stored([1, 2, 3, 4], blocks=2)
    cache.free(table)
    assert cache.num_cached == 2
    assert cache.find([1, 2, 3, 4, 5], chain([1, 2, 3, 4])) == table
    assert next(cache.free_after(table, 0)) == 0
    cache.take([], 1)  # the end of a sequence goes first
    assert cache.find([1, 2, 3, 4, 5], chain([1, 2, 3, 4])) == table[:1]
    assert cache.evictions == 1


def test_integrity_check_sees_what_does_not_add_up() -> None:
    cache, table = stored([1, 2, 3, 4])
    cache.check_integrity([table])
    with pytest.raises(BlockPoolError, match="is in 0 tables, with 1 references"):
        cache.check_integrity([])
    cache.check_integrity([], range(2, 4))  # which are free
    cache.num_cached = 1
    with pytest.raises(BlockPoolError, match="0 free blocks can be found, but 1 are counted"):
        cache.check_integrity([table])
    digest = chain([1, 2]).digests[0]
    entry = cache._entries.pop(digest)
    with pytest.raises(BlockPoolError, match="does not find block 0"):
        cache.check_integrity([table])
    cache._entries[digest] = replace(entry, block=1)
    with pytest.raises(BlockPoolError, match="does not find block 0"):
        cache.check_integrity([table], range(1))


@given(st.data())
def test_cached_blocks_are_counted_as_they_come_and_go(data: st.DataObject) -> None:
    """Sequences of few different tokens, which share blocks, write the same twice, and push each other out."""
    cache = PrefixCache(BlockPool(data.draw(st.integers(2, 8))), block_size=2)
    tables: list[list[int]] = []
    for token_ids in data.draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), max_size=20)):
        own = chain(token_ids)
        shared = cache.find(token_ids, own) if data.draw(st.booleans()) else []
        needed = -(-len(token_ids) // 2) - len(shared)
        while tables and next(cache.free_after(shared, needed)) < data.draw(st.integers(0, 2)):
            cache.free(tables.pop(data.draw(st.integers(0, len(tables) - 1))))
        if next(cache.free_after(shared, needed)) >= 0:
            tables.append(cache.take(shared, needed))
            cache.register(tables[-1], token_ids, data.draw(st.integers(0, len(token_ids))), own, len(shared))
        digests = {block for block, _ in cache._digests.items()}
        assert cache.num_cached == len(digests - {block for table in tables for block in table})
        cache.check_integrity(tables)
    for table in tables:
        cache.free(table)
    cache.check_totals()


class CountingDict(dict[Any, Any]):
    lookups = 0

    def get(self, *args: Any) -> Any:
        self.lookups += 1
        return super().get(*args)


def test_asking_again_costs_nothing_until_a_block_that_matters_comes_or_goes() -> None:
    tokens = [*range(200), 7]
    cache, table = stored(tokens[:8], blocks=8)  # and four blocks more, of others
    asked = chain(tokens)
    assert cache.find(tokens, asked) == table
    counting = cache._entries = CountingDict(cache._entries)

    def lookups(found: list[int]) -> int:
        before = counting.lookups
        assert cache.find(tokens, asked) == found
        return counting.lookups - before

    assert lookups(table) == 0
    other = cache.take([], 2)
    cache.register(other, [900, 901, 902, 903], 4, chain([900, 901, 902, 903]), 0)  # of no use to it
    assert lookups(table) == 0
    cache.free(other)
    (longer,) = cache.take([], 1)
    cache.register([*table, longer], tokens, 10, asked, 4)
    assert lookups([*table, longer]) > 0
    assert lookups([*table, longer]) == 0
    cache.free([*table, longer])
    assert lookups([*table, longer]) == 0  # it can still be found
    cache.take([], 8)  # evicts all
    assert lookups([]) > 0
    assert lookups([]) == 0
    # Another sequence, and the same one with more tokens, are other questions.
    assert cache.find(tokens[:3], chain(tokens[:3])) == []
    assert lookups([]) > 0


def test_blocks_of_steps_that_were_not_computed_are_forgotten() -> None:
    cache, table = stored([1, 2, 3, 4], blocks=6)
    more = [1, 2, 3, 4, 5, 6, 7, 8]
    cache.begin_step()
    cache.begin_step()  # before the one before it is computed
    table += cache.take([], 2)
    cache.register(table, more, 6, chain(more), 2)
    cache.step_computed()
    cache.begin_step()
    cache.register(table, more, 8, chain(more), 3)
    assert cache.find([*more, 9], chain([*more, 9])) == table
    cache.forget_unwritten()
    assert cache.find([*more, 9], chain([*more, 9])) == table[:2]
    cache.check_integrity([table])
    cache.free(table)
    assert (cache.num_cached, cache.pool.num_free) == (2, 6)
    cache.check_integrity([])
    assert cache.evictions == 0


def test_an_uncomputed_block_that_nobody_owns_any_longer_is_forgotten_too() -> None:
    cache = PrefixCache(BlockPool(3), block_size=2)
    cache.begin_step()
    table = cache.take([], 2)
    cache.register(table, [1, 2, 3, 4], 4, chain([1, 2, 3, 4]), 0)
    cache.free(table)
    cache.take([], 2)  # evicts the end of it
    assert cache.num_cached == 1
    cache.forget_unwritten()
    assert cache.num_cached == 0
    assert cache.find([1, 2, 3], chain([1, 2, 3])) == []


def test_a_cache_that_shrinks_finds_what_it_still_has_where_it_is_now() -> None:
    first, second = [1, 2, 3, 4], [5, 6, 7, 8]
    cache, table = stored(first)
    other = cache.take([], 2)
    cache.register(other, second, 4, chain(second), 0)
    cache.free(table)  # blocks 0 and 1, which can still be found; block 1 is older
    look_up = chain([*second, 9])
    assert cache.find([*second, 9], look_up) == [2, 3]
    assert cache.resize(3) == {3: 1}
    cache.check_integrity([[2, 1]])
    assert cache.find([*second, 9], look_up) == [2, 1]
    assert cache.find([*first, 9], chain(first)) == [0]
    assert (cache.num_cached, cache.evictions) == (1, 1)
    cache.free([2, 1])
    assert cache.resize(1) == {}
    cache.check_totals()
    cache.check_integrity([])
    assert (cache.num_cached, cache.evictions) == (1, 3)
