"""step/buffers.py: whatever plans come, the buffers equal a batch that numpy makes from scratch of whole tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.scheduling import make
from tidewright.engine.plan import Draw, DrawnToken, ScheduledSequence, SequenceResult, StepPlan, StepResult
from tidewright.engine.sequence import Sequence
from tidewright.schema import SamplingParams
from tidewright.step.batch import StepBatch
from tidewright.step.buffers import StepBuffers, StepLimits

CPU = torch.device("cpu")
PARAMS = [
    SamplingParams(seed=3),
    SamplingParams(temperature=0.0, seed=-5, repetition_penalty=1.3),
    SamplingParams(temperature=0.7, top_k=4, top_p=0.3, min_p=0.1, presence_penalty=0.5, frequency_penalty=-1, seed=7),
]


class Tables:
    """The whole block table of each sequence, from what the plans say."""

    def __init__(self) -> None:
        self.of_request: dict[int, list[int]] = {}
        self.at_admission: dict[int, tuple[int, ...]] = {}

    def follow(self, plan: StepPlan) -> None:
        for request_id in (*plan.ended, *plan.preempted):
            self.of_request.pop(request_id, None)
        for planned in plan.sequences:
            table = self.of_request.setdefault(planned.request_id, [])
            assert planned.first_block in (0, len(table))
            table[planned.first_block :] = planned.new_blocks
            if planned.first_block == 0:
                self.at_admission[planned.request_id] = planned.new_blocks


def check(batch: StepBatch, plan: StepPlan, tables: Tables, block_size: int) -> None:
    """Everything that the batch holds, computed token by token."""
    # Single tokens first, then by the table at admission.
    ordered = sorted(plan.sequences, key=lambda planned: (planned.count > 1, tables.at_admission[planned.request_id]))
    positions = [p for planned in ordered for p in range(planned.start, planned.start + planned.count)]
    owners = [tables.of_request[planned.request_id] for planned in ordered for _ in planned.token_ids]
    slots = [table[p // block_size] * block_size + p % block_size for table, p in zip(owners, positions, strict=True)]
    assert batch.token_ids_T.tolist() == [token for planned in ordered for token in planned.token_ids]
    assert batch.positions_T.tolist() == positions
    assert batch.slots_T.tolist() == slots
    assert batch.num_decodes == sum(planned.count == 1 for planned in ordered)

    ends = np.cumsum([planned.count for planned in ordered])
    width = batch.tables_PM.shape[1]
    for planned, end, span, place, length in zip(
        ordered, ends, batch.spans_B4.tolist(), batch.places_B.tolist(), batch.lengths_B.tolist(), strict=True
    ):
        assert span == [end - planned.count, planned.start, planned.count, place * width]
        assert length == planned.start + planned.count
        table = tables.of_request[planned.request_id]
        assert batch.tables_PM[place, : len(table)].tolist() == table
    np.testing.assert_array_equal(batch.host_spans_B4, batch.spans_B4.numpy())
    assert batch.max_context >= max((len(table) * block_size for table in tables.of_request.values()), default=0)
    end_of = {planned.request_id: int(end) for planned, end in zip(ordered, ends, strict=True)}
    assert batch.end_rows == [end_of[planned.request_id] for planned in plan.sequences]
    assert len(set(batch.places_B.tolist())) == len(ordered)

    rows = [
        end_of[planned.request_id] - len(planned.draws) + i
        for planned in plan.sequences
        for i in range(len(planned.draws))
    ]
    draws = [draw for planned in plan.sequences for draw in planned.draws]
    assert batch.rows_R.tolist() == rows
    place_of = {planned.request_id: place for planned, place in zip(ordered, batch.places_B.tolist(), strict=True)}
    nowhere = batch.tables_PM.shape[0]
    places = [[nowhere] * (len(one.draws) - 1) + [place_of[one.request_id]] for one in plan.sequences if one.draws]
    assert batch.sampling.places_R.tolist() == [place for some in places for place in some]
    assert batch.sampling.draws == draws
    for columns in (batch.sampling.host, batch.sampling.device):
        assert columns.position.tolist() == [draw.position for draw in draws]
        for name in ("top_k", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed"):
            assert getattr(columns, name).tolist() == [getattr(draw.params, name) for draw in draws]
        for name in ("temperature", "min_p"):
            expected = np.array([getattr(draw.params, name) for draw in draws], np.float32)
            np.testing.assert_array_equal(np.asarray(getattr(columns, name)), expected)


def next_token(position: int) -> int:
    """Repeats itself, so that some guesses are right and others wrong."""
    return 1 + position % 7 % 3


@st.composite
def arrivals(draw: st.DrawFn, room: int) -> list[tuple[int, int, int, int, int]]:
    """(step, prompt, of it shared with others, max_tokens, priority)"""
    numbers = st.tuples(
        st.integers(0, 12), st.integers(1, room), st.integers(0, room), st.integers(1, 9), st.integers(0, 2)
    )
    return draw(st.lists(numbers, min_size=1, max_size=9))


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 12), st.booleans())
def test_any_sequence_of_plans(data: st.DataObject, block_size: int, blocks: int, staged: bool) -> None:
    """With chunks, preemptions, prefix hits, guesses, and requests that end or leave at any time."""
    room = block_size * blocks
    config: dict[str, object] = {
        "block_size": block_size,
        "max_batched_tokens": data.draw(st.integers(1, 12)),
        "max_running": data.draw(st.integers(1, 5)),
        "max_model_len": room + 1,
        "prefix_caching": data.draw(st.booleans()),
        "speculative_tokens": data.draw(st.integers(0, 3)),
    }
    coming = data.draw(arrivals(room))
    aborts = data.draw(st.sets(st.tuples(st.integers(0, 20), st.integers(0, len(coming) - 1)), max_size=3))
    scheduler, _ = make(blocks, **config)
    limits = StepLimits(
        *(int(str(config[name])) for name in ("max_running", "max_batched_tokens")), room + 1, block_size
    )
    buffers, tables = StepBuffers(limits, CPU, staged), Tables()
    now = 0
    while now <= 12 or scheduler.has_work:
        for request_id, (step, prompt, common, max_tokens, priority) in enumerate(coming):
            if step == now:
                ids = [1 + i % 5 for i in range(min(common, prompt))]
                ids += [10 + request_id] * (prompt - len(ids))
                changes = {"max_tokens": max_tokens, "priority": priority}
                params = PARAMS[request_id % 3]
                made = {name: getattr(params, name) for name in params.__struct_fields__} | changes
                scheduler.add(Sequence(request_id, ids, SamplingParams(**made)))
        for at, request_id in sorted(aborts):
            if at == now:
                scheduler.abort(request_id)
        plan = scheduler.schedule()
        tables.follow(plan)
        batch = buffers.fill(plan)
        check(batch, plan, tables, block_size)
        tokens = [draw.position for planned in plan.sequences for draw in planned.draws]
        buffers.keep(batch, torch.tensor(tokens, dtype=torch.int64))
        kept = dict(zip(batch.sampling.places_R.tolist(), tokens, strict=True))
        kept.pop(batch.tables_PM.shape[0], None)
        assert buffers.last_tokens_P[list(kept)].tolist() == list(kept.values())
        results = (
            SequenceResult(tuple(DrawnToken(next_token(draw.position)) for draw in planned.draws))
            for planned in plan.sequences
        )
        scheduler.commit(plan, StepResult(tuple(results)))
        now += 1


def planned(request_id: int, start: int, count: int, *blocks: int, first_block: int = 0) -> ScheduledSequence:
    draws = (Draw(request_id, PARAMS[0], start + count),)
    return ScheduledSequence(request_id, start, (9,) * count, blocks, draws, first_block=first_block)


@pytest.mark.parametrize("staged", [False, True])
def test_a_sequence_keeps_its_place_and_only_new_blocks_are_written(staged: bool) -> None:
    buffers = StepBuffers(StepLimits(2, 64, 64, 4), CPU, staged)
    first = buffers.fill(StepPlan((planned(1, 0, 8, 5, 6),)))
    place = first.places_B.tolist()[0]
    # What is not written again stays as somebody else left it.
    first.tables_PM[place, 0] = 77
    batch = buffers.fill(StepPlan((planned(1, 8, 1, 9, first_block=2), planned(2, 0, 3, 2))))
    assert batch.tables_PM[place, :3].tolist() == [77, 6, 9]
    assert buffers.highest_block == 9
    # A request that ended leaves its place to the next, also one with its own number.
    batch = buffers.fill(StepPlan((planned(2, 3, 1), planned(1, 0, 1, 4)), ended=(1,)))
    assert batch.tables_PM[place, 0].tolist() == 4


def test_more_new_blocks_than_the_arena_has_room_for_arrive_all_the_same() -> None:
    """As when prompts are admitted whose beginnings are cached."""
    buffers = StepBuffers(StepLimits(2, 4, 400, 1), CPU, staged=True)
    blocks = tuple(range(300))
    batch = buffers.fill(StepPlan((planned(1, 298, 2, *blocks), planned(2, 298, 2, *blocks[::-1]))))
    first, second = sorted(batch.places_B.tolist(), key=lambda place: batch.tables_PM[place, 0].item())
    assert batch.tables_PM[first, :300].tolist() == list(blocks)
    assert batch.tables_PM[second, :300].tolist() == list(blocks[::-1])


def test_a_table_that_does_not_continue_is_an_error() -> None:
    buffers = StepBuffers(StepLimits(2, 64, 64, 4), CPU)
    buffers.fill(StepPlan((planned(1, 0, 8, 5, 6),)))
    with pytest.raises(ValueError, match="request 1 has 2 blocks, so the next is not number 3"):
        buffers.fill(StepPlan((planned(1, 8, 1, 9, first_block=3),)))


def test_whole_tables_given_again_and_again_leave_nothing_behind() -> None:
    """As plans by hand do; the scheduler's mention a sequence that begins anew as preempted or ended before."""
    buffers = StepBuffers(StepLimits(2, 64, 64, 4), CPU)
    for block in (2, 9, 1):
        batch = buffers.fill(StepPlan((planned(1, 0, 1, 5), planned(2, 0, 1, block))))
        assert batch.end_rows == ([2, 1] if block < 5 else [1, 2])


