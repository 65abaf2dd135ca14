"""engine/scheduler.py by hand-made cases: chunks, budgets, ends, refusals, priorities and preemption."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from helpers.scheduling import EOS, VOCAB, make, result, sequence, shape, step
from tidewright.engine.limits import RequestRefusedError
from tidewright.engine.messages import SequenceOutput
from tidewright.engine.plan import StepPlan
from tidewright.engine.sequence import Sequence
from tidewright.schema import SamplingParams


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
    assert planned.new_blocks == (0, 1)
    assert [draw.position for draw in planned.draws] == [5]
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
    banned = [step(scheduler)[0].sequences[0].draws[0].banned_ids for _ in range(3)]
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


def test_the_queue_limit_counts_all_that_run_or_wait() -> None:
    scheduler, _ = make(max_running=2, max_waiting=1)
    for request_id in range(3):
        scheduler.add(sequence(request_id, 2))
    with pytest.raises(RequestRefusedError, match="3 requests run or wait already") as refused:
        scheduler.add(sequence(3, 2))
    assert refused.value.reason == "overloaded"


def test_lower_priority_values_run_first() -> None:
    scheduler, _ = make(max_running=1)
    for request_id, priority in ((1, 5), (2, -1), (3, 5), (4, 0)):
        scheduler.add(sequence(request_id, 2, max_tokens=1, priority=priority))
    assert [step(scheduler)[0].sequences[0].request_id for _ in range(4)] == [2, 4, 1, 3]


def test_an_urgent_request_takes_the_place_of_a_lesser_one_but_not_of_an_equal() -> None:
    scheduler, _ = make(max_running=2)
    scheduler.add(sequence(1, 2, priority=1))
    scheduler.add(sequence(2, 2, priority=1))
    step(scheduler)
    scheduler.add(sequence(3, 2, priority=1))
    scheduler.add(sequence(4, 2, priority=0))
    assert [s.request_id for s in step(scheduler)[0].sequences] == [4, 1]
    assert [s.request_id for s in step(scheduler)[0].sequences] == [4, 1]
    assert scheduler.stats().preemptions == 1


def test_the_least_urgent_is_preempted_although_it_is_the_oldest() -> None:
    scheduler, _ = make(blocks=4)
    scheduler.add(sequence(1, 4, max_tokens=9, priority=1))
    step(scheduler)
    scheduler.add(sequence(2, 4, max_tokens=9))
    for _ in range(5):
        step(scheduler)
    assert [s.request_id for s in step(scheduler)[0].sequences] == [2]


def test_a_long_prompt_leaves_a_token_for_each_who_runs() -> None:
    scheduler, _ = make(blocks=20, max_batched_tokens=4)
    scheduler.add(sequence(1, 2, priority=1))
    scheduler.add(sequence(2, 2, priority=1))
    step(scheduler)
    scheduler.add(sequence(3, 30, priority=0))
    assert shape(step(scheduler)[0]) == [(3, 0, 2, False), (1, 2, 1, True), (2, 2, 1, True)]


def test_expiry_ends_a_request_wherever_it_is() -> None:
    scheduler, pool = make(max_running=1)
    scheduler.add(sequence(1, 3, timeout=2.5))
    scheduler.add(sequence(2, 3, timeout=0))
    step(scheduler)
    assert scheduler.expire(1) == SequenceOutput(1, [], "timeout", message="timed out after 2.5 s while it ran")
    assert scheduler.expire(2) == SequenceOutput(2, [], "timeout", message="timed out after 0 s while it was queued")
    assert scheduler.expire(1) is None
    assert not scheduler.has_work
    assert pool.num_free == pool.num_blocks
    assert scheduler.schedule() == StepPlan(())
    scheduler.add(sequence(3, 3))
    assert step(scheduler)[0].ended == (1, 2)
    assert step(scheduler)[0].ended == ()


def test_a_plan_carries_only_the_blocks_that_are_new() -> None:
    """However long a sequence is: the runner and the other ranks keep its table."""
    scheduler, _ = make()
    scheduler.add(sequence(1, 5, max_tokens=9))
    plans = [step(scheduler)[0].sequences[0] for _ in range(9)]
    assert [(planned.first_block, planned.new_blocks) for planned in plans] == [
        (0, (0, 1)),
        *[(2, ())] * 3,
        (2, (2,)),
        *[(3, ())] * 3,
        (3, (3,)),
    ]


def python_calls(work: Callable[[], object]) -> int:
    """Work that can be counted: seconds depend on the machine."""
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("tenants", [1, 8, 64])
def test_the_next_token_of_a_stream_takes_few_calls_however_many_tenants_there_are(
    tenants: int, prefix_caching: bool
) -> None:
    scheduler, _ = make(1000, max_running=64, max_batched_tokens=512, block_size=16, prefix_caching=prefix_caching)
    for request_id in range(128):
        scheduler.add(sequence(request_id, 4, tenant=f"{request_id % tenants}", max_tokens=50))
    for _ in range(5):
        plan, _ = step(scheduler)
    assert [one.count for one in plan.sequences] == [1] * 64
    planning = python_calls(scheduler.schedule)
    computed = result(plan)
    committing = python_calls(lambda: scheduler.commit(plan, computed))
    # Of each stream: its draw. Of each tenant: its rank, and its turn among those that wait. Of a step: what is left.
    assert planning <= 64 + 3 * tenants + 60
    assert committing <= 3 * 64 + 10
