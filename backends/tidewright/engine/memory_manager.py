"""Keeps an engine's memory within its budget and the machine's: account, resizes of the KV cache, what is reclaimed.

The rules are memory/reclaim.py's; who does what was decided here is the engine, between two steps.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from tidewright.kv_cache.budget import mib
from tidewright.logs import event
from tidewright.memory.account import FixedMemory, MemoryAccount
from tidewright.memory.reclaim import STAGES, Watermarks, share_out, to_give_back, to_reclaim

LOOK_INTERVAL = 1.0  # seconds between two looks at the machine
_SLAB = 2 << 20  # bytes of one layer's keys: a huge page goes back as a whole
_SLABS = 16  # that a pool has at least
_GREW = "there is memory again"

log = logging.getLogger(__name__)


class GrowthError(Exception):
    """Memory for a larger pool is lacking elsewhere: of which this rank knows nothing, so it can't wait for it."""


class Pool(Protocol):
    """The KV cache, in blocks."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def used_blocks(self) -> int: ...
    @property
    def cached_blocks(self) -> int: ...
    @property
    def free_blocks(self) -> int: ...  # that can go without a preemption, now or soon
    @property
    def least_blocks(self) -> int: ...
    @property
    def wanted_blocks(self) -> int: ...  # used ones, and those that waiting requests would take
    @property
    def touched_blocks(self) -> int: ...  # of which the machine knows: the others take no memory yet
    def resize(self, num_blocks: int) -> bool: ...  # False: memory does not suffice; or raises GrowthError


class Adapters(Protocol):
    """LoRA adapters, in bytes of the device."""

    def used(self) -> int: ...
    def idle(self) -> int: ...  # of those that no request has
    def evict(self, size: int) -> int: ...  # idle ones, least recently used first; what that gave


class NoAdapters:
    def used(self) -> int:
        return 0

    def idle(self) -> int:
        return 0

    def evict(self, size: int) -> int:
        return 0


class MemoryManager:
    def __init__(
        self,
        fixed: FixedMemory,
        pool: Pool,
        wish: float,
        free: Callable[[], int] | None,
        marks: Watermarks,
        layers: int = 1,
        ranks: int = 1,
        share: float = 1.0,
        in_slabs: bool = True,
    ) -> None:
        """`wish`: blocks that the pool should not exceed, as an operator says; infinity: nobody said anything.

        `free`: bytes of the machine, that `ranks` of them share; None: it is not watched. `in_slabs`: the pool grows by
        one at a time; else each resize copies all of it, so it gets all that there is at once, and a slab at least.

        `share`: of the memory of all models of the server. Their engines see the same shortage at the same moment, so
        each makes up for its share of it.
        """
        self._fixed, self._pool = fixed, pool
        self._wish = wish
        self._free, self._marks, self._in_slabs = free, marks, in_slabs
        self._ranks, self._share = ranks, share
        slab = math.ceil(2 * layers * _SLAB / fixed.block)
        self._slab = max(min(slab, fixed.most_blocks // _SLABS), 1)  # blocks
        self._looked = 0.0
        self.adapters: Adapters = NoAdapters()
        self._told = pool.num_blocks  # its size in the last line of the log
        self.resizes = 0
        self.reclaimed = dict.fromkeys(STAGES, 0)

    @property
    def least_blocks(self) -> int:
        return min(self._pool.least_blocks, self._fixed.most_blocks)

    def account(self) -> MemoryAccount:
        fixed, pool = self._fixed, self._pool
        return MemoryAccount(
            budget=fixed.budget,
            weights=fixed.weights,
            workspace=fixed.workspace,
            adapters=self.adapters.used(),
            kv_used=pool.used_blocks * fixed.block,
            kv_cached=pool.cached_blocks * fixed.block,
            kv_free=(pool.num_blocks - pool.used_blocks - pool.cached_blocks) * fixed.block,
            block=fixed.block,
            kv_least=self.least_blocks * fixed.block,
            kv_most=fixed.most_blocks * fixed.block,
            kv_target=self._target * fixed.block,
            kv_wanted=pool.wanted_blocks * fixed.block,
            kv_room=int(min(self._wish, self._room)) * fixed.block,
            kv_wished=0 if math.isinf(self._wish) else int(self._wish) * fixed.block,
        )

    @property
    def _target(self) -> int:
        """Blocks that the pool gets as soon as there is memory for them."""
        return int(min(self._wish, self._fixed.most_blocks))

    @property
    def _room(self) -> int:
        return max(self._fixed.room_blocks, self._fixed.most_blocks)

    def set_target(self, num_blocks: int) -> None:
        """By an operator: the pool gets so many blocks, within its bounds, or as many as there is memory for."""
        self._wish = math.inf if num_blocks >= self._fixed.most_blocks else max(num_blocks, self.least_blocks)
        self._follow("by request")

    def limit(self, most_blocks: int) -> None:
        """Another part of the budget that several models share: the pool may have so many blocks, as far as possible.

        It has them at once if the operator has set no smaller size, and if there is memory for them.
        """
        fixed = self._fixed
        most = min(max(most_blocks, self._pool.least_blocks), self._room)
        budget = fixed.budget + (most - fixed.most_blocks) * fixed.block
        self._fixed = replace(fixed, budget=budget, most_blocks=most, room_blocks=self._room)
        why = "another share of the memory"
        self._follow(why)
        if (lack := -self._budget_free()) > 0:
            self._reclaim(lack, why)

    def _follow(self, why: str) -> None:
        """The pool gets the size that is wanted now, or the one that there is memory for."""
        self._tell(_GREW)
        if self._target < self._pool.num_blocks:
            self._resize(self._target)
        while self._target > self._pool.num_blocks and self._grow():
            pass
        self._tell(why)

    def look(self, now: float | None = None) -> None:
        """To be called now and then, between two steps. `now`: on time.monotonic()."""
        now = time.monotonic() if now is None else now
        if now - self._looked < LOOK_INTERVAL:
            return
        self._looked = now
        if self._free and (wanted := to_reclaim(self._machine_free(), self._marks)):
            self._reclaim(math.ceil(wanted * self._share / self._ranks), "the machine is short of memory")
        elif not self._grow():  # one line, once it has all that it can have
            self._tell(_GREW)

    def lack(self, size: int) -> int:
        """Bytes that would be missing for so many of adapters after all that can be reclaimed was; 0: they can fit."""
        tail = (self._pool.num_blocks - self.least_blocks) * self._fixed.block
        return max(size - self._budget_free() - tail - self.adapters.idle(), 0)

    def make_room(self, size: int) -> bool:
        """For so many bytes of adapters: whether they fit into the budget now, after what they lacked was reclaimed.

        Nothing is, if that does not suffice.
        """
        if self.lack(size):
            return False
        if (lack := size - self._budget_free()) > 0:
            self._reclaim(lack, "adapters need memory")
        return size <= self._budget_free()

    def _budget_free(self) -> int:
        return self._fixed.budget - self.account().committed

    def _machine_free(self) -> int:
        """Less what was promised to the pool and not used yet."""
        assert self._free
        untouched = max(self._pool.num_blocks - self._pool.touched_blocks, 0)
        return self._free() - untouched * self._fixed.block * self._ranks

    def _grow(self) -> bool:
        """By a slab or more, if it lacks some and can have it."""
        block = self._fixed.block
        lacking = min(self._target - self._pool.num_blocks, self._budget_free() // block)
        if lacking <= 0:
            return False
        size = min(lacking, self._slab)
        if self._free:
            free, unit = self._machine_free(), int(block * self._ranks / self._share)  # if all grow at this moment
            if not to_give_back(free, self._marks, size * unit, size * unit):
                return False
            if not self._in_slabs:
                size = min(lacking, (free - self._marks.high) // unit)
        return self._resize(self._pool.num_blocks + size)

    def _reclaim(self, wanted: int, why: str) -> None:
        self._tell(_GREW)
        pool, block = self._pool, self._fixed.block
        most = pool.num_blocks - self.least_blocks
        free = min(pool.free_blocks, most)
        offers = {
            "free_blocks": free * block,
            "idle_adapters": self.adapters.idle(),
            "pool_tail": (most - free) * block,
        }
        taken = share_out(wanted, offers)
        blocks = min(self._slabs_of(taken["free_blocks"]), free)
        if taken["idle_adapters"]:
            self.reclaimed["idle_adapters"] += self.adapters.evict(taken["idle_adapters"])
        tail = min(self._slabs_of(taken["pool_tail"]), most - blocks)
        if blocks + tail and self._resize(pool.num_blocks - blocks - tail):
            self._tell(why)
            self.reclaimed["free_blocks"] += blocks * block
            self.reclaimed["pool_tail"] += tail * block

    def _slabs_of(self, size: int) -> int:
        """Blocks of so many bytes, in whole slabs."""
        return math.ceil(size / (self._fixed.block * self._slab)) * self._slab

    def _resize(self, num_blocks: int) -> bool:
        before, block = self._pool.num_blocks, self._fixed.block
        try:
            done = self._pool.resize(num_blocks)
        except GrowthError as error:
            self._wish = before
            what = "the KV cache stays at %d blocks (%s), until it is resized by request: no memory for %s on %s"
            log.warning(
                what, before, mib(before * block), mib(num_blocks * block), error, extra=event("kv_cache_resized")
            )
            return False
        if not done:
            log.warning("no memory for %s of KV cache", mib(num_blocks * block), extra=event("kv_cache_resized"))
            return False
        self.resizes += 1
        return True

    def _tell(self, why: str) -> None:
        """Logs what has changed since the last line, in however many steps."""
        before, now, block = self._told, self._pool.num_blocks, self._fixed.block
        if now != before:
            self._told = now
            what = "the KV cache has %d blocks (%s) instead of %d (%s): %s"
            sizes = now, mib(now * block), before, mib(before * block)
            log.info(what, *sizes, why, extra=event("kv_cache_resized"))