@pytest.mark.parametrize("staged", [False, True])
def test_single_tokens_are_padded_to_the_next_size(staged: bool) -> None:
    """What a graph of that size reads: the batch, then rows that attend to nothing and that no cache keeps."""
    buffers = StepBuffers(StepLimits(8, 64, 64, 4), CPU, staged, sizes=(1, 2, 4))
    seen = buffers.decodes(4)
    assert (seen.num_decodes, seen.max_context) == (4, 64)
    assert seen.slots_T.tolist() == [-1] * 4
    five = [planned(i, 0, 1, i) for i in range(5)]
    assert buffers.fill(StepPlan((*five[:3], planned(5, 0, 2, 6)))).padded_to == 0
    assert buffers.fill(StepPlan(tuple(five))).padded_to == 0
    batch = buffers.fill(StepPlan(tuple(planned(i, 1, 1) for i in range(3))))
    assert (batch.padded_to, len(batch.token_ids_T), batch.num_decodes) == (4, 3, 3)
    for name in ("token_ids_T", "positions_T", "slots_T", "spans_B4", "places_B", "lengths_B"):
        assert torch.equal(getattr(seen, name)[:3], getattr(batch, name))
    assert seen.slots_T.tolist() == [1, 5, 9, -1]
    assert seen.lengths_B.tolist() == [2, 2, 2, 0]
    assert (seen.token_ids_T[3], seen.positions_T[3], seen.spans_B4[3].tolist()) == (0, 0, [3, 0, 1, 0])
    assert buffers.fill(StepPlan(tuple(planned(i, 2, 1) for i in range(2)))).padded_to == 2


def test_a_step_is_computed_again() -> None:
    """As measurements do: it is no step further."""
    buffers = StepBuffers(StepLimits(2, 8, 64, 16), CPU)
    prompt = StepPlan((ScheduledSequence(1, 0, (5, 6), (0, 1)),))
    decode = StepPlan((ScheduledSequence(1, 2, (7,), (), (Draw(1, SamplingParams(seed=3), 3),)),))
    buffers.fill(prompt)
    for _ in range(2):
        batch = buffers.fill(decode)
        assert (batch.positions_T.tolist(), batch.lengths_B.tolist(), batch.slots_T.tolist()) == ([2], [3], [2])
