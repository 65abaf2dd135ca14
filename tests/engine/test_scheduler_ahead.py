"""Steps planned while others are in flight: a plan without sequences, which only rank 0 makes, changes nothing."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from operator import methodcaller

import pytest

from helpers.scheduling import make, result, sequence, shape
from tidewright.engine.limits import RequestRefusedError
from tidewright.engine.pace import StepPace
from tidewright.engine.plan import StepPlan
from tidewright.engine.scheduler import Scheduler
from tidewright.engine.sequence import Sequence
from tidewright.schema import SamplingParams

SIZES = 6, 8, 12, 60  # blocks; the first is enough for the longest request


class Ranks:
    """Rank 0, and one that gets what rank 0 did before each of its steps."""

    def __init__(self) -> None:
        changes = {"max_batched_tokens": 64, "max_running": 3, "max_model_len": 24, "prefix_caching": True}
        self.lead, self.other = (make(SIZES[-1], **changes, adapter_slots=1)[0] for _ in range(2))
        self.in_flight: deque[StepPlan] = deque()
        self.empty = 0
        self._inputs: list[Callable[[Scheduler], object]] = []
        for name in ("x", "y"):
            self.do(lambda scheduler, name=name: scheduler.adapters.add(name, name))  # type: ignore[misc]

    def do(self, change: Callable[[Scheduler], object]) -> None:
        change(self.lead)
        self._inputs.append(change)

    def step(self, pace: StepPace) -> None:
        while not self.in_flight or (len(self.in_flight) < 2 and self.lead.may_run_ahead):
            running = [*self.lead.running]
            plan = self.lead.schedule(pace)
            if not plan.sequences:
                assert [*self.lead.running] == running
                self.empty += 1
                break
            for change in self._inputs:
                change(self.other)
            self._inputs.clear()
            assert self.other.schedule(pace) == plan
            assert all(4 * len(each.block_table) >= each.num_computed for each in self.lead.running)
            self.in_flight.append(plan)
        if self.in_flight:
            plan = self.in_flight.popleft()
            self.do(lambda scheduler: scheduler.commit(plan, result(plan)))


@pytest.mark.parametrize("seed", range(30))
def test_ranks_agree_on_plans_though_one_makes_empty_ones_in_between(seed: int) -> None:
    rng, ranks, request_id = random.Random(seed), Ranks(), 0
    for _ in range(150):
        for _ in range(rng.choice([0, 0, 1, 1, 2])):
            request_id += 1
            params = SamplingParams(
                max_tokens=rng.choice([1, 2, 3]),
                ignore_eos=True,
                tenant=rng.choice("abcdef"),
                tenant_weight=rng.choice([1, 2, 4]),
            )
            length, adapter = rng.choice([1, 5, 20]), rng.choice(["", "", "x", "y"])
            new = request_id, [rng.randrange(3)] * length, params, adapter

            def add(scheduler: Scheduler, new: tuple[int, list[int], SamplingParams, str] = new) -> None:
                scheduler.add(Sequence(*new[:3], adapter=new[3]))

            try:
                ranks.do(add)
            except RequestRefusedError:
                continue
        if rng.random() < 0.1:
            ranks.do(methodcaller("abort", rng.randint(1, request_id + 1)))
        if rng.random() < 0.2:
            ranks.do(methodcaller("resize", rng.choice(SIZES)))
        ranks.step(StepPace(seconds=1.0, token=0.1, context=rng.choice([0.0, 0.1]), least=rng.choice([0, 16])))
        waiting = ranks.lead.waiting
        assert waiting.first() is next(waiting.in_order(), None)
        ranks.lead.check_integrity()
    assert ranks.empty


def test_one_that_a_resize_preempts_waits_for_the_token_that_is_in_flight() -> None:
    """Else it gets blocks for the tokens that are known, and computes one more."""
    scheduler, _ = make(64, max_batched_tokens=64, max_model_len=32)
    for request_id, length in enumerate((12, 12, 12, 11)):
        scheduler.add(sequence(request_id, length, max_tokens=20, ignore_eos=True))
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.commit(first, result(first))
    scheduler.resize(9)
    scheduler.resize(64)
    assert [(each.request_id, each.num_pending) for each in scheduler.waiting.in_order()] == [(2, 1), (3, 1)]
    third = scheduler.schedule()
    assert shape(third) == [(0, 13, 1, True), (1, 13, 1, True)]
    scheduler.commit(second, result(second))
    assert shape(scheduler.schedule())[2:] == [(2, 0, 14, True), (3, 0, 13, True)]
    for each in scheduler.running:
        assert 4 * len(each.block_table) >= each.num_computed
