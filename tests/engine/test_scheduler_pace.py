"""Prompts beside running streams come on at a pace: engine/scheduler.py keeps it, tests/engine/test_latency.py finds
it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.scheduling import make, result, sequence, shape
from tidewright.engine.pace import Allowance, StepPace
from tidewright.engine.scheduler import Scheduler

PACES = st.builds(
    StepPace,
    seconds=st.floats(0, 1),
    token=st.floats(1e-6, 0.1),
    context=st.one_of(st.just(0.0), st.floats(1e-9, 1e-3)),
    least=st.integers(0, 8),
    most=st.integers(1, 40),
    running=st.integers(1, 6),
)


def step(scheduler: Scheduler, most: int) -> list[tuple[int, int, int, bool]]:
    plan = scheduler.schedule(StepPace(most=most))
    scheduler.commit(plan, result(plan))
    return shape(plan)


def test_a_prompt_beside_a_stream_keeps_the_pace() -> None:
    scheduler, _ = make(blocks=40, max_batched_tokens=64)
    scheduler.add(sequence(1, 3))
    assert step(scheduler, 5) == [(1, 0, 3, True)]
    scheduler.add(sequence(2, 20))
    assert step(scheduler, 5) == [(1, 3, 1, True), (2, 0, 5, False)]
    assert step(scheduler, 9) == [(1, 4, 1, True), (2, 5, 9, False)]
    assert step(scheduler, 9) == [(1, 5, 1, True), (2, 14, 6, True)]
    assert step(scheduler, 1) == [(1, 6, 1, True), (2, 20, 1, True)]


def test_without_a_stream_a_step_takes_the_whole_budget() -> None:
    scheduler, _ = make(blocks=40, max_batched_tokens=16)
    scheduler.add(sequence(1, 12))
    scheduler.add(sequence(2, 20))
    assert step(scheduler, 2) == [(1, 0, 12, True), (2, 0, 4, False)]
    scheduler.abort(1)
    assert step(scheduler, 2) == [(2, 4, 16, True)]


def test_several_prompts_share_it_in_their_order() -> None:
    scheduler, _ = make(blocks=40, max_batched_tokens=64, max_running=8)
    scheduler.add(sequence(1, 3))
    step(scheduler, 5)
    for request_id in (2, 3, 4):
        scheduler.add(sequence(request_id, 6))
    assert step(scheduler, 8) == [(1, 3, 1, True), (2, 0, 6, True), (3, 0, 2, False)]
    assert scheduler.stats().waiting == 1  # no blocks are taken for one that would stand still
    assert step(scheduler, 8) == [(1, 4, 1, True), (2, 6, 1, True), (3, 2, 4, True), (4, 0, 4, False)]


def test_one_whose_cached_prefix_makes_it_too_dear_is_not_admitted() -> None:
    """There was time for tokens of a prompt's beginning, so it was: to stand still, and then a second time."""
    scheduler, pool = make(blocks=40, max_batched_tokens=64, prefix_caching=True)
    scheduler.add(sequence(1, 41, max_tokens=1))
    step(scheduler, 1)
    scheduler.add(sequence(2, 3))
    step(scheduler, 1)
    scheduler.add(sequence(3, 44))  # 40 are cached
    free = pool.num_free
    for seconds, expected in ((1.0, []), (10.0, [(3, 40, 2, False)])):
        # A token of 0.1 s, and 0.1 s more for each before it: the first three cost 0.75 s, the 41st alone 4.15 s.
        plan = scheduler.schedule(StepPace(seconds=seconds, token=0.1, context=0.1))
        assert shape(plan)[1:] == expected
        assert expected or pool.num_free >= free - 1
        scheduler.commit(plan, result(plan))


def test_a_more_urgent_prompt_takes_it_first() -> None:
    scheduler, _ = make(blocks=40, max_batched_tokens=64)
    scheduler.add(sequence(1, 3))
    step(scheduler, 5)
    scheduler.add(sequence(2, 20))
    assert step(scheduler, 5) == [(1, 3, 1, True), (2, 0, 5, False)]
    scheduler.add(sequence(3, 5, priority=-1))
    assert step(scheduler, 5) == [(3, 0, 5, True), (1, 4, 1, True)]
    assert step(scheduler, 5) == [(3, 5, 1, True), (1, 5, 1, True), (2, 5, 5, False)]


def test_later_parts_of_a_prompt_cost_more_so_they_are_smaller() -> None:
    scheduler, _ = make(blocks=40, max_batched_tokens=64)
    scheduler.add(sequence(1, 3))
    step(scheduler, 5)
    scheduler.add(sequence(2, 40))
    pace = StepPace(seconds=1.0, token=0.05, context=0.01)
    counts = []
    for _ in range(6):
        plan = scheduler.schedule(pace)
        scheduler.commit(plan, result(plan))
        counts.append(plan.sequences[1].count)
    # 10 tokens cost 10 * 0.05 + 0.01 * 10**2 / 2 = 1 s; 5 behind them 5 * 0.05 + 0.01 * (10 * 5 + 5**2 / 2) = 0.875 s.
    assert counts == [10, 5, 4, 3, 3, 3]


