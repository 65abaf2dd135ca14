"""The account of one rank's memory: its budget, and who has how much of it. Bytes, all of them. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

HELD, CACHED, FREE = "kv_used", "kv_cached", "kv_free"
OWNERS = ("weights", "workspace", "adapters", HELD, CACHED, FREE)
"""The parts of the budget that are given to somebody. `workspace` is what the largest step takes beside the others."""


@dataclass(frozen=True)
class FixedMemory:
    """What an engine knows once its model is loaded, and what stays."""

    budget: int
    weights: int
    workspace: int
    block: int  # of the KV cache
    most_blocks: int  # that the budget pays for
    room_blocks: int = 0  # that it could pay for with the budgets of all models beside this one; 0: there are none


class MemoryAccount(msgspec.Struct, frozen=True, array_like=True):
    """At one moment. With several ranks, of each: they have equally many blocks."""

    budget: int = 0
    weights: int = 0
    workspace: int = 0
    adapters: int = 0
    kv_used: int = 0  # blocks that requests have
    kv_cached: int = 0  # free ones that the prefix cache can still find
    kv_free: int = 0  # the others
    block: int = 0  # one of the KV cache
    kv_least: int = 0  # the pool is never smaller: the longest request fits in alone
    kv_most: int = 0  # the pool is never larger: the budget pays for no more
    kv_target: int = 0  # the pool is as large whenever there is memory for it
    kv_wanted: int = 0  # blocks that requests have, and those that wait for blocks would take now
    kv_room: int = 0  # `kv_most` can become as much, if other models give up as much of their budgets
    kv_wished: int = 0  # the pool should not become larger, as an operator says; 0: nobody said anything

    @property
    def kv_pool(self) -> int:
        return self.kv_used + self.kv_cached + self.kv_free

    @property
    def target_blocks(self) -> int:
        return self.kv_target // self.block if self.block else 0

    @property
    def most_blocks(self) -> int:
        return self.kv_most // self.block if self.block else 0

    @property
    def wished_blocks(self) -> int:
        return self.kv_wished // self.block if self.block else 0

    @property
    def adapters_in_pool(self) -> int:
        """Bytes of adapters in what the budget pays for the KV cache: all of them, unless they have a part of it."""
        return max(self.adapters - (self.budget - self.weights - self.workspace - self.kv_most), 0)

    @property
    def committed(self) -> int:
        """Never more than the budget, whatever requests do."""
        return self.weights + self.workspace + self.adapters + self.kv_pool

    @property
    def utilisation(self) -> float:
        """Share of the budget that serves requests now; cached blocks do so only once they are found again."""
        return (self.committed - self.kv_cached - self.kv_free) / self.budget if self.budget else 0.0
