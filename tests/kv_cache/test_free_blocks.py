"""kv_cache/free_blocks.py: what is reused next, against a list that is searched; whose cache survives a flood."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.scheduling import make, sequence, shape, step
from tidewright.engine.sequence import Sequence
from tidewright.kv_cache.free_blocks import PATIENCE, FreeBlocks
from tidewright.schema import SamplingParams


class Searched:
    """The same by looking at all of them."""

    def __init__(self) -> None:
        self.empty: list[int] = []
        self.cached: list[tuple[int, str, int]] = []
        self.reused = 0

    def pop(self, num_blocks: int) -> set[int]:
        """Which may be next: of tenants that have equally many, any."""
        self.reused += 1
        if self.empty:
            return {self.empty[0]}
        sizes = Counter(owner for _, owner, _ in self.cached)
        block, owner, since = self.cached[0]
        if sizes[owner] > len(self.cached) / len(sizes) or self.reused - since > PATIENCE * num_blocks:
            return {block}
        most = [name for name, size in sizes.items() if size == max(sizes.values())]
        return {next(block for block, owner, _ in self.cached if owner == name) for name in most}

    def remove(self, block: int) -> None:
        self.empty = [one for one in self.empty if one != block]
        self.cached = [one for one in self.cached if one[0] != block]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 4))
def test_the_next_is_the_one_that_a_search_finds(seed: int, num_blocks: int, owners: int) -> None:
    chance = random.Random(seed)
    free, searched = FreeBlocks(), Searched()
    used = set(range(num_blocks))
    for _ in range(200):
        if used and chance.random() < 0.5:
            block = chance.choice(sorted(used))
            used.remove(block)
            if chance.random() < 0.1:
                free.add_empty(block)
                searched.empty.insert(0, block)
            else:
                owner = str(chance.randrange(owners))
                free.add_cached(block, owner)
                searched.cached.append((block, owner, searched.reused))
        elif len(free) and chance.random() < 0.2:
            block = chance.choice(sorted(free))
            free.remove(block)
            searched.remove(block)
            used.add(block)
        elif len(free):
            block = free.pop(num_blocks)
            assert block in searched.pop(num_blocks)
            searched.remove(block)
            used.add(block)
        assert len(free) == num_blocks - len(used)
        assert set(free) == set(range(num_blocks)) - used


def test_with_one_owner_the_oldest_goes_first() -> None:
    free = FreeBlocks()
    for block in (3, 1, 2):
        free.add_cached(block, "a")
    free.add_empty(7)
    assert [free.pop(4) for _ in range(4)] == [7, 3, 1, 2]


def flood(tenant: str, requests: int) -> list[int]:
    """Tokens that a tenant finds in the cache again after others' distinct prompts, and again after many more."""
    scheduler, _ = make(blocks=40, prefix_caching=True, max_batched_tokens=64)
    found = []
    scheduler.add(sequence(0, 33, max_tokens=1, tenant="quiet"))
    step(scheduler)
    for request_id in range(1, requests):
        prompt = [1 + request_id % 90, 1 + request_id // 90] * 16
        scheduler.add(Sequence(request_id, prompt, SamplingParams(max_tokens=1, tenant=tenant)))
        step(scheduler)
        if request_id % 20 == 0:
            scheduler.add(sequence(10_000 + request_id, 33, max_tokens=1, tenant="quiet"))
            ((_, start, _, _),) = shape(step(scheduler)[0])
            found.append(start)
    return found


def test_a_flood_of_another_tenant_evicts_its_own_prefixes() -> None:
    assert flood("flood", 100) == [32] * 4
    assert flood("quiet", 100) == [0] * 4  # its own does


def test_what_nobody_asks_for_goes_in_the_end() -> None:
    free = FreeBlocks()
    for block in range(10):
        free.add_cached(block, "gone" if block < 4 else "busy")
    for number in range(10 * PATIENCE + 10):
        block = free.pop(10)
        assert block >= 4 or number >= 10 * PATIENCE
        free.add_cached(block, "busy")
    assert not any(owner == "gone" for owner, _ in free._cached.values())