def test_while_enough_run_a_more_urgent_request_takes_another_s_place() -> None:
    scheduler, _ = make(blocks=40, max_batched_tokens=64)
    for request_id in (1, 2, 3):
        scheduler.add(sequence(request_id, 3))
    pace = StepPace(running=2)
    plan = scheduler.schedule(pace)
    scheduler.commit(plan, result(plan))
    assert [planned.request_id for planned in plan.sequences] == [1, 2]
    scheduler.add(sequence(4, 3, priority=-1))
    assert [planned.request_id for planned in scheduler.schedule(pace).sequences] == [4, 1]
    assert scheduler.stats().preemptions == 1


def test_when_fewer_may_run_than_do_none_is_preempted_for_it() -> None:
    scheduler, _ = make(blocks=40, max_batched_tokens=64)
    for request_id in (1, 2, 3):
        scheduler.add(sequence(request_id, 3))
    plan = scheduler.schedule()
    scheduler.commit(plan, result(plan))
    scheduler.add(sequence(4, 3))
    plan = scheduler.schedule(StepPace(running=1))
    scheduler.commit(plan, result(plan))
    assert [planned.request_id for planned in plan.sequences] == [1, 2, 3]
    scheduler.add(sequence(5, 3, priority=-1))
    assert [planned.request_id for planned in scheduler.schedule(StepPace(running=1)).sequences] == [5, 1, 2]


@settings(max_examples=200, deadline=None)
@given(pace=PACES, starts=st.lists(st.integers(0, 8000), min_size=1, max_size=5))
def test_what_is_allowed_is_the_most_that_its_seconds_pay_for(pace: StepPace, starts: list[int]) -> None:
    allowance, seconds, given = Allowance(pace, beside_streams=True), pace.seconds, 0
    for start in starts:
        count = allowance.tokens(start, claims=True)
        assert 0 <= count <= pace.most - given
        paid = next(n for n in range(pace.most + 1) if n == pace.most or cost(pace, start, n + 1) > seconds + 1e-9)
        expected = min(max(paid, pace.least - given), pace.most - given)
        assert abs(count - expected) <= (cost(pace, start, expected) > seconds - 1e-9)  # at the edge: rounding
        allowance.take(start, count)
        seconds, given = seconds - cost(pace, start, count), given + count


def cost(pace: StepPace, start: int, count: int) -> float:
    """Token by token, each at the middle of its own place."""
    return sum(pace.token + pace.context * (start + number + 0.5) for number in range(count))


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30), st.integers(0, 2)), min_size=1, max_size=8),
    paces=st.lists(PACES, min_size=1, max_size=8),
    blocks=st.integers(12, 40),
)
def test_streams_never_wait_for_more_than_the_pace_and_ranks_agree_on_it(
    prompts: list[tuple[int, int, int]], paces: list[StepPace], blocks: int
) -> None:
    changes = {"max_batched_tokens": 32, "max_running": 6, "max_model_len": 48}
    (scheduler, pool), (rank, _) = make(blocks, **changes), make(blocks, **changes)
    ended = now = 0
    while ended < len(prompts):
        for request_id, (length, arrives, priority) in enumerate(prompts):
            if arrives == now:
                scheduler.add(sequence(request_id, length, max_tokens=8, priority=priority))
                rank.add(sequence(request_id, length, max_tokens=8, priority=priority))
        waiting = {running.request_id for running in scheduler.running if running.decodes}
        pace = msgspec.structs.replace(paces[now % len(paces)], least=max(paces[now % len(paces)].least, 1))
        plan = scheduler.schedule(pace)
        sent = msgspec.msgpack.decode(msgspec.msgpack.encode(pace), type=StepPace)
        assert plan == rank.schedule(sent)
        assert bool(plan.sequences) == scheduler.has_work
        chunks = [planned for planned in plan.sequences if planned.request_id not in waiting]
        if waiting and (total := sum(planned.count for planned in chunks)) > pace.least:
            assert total <= pace.most
            assert sum(cost(pace, planned.start, planned.count) for planned in chunks) <= pace.seconds + 1e-9
        outputs = scheduler.commit(plan, result(plan))
        rank.commit(plan, result(plan))
        scheduler.check_integrity()
        ended += sum(output.finish_reason is not None for output in outputs)
        now += 1
        assert now < 10_000
    assert pool.num_free == blocks


@pytest.mark.parametrize("pace", [StepPace(), StepPace(seconds=1.0), StepPace(context=1e-300, seconds=1e-300)])
def test_what_costs_nothing_has_no_bound_but_the_most(pace: StepPace) -> None:
    assert Allowance(msgspec.structs.replace(pace, most=77), beside_streams=True).tokens(0, claims=True) == 77
