"""engine/memory_manager.py on a pool of numbers: within budget and machine whatever comes, calm when nothing does."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidewright.engine import memory_manager
from tidewright.engine.memory_manager import GrowthError, MemoryManager
from tidewright.memory.account import FixedMemory
from tidewright.memory.reclaim import Watermarks

BLOCK = 10  # bytes


@dataclass
class NumberedPool:
    """Blocks that requests have, of which the last may be preempted."""

    num_blocks: int
    least_blocks: int
    used_blocks: int = 0
    cached_blocks: int = 0
    preempted: int = 0
    full: bool = False  # the device has no memory for more
    lacking: str = ""  # another rank, which has none
    sizes: list[int] = field(default_factory=list)

    @property
    def free_blocks(self) -> int:
        return self.num_blocks - self.used_blocks

    @property
    def wanted_blocks(self) -> int:
        return self.used_blocks

    @property
    def touched_blocks(self) -> int:
        return self.num_blocks

    def resize(self, num_blocks: int) -> bool:
        assert num_blocks >= self.least_blocks
        if self.full and num_blocks > self.num_blocks:
            return False
        if self.lacking and num_blocks > self.num_blocks:
            raise GrowthError(self.lacking)
        self.preempted += max(self.used_blocks - num_blocks, 0)
        self.used_blocks = min(self.used_blocks, num_blocks)
        self.cached_blocks = min(self.cached_blocks, num_blocks - self.used_blocks)
        self.num_blocks = num_blocks
        self.sizes.append(num_blocks)
        return True


@dataclass
class NumberedAdapters:
    held: int = 0
    unused: int = 0

    def used(self) -> int:
        return self.held

    def idle(self) -> int:
        return self.unused

    def evict(self, size: int) -> int:
        given = min(-(-size // 30) * 30, self.unused)  # whole adapters
        self.held -= given
        self.unused -= given
        return given


def manager(
    pool: NumberedPool,
    machine: list[int] | None = None,
    budget: int = 0,
    most: int = 0,
    wish: float = math.inf,
    room: int = 0,
) -> MemoryManager:
    """`machine`: free bytes beside the pool's blocks, all of which are in memory. Watermarks at 50 and 100 bytes."""
    most = most or pool.num_blocks
    fixed = FixedMemory(budget or 200 + most * BLOCK, 150, 50, BLOCK, most, room)
    free = (lambda: machine[0] - pool.num_blocks * BLOCK) if machine else None
    return MemoryManager(fixed, pool, wish, free, Watermarks(50, 100))


def looks(made: MemoryManager, count: int, start: float = 0.0) -> None:
    for number in range(1, count + 1):
        made.look(start + 1000.0 * number)


def test_when_the_machine_is_short_free_blocks_go_first_and_come_back_when_it_is_not() -> None:
    pool, machine = NumberedPool(160, 10, used_blocks=100), [1600 + 40]
    made = manager(pool, machine)
    looks(made, 5)
    assert pool.num_blocks == 150  # in slabs of ten, up to the high watermark
    assert (pool.preempted, made.reclaimed["free_blocks"], made.reclaimed["pool_tail"]) == (0, 100, 0)
    machine[0] += 400  # ten blocks more, and still as much free as it should be
    looks(made, 5, 1e6)
    assert pool.sizes == [150, 160]
    assert made.account().kv_target == 1600


def test_idle_adapters_go_before_what_requests_have() -> None:
    pool, machine = NumberedPool(160, 10, used_blocks=160), [1600 - 100]
    made = manager(pool, machine, budget=3000)
    made.adapters = NumberedAdapters(held=90, unused=60)
    looks(made, 1)
    assert made.adapters.used() == 30
    assert made.reclaimed == {"free_blocks": 0, "idle_adapters": 60, "pool_tail": 200}
    assert (pool.num_blocks, pool.preempted) == (140, 20)


def test_room_for_adapters_is_made_within_the_budget() -> None:
    pool = NumberedPool(160, 100, used_blocks=20)
    made = manager(pool)
    adapters = made.adapters = NumberedAdapters()
    assert made.make_room(555)
    assert pool.num_blocks == 100  # slabs
    adapters.held = 555
    assert made.lack(500) == 455
    assert not made.make_room(500)
    assert pool.num_blocks == 100
    looks(made, 5)
    assert pool.num_blocks == 104  # what the budget leaves
    assert made.account().committed <= made.account().budget
    adapters.held = 0
    looks(made, 20, 1e6)
    assert pool.num_blocks == 160


