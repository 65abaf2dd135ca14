"""resilience/retry.py and deadline.py: delays within bounds, and none that outlives the request."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewright.resilience.budget import BudgetConfig, RetryBudget
from tidewright.resilience.deadline import Deadline
from tidewright.resilience.retry import NoRetry, RetryPolicy

POLICY = RetryPolicy(max_attempts=4, base_delay=0.1, max_delay=1.0, min_time=0.5)
UNIFORM = st.floats(0, 1, exclude_max=True)
TIMES = st.floats(0, 1e6)


def full_budget() -> RetryBudget:
    return RetryBudget(BudgetConfig(share=0.0, floor=0.0, burst=1000.0), now=0.0)


def test_delays_are_anywhere_between_nothing_and_a_ceiling_that_doubles() -> None:
    policy, budget, never = RetryPolicy(100, 0.1, 1.0, 0.5), full_budget(), Deadline()
    ceilings = [policy.ceiling(attempt) for attempt in range(1, 8)]
    assert ceilings == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0])
    for attempt, ceiling in enumerate(ceilings, start=1):
        assert policy.next_delay(attempt, 0.0, never, 0.0, budget) == 0.0
        assert policy.next_delay(attempt, 0.0, never, 0.5, budget) == pytest.approx(ceiling / 2)
    assert RetryPolicy(10**9, 0.1, 1.0, 0.0).ceiling(10**6) == 1.0


def test_the_last_attempt_is_the_last() -> None:
    budget = full_budget()
    assert POLICY.next_delay(3, 0.0, Deadline(), 0.5, budget) == pytest.approx(0.2)
    assert POLICY.next_delay(4, 0.0, Deadline(), 0.5, budget) is NoRetry.ATTEMPTS


@given(st.integers(1, 6), TIMES, st.floats(-5, 5), UNIFORM)
def test_a_retry_leaves_its_attempt_the_time_it_needs(
    attempt: int, now: float, seconds: float, random_u: float
) -> None:
    deadline, budget = Deadline.after(seconds, now), full_budget()
    delay = POLICY.next_delay(attempt, now, deadline, random_u, budget)
    if isinstance(delay, NoRetry):
        assert budget.balance(now) == 1000
        # It is refused for a reason that is one.
        assert attempt >= 4 or seconds < POLICY.ceiling(attempt) + POLICY.min_time + 1e-6
    else:
        assert 0 <= delay <= POLICY.ceiling(attempt)
        assert now + delay + POLICY.min_time <= deadline.at + 1e-6
        assert budget.balance(now) == 999


def test_no_retry_once_the_deadline_has_passed_even_if_an_attempt_needs_no_time() -> None:
    policy = RetryPolicy(max_attempts=4, base_delay=0.1, max_delay=1.0, min_time=0.0)
    assert policy.next_delay(1, 5.0, Deadline(5.0), 0.0, full_budget()) is NoRetry.DEADLINE


def test_an_empty_budget_is_a_reason_and_a_hopeless_retry_takes_nothing_from_it() -> None:
    budget = RetryBudget(BudgetConfig(share=0.0, floor=0.0, burst=1.0), now=0.0)
    assert POLICY.next_delay(4, 0.0, Deadline(), 0.0, budget) is NoRetry.ATTEMPTS
    assert POLICY.next_delay(1, 0.0, Deadline(0.25), 0.0, budget) is NoRetry.DEADLINE
    assert POLICY.next_delay(1, 0.0, Deadline(), 0.0, budget) == 0.0
    assert POLICY.next_delay(1, 0.0, Deadline(), 0.0, budget) is NoRetry.BUDGET


@given(TIMES, st.floats(0, 1e4), st.lists(st.floats(-1, 1e4), max_size=10))
def test_what_remains_ends_at_the_deadline(now: float, seconds: float, steps: list[float]) -> None:
    deadline = Deadline.after(seconds, now)
    for step in steps:
        now += step
        assert deadline.remaining(now) >= 0
        assert now + deadline.remaining(now) <= max(deadline.at, now) + 1e-6
        assert deadline.expired(now) == (deadline.remaining(now) == 0)


def test_without_a_deadline_there_is_always_time() -> None:
    deadline = Deadline.after(None, 5.0)
    assert deadline.remaining(1e18) == math.inf
    assert not deadline.expired(1e18)
