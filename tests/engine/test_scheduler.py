"""engine/scheduler.py: hand-made cases, and properties over random workloads on tiny pools."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidewright.engine.messages import SequenceOutput, TokenLogprob
from tidewright.engine.plan import DrawnToken, ScheduledSequence, SequenceResult, StepPlan, StepResult
from tidewright.engine.scheduler import RequestRefusedError, Scheduler, SchedulerConfig
from tidewright.engine.sequence import Sequence
from tidewright.kv_cache.block_pool import BlockPool
from tidewright.schema import SamplingParams

VOCAB, EOS = 100, 99


def make(blocks: int = 8, **changes: object) -> tuple[Scheduler, BlockPool]:
    values: dict[str, object] = {
        "block_size": 4,
        "max_batched_tokens": 16,
        "max_running": 4,
        "max_waiting": 100,
        "max_model_len": 64,
        "prefix_caching": False,
    }
    pool = BlockPool(blocks)
    config = SchedulerConfig(**(values | changes), vocab_size=VOCAB, eos_ids=(EOS,))  # type: ignore[arg-type]
    return Scheduler(config, pool), pool


def sequence(request_id: int, prompt: int, **params: object) -> Sequence:
    return Sequence(request_id, [1 + i % 50 for i in range(prompt)], SamplingParams(**params))  # type: ignore[arg-type]


def result(plan: StepPlan, token: int = 7) -> StepResult:
    return StepResult(tuple(SequenceResult((DrawnToken(token),) * len(planned.draws)) for planned in plan.sequences))


def step(scheduler: Scheduler, token: int = 7) -> tuple[StepPlan, list[SequenceOutput]]:
    plan = scheduler.schedule()
    return plan, scheduler.commit(plan, result(plan, token))


def shape(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    return [(s.request_id, s.start, s.count, bool(s.draws)) for s in plan.sequences]


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
    assert scheduler.schedule() == StepPlan((), ended=(1, 2))
    assert scheduler.schedule() == StepPlan(())


def test_equal_prompts_of_one_step_share_their_blocks() -> None:
    scheduler, pool = make(blocks=20, prefix_caching=True)
    scheduler.add(sequence(1, 10))
    scheduler.add(sequence(2, 10))
    plan, outputs = step(scheduler)
    assert shape(plan) == [(1, 0, 10, True), (2, 8, 2, True)]
    first, second = (planned.block_table for planned in plan.sequences)
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    assert [output.cached_tokens for output in outputs] == [0, 8]
    stats = scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits, stats.slots_unused) == (20, 8, 2)
    assert pool.num_free == 16


def test_a_prefix_outlives_its_request_until_its_blocks_are_needed() -> None:
    scheduler, _ = make(blocks=4, prefix_caching=True, max_model_len=20)
    scheduler.add(sequence(1, 8, max_tokens=1))
    step(scheduler)
    assert scheduler.stats().blocks_cached == 2
    scheduler.add(sequence(2, 9, max_tokens=1))
    assert shape(step(scheduler)[0]) == [(2, 8, 1, True)]
    scheduler.add(Sequence(3, [60] * 15, SamplingParams(max_tokens=1)))
    step(scheduler)
    assert scheduler.stats().prefix_evictions == 2
    scheduler.add(sequence(4, 8, max_tokens=1))
    assert shape(step(scheduler)[0]) == [(4, 0, 8, True)]


def test_the_last_token_is_computed_even_if_all_is_cached() -> None:
    scheduler, _ = make(prefix_caching=True)
    for request_id in (1, 2):
        scheduler.add(sequence(request_id, 8, max_tokens=1))
        plan, _ = step(scheduler)
    assert shape(plan) == [(2, 4, 4, True)]


def test_generated_tokens_are_found_again() -> None:
    scheduler, _ = make(prefix_caching=True)
    scheduler.add(sequence(1, 3, max_tokens=6))
    for _ in range(6):
        step(scheduler)
    scheduler.add(Sequence(2, [1, 2, 3, 7, 7, 7, 7, 7, 7], SamplingParams()))
    assert shape(step(scheduler)[0]) == [(2, 8, 1, True)]


def test_other_salts_share_nothing() -> None:
    scheduler, _ = make(blocks=20, prefix_caching=True)
    for request_id, salt in enumerate((None, "a", "b", "", "a")):
        scheduler.add(sequence(request_id, 8, max_tokens=1, cache_salt=salt))
        plan, _ = step(scheduler)
        assert shape(plan)[0][1] == (4 if request_id == 4 else 0)


def test_prompt_logprobs_are_asked_for_once_and_come_with_the_first_token() -> None:
    scheduler, _ = make(max_batched_tokens=4, prefix_caching=True)
    scheduler.add(sequence(1, 6, max_tokens=1))
    for _ in range(2):
        step(scheduler)
    scheduler.add(sequence(2, 6, prompt_logprobs=3))
    asked, outputs = [], []
    for _ in range(3):
        plan = scheduler.schedule()
        (planned,) = plan.sequences
        asked.append((planned.prompt_logprobs, planned.next_prompt_ids))
        entries = tuple([TokenLogprob(token, -1.0, 1)] for token in planned.next_prompt_ids)
        drawn = tuple(DrawnToken(7) for _ in planned.draws)
        outputs += scheduler.commit(plan, StepResult((SequenceResult(drawn, entries),)))
    assert asked == [(3, (2, 3, 4, 5)), (3, (6,)), (None, ())]  # nothing was taken from the cache
    assert [[e[0].token_id for e in output.prompt_logprobs or []] for output in outputs] == [[2, 3, 4, 5, 6], []]


def test_right_guesses_are_kept_and_what_follows_a_wrong_one_is_not() -> None:
    scheduler, _ = make(blocks=20, speculative_tokens=3)
    scheduler.add(Sequence(1, [5, 6, 7, 8, 9, 5, 6], SamplingParams(max_tokens=10)))
    plan = scheduler.schedule()
    (planned,) = plan.sequences
    assert planned.token_ids == (5, 6, 7, 8, 9, 5, 6, 7, 8, 9)
    assert [draw.position for draw in planned.draws] == [7, 8, 9, 10]
    drawn = tuple(DrawnToken(token) for token in (7, 8, 1, 2))
    (output,) = scheduler.commit(plan, StepResult((SequenceResult(drawn),)))
    assert output.token_ids == [7, 8, 1]
    (planned,) = scheduler.schedule().sequences
    assert (planned.start, planned.token_ids[:1]) == (9, (1,))
    assert (scheduler.stats().tokens_drafted, scheduler.stats().tokens_accepted) == (3, 2)


def test_a_draw_that_failed_ends_its_request_alone() -> None:
    scheduler, _ = make()
    scheduler.add(sequence(1, 3))
    scheduler.add(sequence(2, 3))
    plan = scheduler.schedule()
    drawn = (DrawnToken(EOS, error="the grammar is lost"), DrawnToken(7))
    outputs = scheduler.commit(plan, StepResult(tuple(SequenceResult((token,)) for token in drawn)))
    assert outputs == [
        SequenceOutput(1, [], "engine_failed", message="the grammar is lost"),
        SequenceOutput(2, [7]),
    ]
    assert [s.request_id for s in step(scheduler)[0].sequences] == [2]


def next_token(history: tuple[int, ...]) -> int:
    """What the fake model generates: repeats itself now and then, so that guesses are sometimes right."""
    if len(history) % 13 == 0:
        return EOS
    return history[-3] if len(history) > 3 and len(history) % 5 else 1 + sum(history[-2:]) % 6


def reference(prompt: tuple[int, ...], max_tokens: int, ignore_eos: bool) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tuple(tokens)))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[len(prompt) :]


class FakeModel:
    """A KV cache whose cells say of which salt and history they are; it reads nothing but them."""

    def __init__(self, block_size: int, salts: dict[int, str | None]) -> None:
        self._block_size = block_size
        self._salts = salts
        self._cells: dict[tuple[int, int], tuple[str | None, tuple[int, ...]]] = {}

    def run(self, plan: StepPlan) -> StepResult:
        # All of a step is written before any of it is read, as in each layer of the real model; in any order.
        for planned in reversed(plan.sequences):
            self._write(planned)
        return StepResult(tuple(self._read(planned) for planned in plan.sequences))

    def _cell(self, planned: ScheduledSequence, position: int) -> tuple[int, int]:
        return planned.block_table[position // self._block_size], position % self._block_size

    def _write(self, planned: ScheduledSequence) -> None:
        for position, token in enumerate(planned.token_ids, start=planned.start):
            self._cells[self._cell(planned, position)] = (self._salts[planned.request_id], (token,))

    def _read(self, planned: ScheduledSequence) -> SequenceResult:
        cells = [self._cells[self._cell(planned, p)] for p in range(planned.start + planned.count)]
        assert {salt for salt, _ in cells} == {self._salts[planned.request_id]}
        history = tuple(token for _, (token,) in cells)
        ends = range(len(history) - len(planned.draws) + 1, len(history) + 1)
        return SequenceResult(tuple(DrawnToken(next_token(history[:end])) for end in ends))


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: tuple[int, ...]
    max_tokens: int
    priority: int
    ignore_eos: bool
    salt: str | None


@dataclass(frozen=True)
class Workload:
    blocks: int
    config: dict[str, object]
    arrivals: list[Arrival]
    aborts: set[tuple[int, int]]  # step, request
    expiries: set[tuple[int, int]]


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    block_size, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    room = block_size * blocks
    beginning = draw(st.lists(st.integers(1, 6), min_size=room, max_size=room))
    arrivals = []
    for _ in range(draw(st.integers(1, 12))):
        length, common = draw(st.integers(1, room)), draw(st.integers(0, room))
        own = draw(st.lists(st.integers(1, 6), min_size=length, max_size=length))
        arrivals.append(
            Arrival(
                step=draw(st.integers(0, 20)),
                prompt=tuple([*beginning[:common], *own][:length]),
                max_tokens=draw(st.integers(1, 12)),
                priority=draw(st.integers(0, 2)),
                ignore_eos=draw(st.booleans()),
                salt=draw(st.sampled_from([None, None, "a"])),
            )
        )
    events = st.sets(st.tuples(st.integers(0, 40), st.integers(0, len(arrivals) - 1)), max_size=4)
    config: dict[str, object] = {
        "block_size": block_size,
        "max_batched_tokens": draw(st.integers(1, 12)),
        "max_running": draw(st.integers(1, 6)),
        "max_model_len": room + 1,
        "prefix_caching": draw(st.booleans()),
        "speculative_tokens": draw(st.integers(0, 3)),
    }
    return Workload(blocks, config, arrivals, draw(events), draw(events))


@settings(max_examples=300, deadline=None)
@given(workloads())
def test_random_workloads(work: Workload) -> None:
    (first, pool), (second, _) = (make(work.blocks, **work.config) for _ in range(2))
    model = FakeModel(int(str(work.config["block_size"])), {i: a.salt for i, a in enumerate(work.arrivals)})
    produced: dict[int, list[int]] = {}
    ends: dict[int, list[str]] = {}
    aborted: set[int] = set()
    now, last_arrival = 0, max(arrival.step for arrival in work.arrivals)
    total_tokens = sum(len(a.prompt) + a.max_tokens for a in work.arrivals)
    while now <= last_arrival or first.has_work:
        for request_id, a in enumerate(work.arrivals):
            if a.step == now:
                params = SamplingParams(
                    max_tokens=a.max_tokens, ignore_eos=a.ignore_eos, priority=a.priority, cache_salt=a.salt, timeout=1
                )
                for scheduler in (first, second):
                    scheduler.add(Sequence(request_id, list(a.prompt), params))
                produced[request_id], ends[request_id] = [], []
        for request_id in sorted(request for at, request in work.aborts if at == now and request in produced):
            first.abort(request_id)
            second.abort(request_id)
            if not ends[request_id]:
                aborted.add(request_id)
        for request_id in sorted(request for at, request in work.expiries if at == now):
            output = first.expire(request_id)
            assert output == second.expire(request_id)
            if output:
                ends[request_id].append("timeout")

        plan = first.schedule()
        assert plan == second.schedule()
        assert bool(plan.sequences) == first.has_work  # always progress, never an empty step
        assert sum(planned.count for planned in plan.sequences) <= work.config["max_batched_tokens"]  # type: ignore[operator]
        assert len(plan.sequences) <= work.config["max_running"]  # type: ignore[operator]
        for planned in plan.sequences:
            assert planned.request_id not in aborted
            assert not ends[planned.request_id]
            assert planned.count >= 1
        step_result = model.run(plan)
        outputs = first.commit(plan, step_result)
        assert outputs == second.commit(plan, step_result)
        for output in outputs:
            produced[output.request_id] += output.token_ids
            if output.finish_reason:
                ends[output.request_id].append(output.finish_reason)
        first.check_integrity()
        now += 1
        # The first in order advances each step, so all is done within the work that computing everything anew would be.
        assert now <= last_arrival + 2 + total_tokens * (total_tokens + 2)
    assert pool.num_free == pool.num_blocks
    for request_id, a in enumerate(work.arrivals):
        expected = reference(
            a.prompt, min(a.max_tokens, int(str(work.config["max_model_len"])) - len(a.prompt)), a.ignore_eos
        )
        if request_id in aborted:
            assert not ends[request_id]
        else:
            (reason,) = ends[request_id]
            if reason != "timeout":
                assert produced[request_id] == expected
                assert (reason == "stop") == (expected[-1] == EOS and not a.ignore_eos)
        assert produced[request_id] == expected[: len(produced[request_id])]
