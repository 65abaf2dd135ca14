"""Prompts beside running streams come on at a pace: engine/pace.py finds it, engine/scheduler.py keeps it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.scheduling import make, result, sequence, shape
from tidewright.engine import pace
from tidewright.engine.pace import Pace
from tidewright.engine.plan import ScheduledSequence, StepPlan
from tidewright.engine.scheduler import Scheduler


def step(scheduler: Scheduler, pace: int) -> list[tuple[int, int, int, bool]]:
    plan = scheduler.schedule(pace)
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


def test_a_more_urgent_prompt_takes_it_first() -> None:
    scheduler, _ = make(blocks=40, max_batched_tokens=64)
    scheduler.add(sequence(1, 3))
    step(scheduler, 5)
    scheduler.add(sequence(2, 20))
    assert step(scheduler, 5) == [(1, 3, 1, True), (2, 0, 5, False)]
    scheduler.add(sequence(3, 5, priority=-1))
    assert step(scheduler, 5) == [(3, 0, 5, True), (1, 4, 1, True)]
    assert step(scheduler, 5) == [(3, 5, 1, True), (1, 5, 1, True), (2, 5, 5, False)]


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30), st.integers(0, 2)), min_size=1, max_size=8),
    paces=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    blocks=st.integers(12, 40),
)
def test_streams_never_wait_for_more_prompt_tokens_than_the_pace(
    prompts: list[tuple[int, int, int]], paces: list[int], blocks: int
) -> None:
    scheduler, pool = make(blocks, max_batched_tokens=32, max_running=6, max_model_len=48)
    ended = now = 0
    while ended < len(prompts):
        for request_id, (length, arrives, priority) in enumerate(prompts):
            if arrives == now:
                scheduler.add(sequence(request_id, length, max_tokens=8, priority=priority))
        waiting = {running.request_id for running in scheduler._running if running.decodes}
        number = paces[now % len(paces)]
        plan = scheduler.schedule(number)
        assert bool(plan.sequences) == scheduler.has_work
        if waiting & {planned.request_id for planned in plan.sequences}:
            assert sum(planned.count for planned in plan.sequences if planned.request_id not in waiting) <= number
        outputs = scheduler.commit(plan, result(plan))
        scheduler.check_integrity()
        ended += sum(output.finish_reason is not None for output in outputs)
        now += 1
        assert now < 10_000
    assert pool.num_free == blocks


def computed(count: int) -> StepPlan:
    return StepPlan((ScheduledSequence(1, 0, (0,) * count, ()),))


def test_the_pace_follows_what_tokens_cost() -> None:
    made = Pace(0.25, 2048)
    assert made.tokens == pace.FIRST
    made.computed(computed(256), 0.256)  # a millisecond each
    assert made.tokens == 250
    for _ in range(20):  # a long context
        made.computed(computed(made.tokens), 0.002 * made.tokens)
    assert made.tokens == pytest.approx(125, abs=1)
    for _ in range(20):
        made.computed(computed(made.tokens), 0.00001 * made.tokens)
    assert made.tokens == 2048
    for _ in range(20):
        made.computed(computed(made.tokens), 1.0 * made.tokens)
    assert made.tokens == pace.LEAST


def test_a_step_of_streams_alone_says_nothing_about_prompts() -> None:
    made = Pace(0.25, 2048)
    made.computed(computed(500), 0.5)
    made.computed(StepPlan(tuple(ScheduledSequence(i, 9, (0,), ()) for i in range(64))), 5.0)
    assert made.tokens == 250


@pytest.mark.parametrize(("seconds", "most", "tokens"), [(0.0, 2048, 2048), (0.25, 40, 40)])
def test_there_may_be_none_and_it_is_never_above_a_steps_budget(seconds: float, most: int, tokens: int) -> None:
    made = Pace(seconds, most)
    assert made.tokens == tokens
    made.computed(computed(most), 100.0)
    assert made.tokens == (2048 if not seconds else 40)
