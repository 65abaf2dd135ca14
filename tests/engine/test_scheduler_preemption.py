"""engine/scheduler.py preempts only if that lets in, or lets go on, the one for which it does."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.scheduling import make, result, shape, step
from tidewright.engine.plan import StepPlan
from tidewright.engine.scheduler import Scheduler
from tidewright.engine.sequence import Sequence
from tidewright.schema import SamplingParams

FIRST = 10  # tokens from here on are of one sequence only


def sequence(request_id: int, prompt: int, common: int = 0, **params: object) -> Sequence:
    """`common`: tokens at its beginning that are the same for all."""
    own = [FIRST + (7 * request_id + i) % 80 for i in range(prompt - common)]
    return Sequence(request_id, [1 + i % 5 for i in range(common)] + own, SamplingParams(**params))  # type: ignore[arg-type]


def ids(plan: StepPlan) -> list[int]:
    return [planned.request_id for planned in plan.sequences]


def preemptions(scheduler: Scheduler) -> int:
    return scheduler.stats().preemptions


def test_one_that_would_not_fit_even_so_preempts_nobody() -> None:
    """Six small streams stood still behind a large prompt that could not run for another's blocks."""
    scheduler, pool = make(blocks=68, max_running=16, max_batched_tokens=512, max_model_len=512)
    scheduler.add(
        sequence(0, 60, priority=0, max_tokens=200, ignore_eos=True)
    )  # 15 blocks, and more with each 4 tokens
    for request_id in range(1, 7):
        scheduler.add(sequence(request_id, 5, priority=2, max_tokens=200, ignore_eos=True))
    assert ids(step(scheduler)[0]) == [0, 1, 2, 3, 4, 5, 6]
    scheduler.add(sequence(9, 216, priority=1))  # 54 blocks of the 53 that number 0 leaves
    for _ in range(20):
        assert ids(step(scheduler)[0]) == [0, 1, 2, 3, 4, 5, 6]
    assert preemptions(scheduler) == 0
    scheduler.abort(0)
    plan, _ = step(scheduler)
    assert ids(plan)[0] == 9
    assert preemptions(scheduler) > 0
    assert pool.num_free >= len(plan.sequences)


def test_no_more_are_preempted_than_it_takes() -> None:
    scheduler, _ = make(blocks=13, max_running=8, max_batched_tokens=64)
    for request_id in range(4):
        scheduler.add(sequence(request_id, 8, priority=1))  # two blocks each, and soon three
    step(scheduler)
    scheduler.add(sequence(9, 16, priority=0))  # four, and one for each of the others that run
    assert ids(step(scheduler)[0]) == [9, 0, 1, 2]
    assert preemptions(scheduler) == 1


def test_a_place_among_the_running_is_worth_one_preemption() -> None:
    scheduler, _ = make(blocks=40, max_running=3)
    for request_id in range(3):
        scheduler.add(sequence(request_id, 2, priority=1))
    step(scheduler)
    scheduler.add(sequence(9, 2, priority=0))
    assert ids(step(scheduler)[0]) == [9, 0, 1]
    assert preemptions(scheduler) == 1


def test_blocks_that_others_share_count_only_when_their_last_holder_goes() -> None:
    scheduler, _ = make(blocks=12, max_running=8, max_batched_tokens=64, prefix_caching=True)
    for request_id in range(3):
        scheduler.add(sequence(request_id, 18, common=16, priority=2 * bool(request_id)))  # four in common, one each
    step(scheduler)
    # Five are free. Without 1 and 2 it would be seven, not fifteen: 0 has those in common, and is more important.
    scheduler.add(sequence(9, 28, priority=1))
    assert ids(step(scheduler)[0]) == [0, 1, 2]
    assert preemptions(scheduler) == 0
    scheduler.abort(0)
    # Without 2 it is seven, which leave none for 1; without both it is eleven.
    assert ids(step(scheduler)[0]) == [9]
    assert preemptions(scheduler) == 2


def test_one_that_shares_the_blocks_of_those_it_preempts_needs_them_itself() -> None:
    scheduler, _ = make(blocks=8, max_running=8, max_batched_tokens=64, prefix_caching=True)
    scheduler.add(sequence(1, 26, common=24, priority=1, max_tokens=2))  # seven blocks, six of them in common
    step(scheduler)
    scheduler.add(
        sequence(9, 28, common=24, priority=0, max_tokens=2)
    )  # the six, and one; one is free, and none left for the other
    plan, _ = step(scheduler)
    assert shape(plan) == [(9, 24, 4, True)]
    assert preemptions(scheduler) == 1


