"""engine/grammar_turns.py: no tenant's grammars keep another's waiting, whatever they cost."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tidewright.engine.grammar_turns import GrammarTurns
from tidewright.engine.messages import Submit
from tidewright.schema import SamplingParams


class World:
    def __init__(self) -> None:
        self.turns = GrammarTurns()
        self.served: Counter[str] = Counter()
        self._number = 0

    def put(self, tenant: str = "", weight: int = 1, priority: int = 0) -> int:
        self._number += 1
        sampling = SamplingParams(guided_regex="a", tenant=tenant, tenant_weight=weight, priority=priority)
        self.turns.put(Submit(self._number, [1], sampling))
        return self._number

    def make(self, cost: int = 1) -> Submit:
        request = self.turns.take()
        self.turns.made(cost)
        self.served[request.sampling.tenant] += cost
        return request

    def order(self, cost: int = 1) -> list[int]:
        return [self.make(cost).request_id for _ in range(len(self.turns))]


def test_without_tenants_they_are_made_as_they_come_and_urgent_ones_first() -> None:
    world = World()
    plain = [world.put() for _ in range(4)]
    urgent = [world.put(priority=-1) for _ in range(2)]
    assert world.order() == [*urgent, *plain]


def test_one_behind_a_flood_is_next_after_the_one_that_is_made() -> None:
    world = World()
    for _ in range(100):
        world.put("flood")
    for _ in range(20):
        world.make(1000)
    taken = world.turns.take()
    assert taken.sampling.tenant == "flood"
    quiet = world.put("quiet")
    world.turns.made(1000)
    assert world.make(1000).request_id == quiet


def test_ever_new_tenants_keep_nobody_waiting() -> None:
    world = World()
    old = [world.put("old") for _ in range(10)]
    made = []
    for number in range(100):
        world.put(f"new {number}")
        made.append(world.make(10).request_id)
    assert set(old) <= set(made)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=5),
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=5, max_size=60),
)
def test_time_is_shared_by_weight_within_the_costliest_grammar_of_each(
    weights: list[int], costs: list[tuple[int, int]]
) -> None:
    """All of them always wait; the first tenant's grammars cost other times than those of the others."""
    world = World()
    for tenant, weight in enumerate(weights):
        for _ in costs:
            world.put(f"{tenant}", weight)
    for first, other in costs:
        request = world.turns.take()
        cost = 20 * first if request.sampling.tenant == "0" else other
        world.turns.made(cost)
        world.served[request.sampling.tenant] += cost
    shares = [world.served[f"{tenant}"] / weight for tenant, weight in enumerate(weights)]
    most = max(20 * first for first, _ in costs)
    assert max(shares) - min(shares) <= most + max(other for _, other in costs)


def test_nothing_is_kept_of_tenants_whose_grammars_are_made() -> None:
    world = World()
    for number in range(50):
        world.put(f"{number}", priority=number % 3)
    world.order(7)
    assert (len(world.turns), world.turns._queue.num_accounts, world.turns._requests) == (0, 0, {})
