"""engine/scheduler.py by hand-made cases: shared prefixes, prompt logprobs, drafts, and draws that fail."""

from __future__ import annotations

from helpers.scheduling import EOS, make, sequence, shape, step
from tidewright.engine.messages import SequenceOutput, TokenLogprob
from tidewright.engine.plan import DrawnToken, SequenceResult, StepResult
from tidewright.engine.sequence import Sequence
from tidewright.schema import SamplingParams


def test_equal_prompts_of_one_step_share_their_blocks() -> None:
    scheduler, pool = make(blocks=20, prefix_caching=True)
    scheduler.add(sequence(1, 10))
    scheduler.add(sequence(2, 10))
    plan, outputs = step(scheduler)
    assert shape(plan) == [(1, 0, 10, True), (2, 8, 2, True)]
    first, second = (planned.new_blocks for planned in plan.sequences)
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


def test_other_tenants_share_nothing() -> None:
    scheduler, _ = make(blocks=20, prefix_caching=True)
    for request_id, tenant in enumerate(("", "a", "b", "a")):
        scheduler.add(sequence(request_id, 8, max_tokens=1, cache_salt="same", tenant=tenant))
        plan, _ = step(scheduler)
        assert shape(plan)[0][1] == (4 if request_id == 3 else 0)


def test_cached_tokens_are_those_of_the_first_admission() -> None:
    """Preempted before its first token, a sequence finds its own blocks again."""
    scheduler, _ = make(blocks=8, max_batched_tokens=8, prefix_caching=True)
    scheduler.add(sequence(1, 20, max_tokens=4))
    step(scheduler)
    scheduler.add(Sequence(2, [60] * 24, SamplingParams(max_tokens=1, priority=-1)))
    outputs, starts = [], []
    while not outputs or outputs[-1].request_id != 1:
        plan, new = step(scheduler)
        outputs += new
        starts += [planned.start for planned in plan.sequences if planned.request_id == 1]
    assert scheduler.stats().preemptions == 1
    assert starts[0] > 0  # its own were still there
    assert [(output.request_id, output.cached_tokens) for output in outputs] == [(2, 0), (1, 0)]


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
    assert outputs == [SequenceOutput(1, [], "invalid", message="the grammar is lost"), SequenceOutput(2, [7])]
    assert [s.request_id for s in step(scheduler)[0].sequences] == [2]
