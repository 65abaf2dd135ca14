"""engine/scheduler.py: hand-made cases, and properties over random workloads on tiny pools."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidewright.engine.messages import SequenceOutput
from tidewright.engine.plan import StepPlan, StepResult
from tidewright.engine.scheduler import RequestRefusedError, Scheduler, SchedulerConfig
from tidewright.engine.sequence import Sequence
from tidewright.kv_cache.block_pool import BlockPool
from tidewright.schema import SamplingParams

VOCAB, EOS = 100, 99


def make(blocks: int = 8, **changes: int) -> tuple[Scheduler, BlockPool]:
    values = {"block_size": 4, "max_batched_tokens": 16, "max_running": 4, "max_model_len": 64} | changes
    pool = BlockPool(blocks)
    return Scheduler(SchedulerConfig(**values, vocab_size=VOCAB, eos_ids=(EOS,)), pool), pool


def sequence(request_id: int, prompt: int, **params: object) -> Sequence:
    return Sequence(request_id, [1 + i % 50 for i in range(prompt)], SamplingParams(**params))  # type: ignore[arg-type]


def result(plan: StepPlan, token: int = 7) -> StepResult:
    draws = sum(1 for planned in plan.sequences if planned.draw)
    return StepResult((token,) * draws, (None,) * draws)


def step(scheduler: Scheduler, token: int = 7) -> tuple[StepPlan, list[SequenceOutput]]:
    plan = scheduler.schedule()
    return plan, scheduler.commit(plan, result(plan, token))


def shape(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    return [(s.request_id, s.start, s.count, s.draw is not None) for s in plan.sequences]


def test_a_long_prompt_is_computed_in_chunks_beside_a_running_sequence() -> None:
    scheduler, _ = make(blocks=20)
    scheduler.add(sequence(1, 3))
    assert shape(step(scheduler)[0]) == [(1, 0, 3, True)]
    scheduler.add(sequence(2, 20))
    assert shape(step(scheduler)[0]) == [(1, 3, 1, True), (2, 0, 15, False)]
    assert shape(step(scheduler)[0]) == [(1, 4, 1, True), (2, 15, 5, True)]
    assert shape(step(scheduler)[0]) == [(1, 5, 1, True), (2, 20, 1, True)]


def test_a_plan_carries_tokens_and_blocks() -> None:
    scheduler, _ = make()
    scheduler.add(sequence(1, 5))
    planned = step(scheduler)[0].sequences[0]
    assert planned.token_ids == (1, 2, 3, 4, 5)
    assert planned.block_table == (0, 1)
    assert planned.draw is not None
    assert planned.draw.position == 5
    assert step(scheduler, token=8)[0].sequences[0].token_ids == (7,)


def test_max_running_and_arrival_order_are_kept() -> None:
    scheduler, _ = make(blocks=20, max_running=2)
    for request_id in (5, 3, 9):
        scheduler.add(sequence(request_id, 2, max_tokens=2))
    assert [s.request_id for s in step(scheduler)[0].sequences] == [5, 3]
    step(scheduler)
    assert [s.request_id for s in step(scheduler)[0].sequences] == [9]


def test_no_more_sequences_run_than_the_budget_has_tokens() -> None:
    scheduler, _ = make(blocks=20, max_batched_tokens=2)
    for request_id in range(4):
        scheduler.add(sequence(request_id, 1))
    step(scheduler)
    assert [s.request_id for s in step(scheduler)[0].sequences] == [0, 1]


def test_the_youngest_is_preempted_and_computed_anew() -> None:
    scheduler, pool = make(blocks=4)
    scheduler.add(sequence(1, 4, max_tokens=9))
    scheduler.add(sequence(2, 4, max_tokens=9))
    plan, _ = step(scheduler)
    assert [s.request_id for s in plan.sequences] == [1, 2]
    for _ in range(4):  # each fills its second block
        step(scheduler)
    assert pool.num_free == 0
    plan, _ = step(scheduler)
    assert shape(plan) == [(1, 8, 1, True)]
    assert scheduler.stats().preemptions == 1
    outputs = [output for _ in range(3) for output in step(scheduler)[1]]
    assert outputs[-1].finish_reason == "length"
    plan, _ = step(scheduler)
    assert shape(plan) == [(2, 0, 9, True)]  # the prompt and the five tokens that were already sent


def test_who_enters_leaves_a_block_for_each_who_runs() -> None:
    scheduler, _ = make(blocks=3)
    scheduler.add(sequence(1, 4, max_tokens=8))
    step(scheduler)
    step(scheduler)
    scheduler.add(sequence(2, 4, max_tokens=1))
    assert [s.request_id for s in step(scheduler)[0].sequences] == [1]


@pytest.mark.parametrize(
    ("token", "params", "reason"),
    [
        (EOS, {}, "stop"),
        (EOS, {"ignore_eos": True}, None),
        (42, {"stop_token_ids": [41, 42]}, "stop"),
        (42, {"stop_token_ids": [42], "ignore_eos": True}, "stop"),
        (42, {}, None),
        (42, {"max_tokens": 1}, "length"),
        (EOS, {"max_tokens": 1}, "stop"),
    ],
)
def test_finish_reasons(token: int, params: dict[str, object], reason: str | None) -> None:
    scheduler, pool = make()
    scheduler.add(sequence(1, 3, **params))
    _, outputs = step(scheduler, token)
    assert outputs == [SequenceOutput(1, [token], reason)]  # type: ignore[arg-type]
    assert scheduler.has_work == (reason is None)
    assert (pool.num_free == pool.num_blocks) == (reason is not None)


def test_max_model_len_ends_a_sequence() -> None:
    scheduler, _ = make(max_model_len=6)
    scheduler.add(sequence(1, 4, max_tokens=100))
    assert step(scheduler)[1][0].finish_reason is None
    assert step(scheduler)[1][0].finish_reason == "length"


def test_stop_ids_are_banned_until_min_tokens() -> None:
    scheduler, _ = make()
    scheduler.add(sequence(1, 3, min_tokens=2, stop_token_ids=[50, 8, VOCAB + 5]))
    banned = [step(scheduler)[0].sequences[0].draw.banned_ids for _ in range(3)]  # type: ignore[union-attr]
    assert banned == [(8, 50, EOS), (8, 50, EOS), ()]


def test_abort_of_waiting_and_running_frees_everything() -> None:
    scheduler, pool = make(max_running=1)
    scheduler.add(sequence(1, 3))
    scheduler.add(sequence(2, 3))
    step(scheduler)
    scheduler.abort(2)
    scheduler.abort(1)
    scheduler.abort(77)
    assert not scheduler.has_work
    assert pool.num_free == pool.num_blocks


def test_abort_of_a_step_in_flight_gives_no_output() -> None:
    scheduler, pool = make()
    scheduler.add(sequence(1, 3))
    plan = scheduler.schedule()
    scheduler.abort(1)
    assert pool.num_free < pool.num_blocks  # the step still writes to its blocks
    assert scheduler.commit(plan, result(plan)) == []
    assert pool.num_free == pool.num_blocks
    assert not scheduler.has_work


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (sequence(1, 0), "no tokens"),
        (sequence(1, 64), "limited to 64"),
        (sequence(1, 30, max_tokens=4), "may need 33 tokens of KV cache, but it holds 32"),
        (Sequence(1, [VOCAB], SamplingParams()), "outside of 0 … 99"),
        (Sequence(1, [-1], SamplingParams()), "outside of 0 … 99"),
    ],
)
def test_what_can_never_run_is_refused(bad: Sequence, message: str) -> None:
    scheduler, _ = make()
    with pytest.raises(RequestRefusedError, match=message):
        scheduler.add(bad)
    assert not scheduler.has_work


def test_a_request_that_just_fits_is_taken() -> None:
    scheduler, _ = make()
    scheduler.add(sequence(1, 30, max_tokens=3))
    with pytest.raises(RequestRefusedError, match="already in use"):
        scheduler.add(sequence(1, 3))


@dataclass
class Workload:
    """Requests by step of arrival; aborts by step."""

    blocks: int
    block_size: int
    budget: int
    max_running: int
    arrivals: list[tuple[int, int, int]]  # step, prompt length, max_tokens
    aborts: list[tuple[int, int]]  # step, request
    stops: set[int] = field(default_factory=set)  # generated-token numbers at which EOS comes


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    block_size, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 10))
    room = block_size * blocks
    arrivals = draw(
        st.lists(st.tuples(st.integers(0, 20), st.integers(1, room), st.integers(1, 12)), min_size=1, max_size=12)
    )
    aborts = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, len(arrivals) - 1)), max_size=5))
    return Workload(
        blocks,
        block_size,
        draw(st.integers(1, 12)),
        draw(st.integers(1, 6)),
        arrivals,
        aborts,
        draw(st.sets(st.integers(1, 40), max_size=4)),
    )


@settings(max_examples=300, deadline=None)
@given(workloads())
def test_random_workloads(work: Workload) -> None:
    size = work.block_size * work.blocks
    sizes = {"block_size": work.block_size, "max_batched_tokens": work.budget, "max_running": work.max_running}
    (first, pool), (second, _) = (make(work.blocks, max_model_len=size + 1, **sizes) for _ in range(2))
    computed: Counter[int] = Counter()
    known, limits = {}, {}
    generated: Counter[int] = Counter()
    ended: Counter[int] = Counter()
    aborted: set[int] = set()
    last_arrival = max(at for at, _, _ in work.arrivals)
    total_tokens = sum(prompt + tokens for _, prompt, tokens in work.arrivals)
    drawn = now = 0
    while now <= last_arrival or first.has_work:
        for request_id, (at, prompt, tokens) in enumerate(work.arrivals):
            if at == now:
                for scheduler in (first, second):
                    scheduler.add(sequence(request_id, prompt, max_tokens=tokens))
                known[request_id], limits[request_id] = prompt, tokens
        for at, request_id in work.aborts:
            if at == now and request_id in known and not ended[request_id]:
                first.abort(request_id)
                second.abort(request_id)
                aborted.add(request_id)

        plan = first.schedule()
        assert plan == second.schedule()
        assert bool(plan.sequences) == first.has_work  # always progress, never an empty step
        assert sum(planned.count for planned in plan.sequences) <= work.budget
        assert len(plan.sequences) <= work.max_running
        blocks = [block for planned in plan.sequences for block in planned.block_table]
        assert len(blocks) == len(set(blocks))
        for planned in plan.sequences:
            assert planned.request_id not in aborted
            assert not ended[planned.request_id]
            assert planned.start in (computed[planned.request_id], 0)  # 0: it was preempted
            end = planned.start + planned.count
            assert 1 <= planned.count <= end <= len(planned.block_table) * work.block_size
            assert (planned.draw is not None) == (end == known[planned.request_id])
            computed[planned.request_id] = end
        tokens_drawn = []
        for planned in plan.sequences:
            if planned.draw:
                drawn += 1
                tokens_drawn.append(EOS if drawn in work.stops else 7)
        step_result = StepResult(tuple(tokens_drawn), (None,) * len(tokens_drawn))
        outputs = first.commit(plan, step_result)
        assert outputs == second.commit(plan, step_result)
        for output in outputs:
            known[output.request_id] += 1
            generated[output.request_id] += 1
            assert generated[output.request_id] <= limits[output.request_id]
            ended[output.request_id] += output.finish_reason is not None
        pool.check_integrity()
        now += 1
        # The oldest advances each step, so all is done within the work that recomputing everything would be.
        assert now <= last_arrival + 2 + total_tokens * (size + 2)
    assert pool.num_free == pool.num_blocks
    for request_id in range(len(work.arrivals)):
        assert ended[request_id] == (request_id not in aborted)
