"""resilience/breaker.py: each rule by itself. Any history against a model: test_breaker_machine.py; threads and
tasks: test_breaker_concurrency.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helpers.breakers import CONFIG, call, opened, permitted, refused
from tidewright.resilience.breaker import CircuitBreaker, Permit, State
from tidewright.resilience.outcome import Outcome, Verdict

FAILURES = [outcome for outcome in Outcome if outcome.verdict is Verdict.FAILURE]
IGNORED = [outcome for outcome in Outcome if outcome.verdict is Verdict.IGNORED]


def test_what_counts_is_what_the_model_is_to_blame_for() -> None:
    assert {outcome.label for outcome in FAILURES} == {
        "engine_failed",
        "unavailable",
        "first_token_timeout",
        "stalled",
        "stub_died",
    }
    assert {outcome.label for outcome in IGNORED} == {
        "invalid",
        "cancelled",
        "overloaded",
        "engine_killed",
        "request_timeout",
    }


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_in_a_row_open_it(failure: Outcome) -> None:
    breaker = CircuitBreaker(CONFIG)
    for _ in range(2):
        call(breaker, failure)
    call(breaker, Outcome.SUCCESS)
    for _ in range(2):
        call(breaker, failure)
    assert breaker.state is State.CLOSED
    call(breaker, failure)
    assert breaker.state is State.OPEN


@pytest.mark.parametrize("ignored", IGNORED)
def test_what_is_ignored_neither_opens_it_nor_ends_a_row_of_failures(ignored: Outcome) -> None:
    breaker = CircuitBreaker(CONFIG)
    for _ in range(100):
        call(breaker, ignored)
    assert breaker.state is State.CLOSED
    assert breaker.snapshot(0.0).window_calls == 0
    for _ in range(3):
        call(breaker, Outcome.ENGINE_FAILED)
        if breaker.state is State.CLOSED:
            call(breaker, ignored)
    assert breaker.state is State.OPEN


def test_the_failure_rate_opens_it_where_it_is_reached() -> None:
    breaker = CircuitBreaker(replace(CONFIG, consecutive_failures=100))
    for outcome in [Outcome.SUCCESS] * 10 + [Outcome.ENGINE_FAILED] * 9:
        call(breaker, outcome)
    assert breaker.state is State.CLOSED
    call(breaker, Outcome.ENGINE_FAILED)
    assert breaker.state is State.OPEN


def test_the_failure_rate_opens_it_with_enough_calls_only() -> None:
    breaker = CircuitBreaker(CONFIG)
    for _ in range(4):
        call(breaker, Outcome.ENGINE_FAILED)
        call(breaker, Outcome.SUCCESS)
    call(breaker, Outcome.ENGINE_FAILED)  # 5 of 9
    assert breaker.state is State.CLOSED
    call(breaker, Outcome.ENGINE_FAILED)  # 6 of 10
    assert breaker.state is State.OPEN


def test_the_failure_rate_forgets() -> None:
    breaker = CircuitBreaker(CONFIG)
    for now in range(40):  # half of all calls fail, but never ten within ten seconds
        call(breaker, Outcome.ENGINE_FAILED if now % 2 else Outcome.SUCCESS, now * 1.5)
    assert breaker.state is State.CLOSED
    assert breaker.snapshot(60.0).window_calls == 6
    assert breaker.snapshot(1000.0).window_calls == 0


def test_open_refuses_until_the_cool_down_has_passed() -> None:
    breaker = opened(now=100.0)
    assert refused(breaker, 100.0) == 1.0
    assert refused(breaker, 100.75) == 0.25
    assert [breaker.refuses(now) for now in (100.0, 100.75, 101.0)] == [True, True, False]
    assert permitted(breaker, 101.0).is_probe
    assert breaker.state is State.HALF_OPEN
    assert breaker.refuses(101.0)  # while the probe runs


def test_a_burst_at_the_half_open_moment_gets_one_probe() -> None:
    breaker = opened()
    decisions = [breaker.acquire(1.0) for _ in range(1000)]
    assert [isinstance(decision, Permit) for decision in decisions] == [True] + [False] * 999
    assert refused(breaker, 2.0) == 3.0  # the probe began at 1 and has 4 seconds


def test_a_successful_probe_closes_it_and_forgets_the_failures() -> None:
    breaker = opened()
    call(breaker, Outcome.SUCCESS, 1.0)
    snapshot = breaker.snapshot(1.0)
    assert (snapshot.state, snapshot.consecutive_failures, snapshot.window_calls) == (State.CLOSED, 0, 0)


def test_as_many_successful_probes_as_configured_one_at_a_time() -> None:
    breaker = opened(replace(CONFIG, probe_successes=3))
    for _ in range(2):
        probe = permitted(breaker, 1.0)
        refused(breaker, 1.0)
        breaker.record(probe, Outcome.SUCCESS, 1.0)
        assert breaker.state is State.HALF_OPEN
    call(breaker, Outcome.SUCCESS, 1.0)
    assert breaker.state is State.CLOSED


def test_successes_of_an_earlier_half_open_time_do_not_count() -> None:
    breaker = opened(replace(CONFIG, probe_successes=2))
    call(breaker, Outcome.SUCCESS, 1.0)
    call(breaker, Outcome.ENGINE_FAILED, 1.0)
    call(breaker, Outcome.SUCCESS, 10.0)
    assert breaker.state is State.HALF_OPEN


def test_each_failed_probe_doubles_the_cool_down_up_to_its_cap_and_closing_resets_it() -> None:
    breaker, now, cool_downs = opened(), 0.0, []
    for _ in range(5):
        cool_downs.append(refused(breaker, now))
        now += cool_downs[-1]
        call(breaker, Outcome.UNAVAILABLE, now)
    assert cool_downs == [1.0, 2.0, 4.0, 5.0, 5.0]
    now += 5.0
    call(breaker, Outcome.SUCCESS, now)
    for _ in range(3):
        call(breaker, Outcome.UNAVAILABLE, now)
    assert refused(breaker, now) == 1.0


@pytest.mark.parametrize("ignored", IGNORED)
def test_an_ignored_probe_frees_the_slot_and_says_nothing(ignored: Outcome) -> None:
    breaker = opened()
    call(breaker, ignored, 1.0)
    assert breaker.state is State.HALF_OPEN
    assert permitted(breaker, 1.0).is_probe


def test_a_lost_probe_frees_the_slot_after_its_time_and_its_late_report_changes_nothing() -> None:
    breaker = opened()
    lost = permitted(breaker, 1.0)
    assert refused(breaker, 4.5) == 0.5
    probe = permitted(breaker, 5.0)
    breaker.record(lost, Outcome.ENGINE_FAILED, 5.0)
    assert breaker.state is State.HALF_OPEN
    refused(breaker, 5.0)
    breaker.record(probe, Outcome.SUCCESS, 5.0)
    assert breaker.state is State.CLOSED


def test_a_late_probe_still_counts_while_nobody_has_its_slot() -> None:
    breaker = opened()
    probe = permitted(breaker, 1.0)
    breaker.record(probe, Outcome.SUCCESS, 500.0)
    assert breaker.state is State.CLOSED


@pytest.mark.parametrize("outcome", [Outcome.SUCCESS, Outcome.ENGINE_FAILED])
def test_results_of_calls_from_before_do_not_move_the_new_state(outcome: Outcome) -> None:
    breaker = CircuitBreaker(CONFIG)
    old = [permitted(breaker, 0.0) for _ in range(20)]
    for permit in old[:3]:
        breaker.record(permit, Outcome.ENGINE_FAILED, 0.0)
    breaker.record(old[3], outcome, 0.5)
    assert breaker.state is State.OPEN
    probe = permitted(breaker, 1.0)
    for permit in old[4:8]:
        breaker.record(permit, outcome, 1.0)
    assert breaker.state is State.HALF_OPEN
    refused(breaker, 1.0)
    breaker.record(probe, Outcome.SUCCESS, 1.0)
    for permit in old[8:]:
        breaker.record(permit, outcome, 1.0)
    assert breaker.state is State.CLOSED
    assert breaker.snapshot(1.0).window_calls == 0


def test_a_permit_counts_once() -> None:
    breaker = CircuitBreaker(CONFIG)
    permit = permitted(breaker, 0.0)
    for _ in range(10):
        breaker.record(permit, Outcome.ENGINE_FAILED, 0.0)
    assert breaker.snapshot(0.0).consecutive_failures == 1


def test_a_clock_that_is_set_back_does_not_prolong_the_wait() -> None:
    breaker = opened(now=1_000_000.0)
    assert refused(breaker, 5.0) == 1.0
    permitted(breaker, 6.0)
    assert refused(breaker, 2.0) == 4.0
    assert permitted(breaker, 6.0).is_probe


def test_a_clock_that_is_set_back_does_not_stop_the_window() -> None:
    breaker = CircuitBreaker(CONFIG)
    for _ in range(2):
        call(breaker, Outcome.ENGINE_FAILED, 1_000_000.0)
    for now in range(40):
        call(breaker, Outcome.SUCCESS, now)
    assert breaker.snapshot(40.0).window_calls == 9
    call(breaker, Outcome.ENGINE_FAILED, 38.0)  # a late read of the clock is counted as new
    assert breaker.snapshot(47.5).window_failures == 1


def test_transitions_are_counted_for_metrics() -> None:
    breaker = opened()
    refused(breaker, 0.0)
    call(breaker, Outcome.UNAVAILABLE, 1.0)
    call(breaker, Outcome.SUCCESS, 3.0)
    snapshot = breaker.snapshot(3.0)
    assert snapshot.transitions == {
        (State.CLOSED, State.OPEN): 1,
        (State.OPEN, State.HALF_OPEN): 2,
        (State.HALF_OPEN, State.OPEN): 1,
        (State.HALF_OPEN, State.CLOSED): 1,
    }
    assert snapshot.generation == 5
    with pytest.raises(TypeError):
        snapshot.transitions[State.CLOSED, State.OPEN] = 7  # type: ignore[index]
    opened_again = snapshot.transitions
    for _ in range(3):
        call(breaker, Outcome.STUB_DIED, 3.0)
    assert opened_again[State.CLOSED, State.OPEN] == 1