def test_shared_blocks_that_a_preemption_frees_are_not_free_for_anything_else() -> None:
    scheduler, _ = make(blocks=9, max_running=8, max_batched_tokens=64, prefix_caching=True)
    scheduler.add(sequence(0, 2, priority=0, max_tokens=2))
    scheduler.add(sequence(1, 26, common=24, priority=1, max_tokens=2))
    step(scheduler)
    # Without 1, its own block and a free one are there for the two that are not in common: none is left for 0.
    scheduler.add(sequence(9, 30, common=24, priority=0, max_tokens=2))
    assert ids(step(scheduler)[0]) == [0, 1]
    assert preemptions(scheduler) == 0


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: int
    common: int
    max_tokens: int
    priority: int


@dataclass(frozen=True)
class Workload:
    blocks: int
    config: dict[str, object]
    arrivals: list[Arrival]


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    block_size, blocks = draw(st.integers(1, 4)), draw(st.integers(4, 16))
    room = block_size * blocks
    arrivals = [
        Arrival(
            step=draw(st.integers(0, 12)),
            prompt=(prompt := draw(st.integers(1, room))),
            common=draw(st.integers(0, prompt - 1)),
            max_tokens=draw(st.integers(1, 12)),
            priority=draw(st.integers(0, 2)),
        )
        for _ in range(draw(st.integers(2, 10)))
    ]
    config: dict[str, object] = {
        "block_size": block_size,
        "max_batched_tokens": draw(st.integers(6, 40)),
        "max_running": draw(st.integers(1, 6)),
        "max_model_len": room + 1,
        "prefix_caching": draw(st.booleans()),
        "speculative_tokens": draw(st.integers(0, 2)),
    }
    return Workload(blocks, config, arrivals)


@settings(max_examples=300, deadline=None)
@given(workloads())
def test_whoever_is_preempted_makes_room_for_a_more_important_one_in_the_same_step(work: Workload) -> None:
    scheduler, pool = make(work.blocks, **work.config)
    done, priorities = 0, {request_id: arrival.priority for request_id, arrival in enumerate(work.arrivals)}
    for now in range(10_000):
        for request_id, arrival in enumerate(work.arrivals):
            if arrival.step == now:
                params = {"max_tokens": arrival.max_tokens, "priority": arrival.priority, "ignore_eos": True}
                scheduler.add(sequence(request_id, arrival.prompt, arrival.common, **params))
        running = {each.request_id for each in scheduler.running}
        free, before = pool.num_free, preemptions(scheduler)
        plan = scheduler.schedule()
        victims = running - {each.request_id for each in scheduler.running}
        assert len(victims) == preemptions(scheduler) - before
        if victims:
            admitted = [request_id for request_id in ids(plan) if request_id not in running]
            fresh = sum(len(planned.new_blocks) for planned in plan.sequences)
            # What the victims had was used: for one that is more important, or for more blocks than were free.
            assert admitted or fresh > free
            assert all(priorities[victim] > priorities[winner] for victim in victims for winner in admitted)
        assert bool(plan.sequences) == scheduler.has_work
        outputs = scheduler.commit(plan, result(plan))
        scheduler.check_integrity()
        done += sum(output.finish_reason is not None for output in outputs)
        if done == len(work.arrivals):
            break
    assert done == len(work.arrivals)
    assert pool.num_free == pool.num_blocks


def test_what_an_undone_plan_told_the_runner_is_told_again() -> None:
    scheduler, pool = make(max_batched_tokens=16)
    for request_id in range(3):
        scheduler.add(sequence(request_id, 6, max_tokens=20, ignore_eos=True))
    step(scheduler)
    scheduler.abort(0)
    plan = scheduler.schedule()
    assert (plan.ended, ids(plan)) == ((0,), [1, 2])
    scheduler.undo([plan])
    assert pool.num_free == pool.num_blocks
    again = scheduler.schedule()
    assert (again.ended, again.preempted) == ((0,), (2, 1))
    assert [planned.first_block for planned in again.sequences] == [0]
    assert shape(again) == [(1, 0, 1, False)]  # of two tokens, one; there were two in the plan before
    assert scheduler.stats().steps_out_of_memory == 1
