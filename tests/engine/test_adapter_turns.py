"""engine/adapter_turns.py in the scheduler: no tenant's adapters keep another's waiting for a slot."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tenants import Tenants, make_tenants
from tidewright.engine.plan import StepPlan

BLOCK = 4  # tokens, as of make_tenants
LONG = 40


class Adapters:
    """Tenants with adapters of their own, and which slots they have: from the plans."""

    def __init__(self, slots: int, *tenants: str, weights: dict[str, int] | None = None, running: int = 16) -> None:
        self.tenants: Tenants = make_tenants(
            weights, max_running=running, max_batched_tokens=64, adapter_slots=slots, max_model_len=LONG + 10
        )
        for name in (f"{tenant}{number}" for tenant in tenants for number in range(8)):
            self.tenants.scheduler.adapters.add(name, f"digest of {name}")
        self._numbers = {tenant: cycle(range(8)) for tenant in tenants}
        self._adapter_of: dict[int, str] = {}
        self._in_slot: dict[int, str] = {}
        self.slots, self.preempted = slots, 0

    def send(self, tenant: str, output: int = LONG, **params: object) -> int:
        """Each of a tenant is for its next adapter."""
        adapter = f"{tenant}{next(self._numbers[tenant])}"
        request = self.tenants.send(tenant, 3, output, adapter, **params)
        self._adapter_of[request] = adapter
        return request

    def step(self) -> StepPlan:
        plan = self.tenants.step()
        self._in_slot |= dict(plan.adapters)
        for planned in plan.sequences:
            assert self._in_slot[planned.adapter] == self._adapter_of[planned.request_id]
        assert not set(plan.preempted) & {planned.request_id for planned in plan.sequences}
        self.preempted += len(plan.preempted)
        return plan

    def held(self, plan: StepPlan) -> Counter[str]:
        """Slots by tenant."""
        adapters: defaultdict[str, set[str]] = defaultdict(set)
        for planned in plan.sequences:
            adapter = self._adapter_of[planned.request_id]
            adapters[adapter[:-1]].add(adapter)
        return Counter({tenant: len(names) for tenant, names in adapters.items()})


def test_a_flood_for_many_adapters_in_front_delays_nobody() -> None:
    world = Adapters(4, "flood", "quiet")
    for _ in range(100):
        world.send("flood")
    for _ in range(5):
        assert world.held(world.step()) <= Counter(flood=4)
    quiet = world.send("quiet")
    plan = world.step()
    assert quiet in {planned.request_id for planned in plan.sequences}
    assert world.held(plan) == Counter(flood=3, quiet=1)
    assert len({world._adapter_of[request] for request in plan.preempted}) == 1  # nobody else makes room


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, LONG), st.integers(1, 6)), min_size=1, max_size=3),
    st.integers(1, 2),
    st.integers(0, 20),
)
def test_one_with_no_slot_gets_one_from_whoever_has_several(
    floods: list[tuple[int, int]], more: int, before: int
) -> None:
    """Whatever they send. One that was preempted itself has to come on first, by a block of tokens."""
    names = [f"flood {number} " for number in range(len(floods))]
    world = Adapters(len(floods) + more, *names, "quiet")
    for now in range(before + 2 * BLOCK + 2):
        for name, (output, count) in zip(names, floods, strict=True):
            while world.tenants.waiting[name] < 8:
                for _ in range(count):
                    world.send(name, output)
        if now == before:
            quiet = world.send("quiet", LONG)
        if now >= before and quiet in {planned.request_id for planned in world.step().sequences}:
            return
        if now < before:
            world.step()
    raise AssertionError("it waits for a slot still")


@pytest.mark.parametrize(("weight", "shares"), [(1, Counter(a=2, b=2)), (3, Counter(a=1, b=3))])
def test_slots_are_shared_by_weight_and_stay_where_they_are_then(weight: int, shares: Counter[str]) -> None:
    world = Adapters(4, "a", "b", weights={"b": weight})

    def steps(count: int) -> StepPlan:
        for _ in range(count):
            for name in "ab":
                while world.tenants.waiting[name] < 8:
                    world.send(name)
            plan = world.step()
        return plan

    assert world.held(steps(LONG // 2)) == shares
    preempted, ended = world.preempted, world.tenants.ended.total()
    steps(5 * LONG)
    assert world.preempted - preempted <= world.tenants.ended.total() - ended  # else they would take turns for nothing


def test_a_more_urgent_one_gets_a_slot_at_once() -> None:
    world = Adapters(1, "a")
    for _ in range(3):
        world.send("a")
    world.step()
    urgent = world.send("a", priority=-1)
    plan = world.step()
    assert urgent in {planned.request_id for planned in plan.sequences}
    assert plan.preempted == (0,)
    late = world.send("a", priority=1)
    for _ in range(10):
        assert late not in {planned.request_id for planned in world.step().sequences}
    while world.tenants.scheduler.has_work:
        world.step()


def test_one_tenant_alone_preempts_nothing_of_its_own_for_a_slot() -> None:
    world = Adapters(2, "a")
    for _ in range(20):
        world.send("a", 6)
    while world.tenants.scheduler.has_work:
        world.step()
    assert (world.preempted, world.tenants.ended["a"]) == (0, 20)