def test_what_will_not_suffice_for_an_adapter_is_not_taken_from_anybody() -> None:
    """A request that waits for its adapter asks again and again."""
    pool = NumberedPool(160, 100, used_blocks=160)
    made = manager(pool, budget=200 + 1600 + 60)
    adapters = made.adapters = NumberedAdapters(held=60, unused=30)
    for second in range(1, 5):
        assert not made.make_room(700)
        looks(made, 1, 1000.0 * second)
    assert (pool.sizes, pool.preempted, adapters.unused) == ([], 0, 30)


def test_a_size_that_an_operator_wants_is_kept_within_the_bounds() -> None:
    pool = NumberedPool(160, 100)
    made = manager(pool, [10_000], most=300, wish=160)
    made.set_target(50)
    assert pool.num_blocks == 100
    made.set_target(1000)
    assert pool.num_blocks == 300
    looks(made, 3)
    made.set_target(200)
    assert pool.num_blocks == 200
    looks(made, 3, 1e6)
    assert pool.num_blocks == 200
    pool.full = True
    made.set_target(250)
    assert pool.num_blocks == 200
    pool.full = False
    looks(made, 10, 2e6)
    assert pool.num_blocks == 250  # as soon as there is memory


def test_what_another_rank_has_no_memory_for_is_tried_again_by_request_only(caplog: pytest.LogCaptureFixture) -> None:
    """Each try has all ranks copy their layers."""
    pool = NumberedPool(100, 50, lacking="rank 1 (CUDA out of memory)")
    made = manager(pool, most=160)
    looks(made, 5)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "the KV cache stays at 100 blocks (0.0 MiB), until it is resized by request: no memory for 0.0 MiB on rank 1 "
        "(CUDA out of memory)"
    )
    assert (pool.sizes, made.account().kv_target, made.account().kv_wished) == ([], 1000, 1000)
    pool.lacking = ""
    looks(made, 5, 1e6)
    assert pool.sizes == []
    made.set_target(160)
    assert pool.num_blocks == 160


def test_what_an_operator_wished_outlasts_a_share_below_it() -> None:
    pool = NumberedPool(60, 20)
    made = manager(pool, most=60, room=300, wish=80)
    assert (made.account().target_blocks, made.account().wished_blocks) == (60, 80)
    made.limit(150)
    assert pool.num_blocks == 80
    made.set_target(150)
    assert made.account().wished_blocks == 0


