"""When requests got how far, as the engine tells it: a clock of the test's own, and a real scheduler."""

from __future__ import annotations

from helpers.scheduling import make, result
from tidewright.engine.messages import SequenceOutput
from tidewright.engine.plan import StepPlan
from tidewright.engine.sequence import Sequence
from tidewright.engine.timing import MAX_PREEMPTIONS, Timing
from tidewright.schema import SamplingParams


def test_chunks_first_tokens_and_preemptions() -> None:
    scheduler, _ = make(blocks=5, max_running=2, max_batched_tokens=8, block_size=4)
    timing, told = Timing(), {}
    for request_id in (1, 2):
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        scheduler.add(Sequence(request_id, [request_id] * 4, params))
        timing.arrived(request_id, 0.5)
    now, preempted = 1.0, {1: 0, 2: 0}
    while scheduler.has_work:
        plan = scheduler.schedule()
        for request_id in plan.preempted:
            preempted[request_id] += 1
        outputs = scheduler.commit(plan, result(plan))
        timing.planned(plan, now)
        for output in outputs:
            if times := timing.told(output, now + 0.25).times:
                told.setdefault(output.request_id, []).append(times)
        now += 1
    timing.planned(scheduler.schedule(), now)
    first = told[1][0]
    assert (first.began, first.chunks, first.first_token) == (1.0, 1, 1.25)
    assert preempted[2] == scheduler.stats().preemptions > 0
    assert sum(len(times.preempted) for times in told[2]) == preempted[2]
    assert (timing._waiting, timing._preempted) == ({}, {})


def test_the_wait_is_told_once_and_preemptions_are_bounded() -> None:
    timing = Timing()
    timing.arrived(1, 0.5)
    for now in range(100):
        timing.planned(StepPlan((), preempted=(1,)), float(now))
    timing.planned(StepPlan((), ended=(2,)), 100.0)
    timing.planned(StepPlan((), ended=(3,), preempted=(3,)), 100.0)  # it ended after its preemption
    output = timing.told(SequenceOutput(1, [5]), 101.0)
    assert output.times is not None
    assert len(output.times.preempted) == MAX_PREEMPTIONS
    again = SequenceOutput(1, [5])
    assert timing.told(again, 102.0) is again
    assert timing._preempted == {}