def test_the_log_has_a_line_for_each_change_and_not_for_each_slab(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    def told() -> list[str]:
        lines = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return [line.removeprefix("the KV cache has ") for line in lines]

    pool, machine = NumberedPool(160, 10), [1600 + 40]
    made = manager(pool, machine)
    looks(made, 1)
    assert [line.split()[0] for line in told()] == ["150"]
    machine[0] += 1000
    looks(made, 20, 1e6)  # a slab at each
    assert pool.num_blocks == 160
    assert [(line.split()[0], line.partition(": ")[2]) for line in told()] == [("160", "there is memory again")]
    made.set_target(20)
    made.set_target(100)
    assert len(pool.sizes) > 8
    assert [(line.split()[0], line.partition(": ")[2]) for line in told()] == [
        ("20", "by request"),
        ("100", "by request"),
    ]
    looks(made, 5, 2e6)
    assert told() == []


def test_a_pool_that_is_copied_grows_at_once_by_all_that_there_is() -> None:
    """Each resize copies all of it, and has CUDA graphs recorded anew."""
    pool, machine = NumberedPool(100, 50), [3000]
    fixed = FixedMemory(10_000, 150, 50, BLOCK, 320)
    free, marks = (lambda: machine[0] - pool.num_blocks * BLOCK), Watermarks(0, 100)
    made = MemoryManager(fixed, pool, 100, free, marks, in_slabs=False)
    made.set_target(320)
    assert pool.sizes == [290]  # up to the high watermark
    machine[0] += 150
    looks(made, 5)
    assert pool.sizes == [290]  # less than a slab is not worth it
    machine[0] += 1000
    looks(made, 5, 1e6)
    assert pool.sizes == [290, 320]


def test_a_share_of_the_memory_changes_budget_and_pool_alike() -> None:
    pool = NumberedPool(160, 20, used_blocks=100)
    made = manager(pool, room=300)
    before = made.account()
    made.limit(120)
    account = made.account()
    assert (account.kv_most, account.kv_target, account.kv_pool) == (1200, 1200, 1200)
    assert before.budget - account.budget == 400
    assert account.kv_room == 3000
    made.limit(280)
    assert (pool.num_blocks, made.account().budget) == (280, before.budget + 1200)
    made.set_target(50)  # by an operator: so it stays
    for most, pool_size in ((200, 50), (30, 30), (200, 50)):
        made.limit(most)
        assert (pool.num_blocks, made.account().kv_room) == (pool_size, 500)
    made.set_target(200)
    made.limit(5)
    assert (pool.num_blocks, made.account().kv_most) == (20, 200)  # one request needs as much
    made.limit(1000)
    assert (pool.num_blocks, made.account().kv_most) == (300, 3000)


def test_a_smaller_share_takes_what_idle_adapters_have_of_it() -> None:
    pool = NumberedPool(140, 100)
    made = manager(pool, most=160, wish=140)
    adapters = made.adapters = NumberedAdapters(held=180, unused=180)
    assert made.account().adapters_in_pool == 180
    made.limit(110)
    account = made.account()
    assert (pool.num_blocks, adapters.held) == (100, 90)
    assert account.committed <= account.budget
    adapters.unused = 0  # requests have them: what is to go stays for a while, and the account says so
    made.limit(105)
    account = made.account()
    assert account.committed > account.budget


def test_engines_of_one_machine_make_up_for_a_shortage_together() -> None:
    """Each sees all of it at the same moment."""
    pools = [NumberedPool(320, 10), NumberedPool(320, 10)]
    machine = [6400 - 20]
    free = machine[0] - 6400
    made = [
        MemoryManager(
            FixedMemory(3400, 150, 50, BLOCK, 320), pool, math.inf, lambda: free, Watermarks(200, 400), share=0.5
        )
        for pool in pools
    ]
    looks(made[0], 1)
    looks(made[1], 1)
    given = 6400 - sum(pool.num_blocks * BLOCK for pool in pools)
    assert 420 <= given <= 420 + 2 * 20 * BLOCK  # slabs
    free = 380 + 400  # a slab of each would be above the high watermark, both would not
    looks(made[0], 1, 1e6)
    assert pools[0].num_blocks < 320


def test_it_looks_now_and_then_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_manager, "LOOK_INTERVAL", 1.0)
    pool = NumberedPool(160, 10)
    made = manager(pool, [1600 + 40])
    for tenth in range(10, 19):
        made.look(tenth / 10)
    assert len(pool.sizes) == 1


ACTIONS = st.one_of(
    st.tuples(st.just("machine"), st.integers(0, 3000)),
    st.tuples(st.just("requests"), st.integers(0, 200)),
    st.tuples(st.just("adapter"), st.integers(1, 600)),
    st.tuples(st.just("unload"), st.integers(1, 600)),
    st.tuples(st.just("target"), st.integers(0, 300)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTIONS, max_size=30), st.integers(1, 100), st.integers(0, 2000))
def test_whatever_happens_nothing_is_over_committed_and_then_all_is_calm(
    actions: list[tuple[str, int]], least: int, spare: int
) -> None:
    pool, machine = NumberedPool(120, least), [2500]
    made = manager(pool, machine, budget=200 + 120 * BLOCK + spare, most=120 + spare // BLOCK, wish=120)
    adapters = made.adapters = NumberedAdapters()
    now = 0.0
    for action, number in actions:
        if action == "machine":
            machine[0] = number
        elif action == "requests":
            pool.used_blocks = min(number, pool.num_blocks)
            pool.cached_blocks = (pool.num_blocks - pool.used_blocks) // 2
        elif action == "adapter" and made.make_room(number):
            adapters.held += number
            adapters.unused += number * (number % 2)
        elif action == "unload":
            adapters.held = max(adapters.held - number, 0)
            adapters.unused = min(adapters.unused, adapters.held)
        elif action == "target":
            made.set_target(number)
        for _ in range(3):
            now += 1000.0
            made.look(now)
            account = made.account()
            assert account.committed <= account.budget
            assert least * BLOCK <= account.kv_pool <= account.kv_most
            assert account.kv_used + account.kv_cached <= account.kv_pool == pool.num_blocks * BLOCK
    # Nothing changes any more: it gets where it goes, and stays.
    looks(made, 60, now)
    calm = list(pool.sizes)
    looks(made, 20, now + 1e6)
    assert pool.sizes == calm
    reached = pool.num_blocks * BLOCK
    free = machine[0] - reached
    assert free >= 50 or (pool.num_blocks == least and not adapters.unused)
