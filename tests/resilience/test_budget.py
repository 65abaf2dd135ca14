"""resilience/budget.py: never more than its share over any stretch of any history, and not less either."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from tidewright.resilience.budget import BudgetConfig, RetryBudget

EVENTS = st.lists(
    st.one_of(
        st.just("request"),
        st.just("retry"),
        st.sampled_from([0.01, 0.3, 2.0, 60.0, -0.3, -1000.0]),  # time passes
    ),
    max_size=200,
)
CONFIGS = st.builds(
    BudgetConfig,
    share=st.sampled_from([0.0, 0.1, 0.25, 1.0]),
    floor=st.sampled_from([0.0, 0.5, 3.0]),
    burst=st.sampled_from([1.0, 2.5, 10.0]),
)


@given(CONFIGS, EVENTS)
def test_no_stretch_of_any_history_gets_more_than_its_share(config: BudgetConfig, events: list[str | float]) -> None:
    now = latest = 1000.0
    budget = RetryBudget(config, now)
    earned, granted, points = 0.0, 0, [(0.0, 0)]
    for event in events:
        if event == "request":
            budget.deposit()
            earned += config.share
        elif event == "retry":
            granted += budget.withdraw(now)
        else:
            now += event
            earned += config.floor * max(now - latest, 0.0)
            latest = max(now, latest)
        points.append((earned, granted))
    # What was granted beyond what was earned, from the lowest point so far to any later one.
    lowest = 0.0
    for earned, granted in points:
        lowest = min(lowest, granted - earned)
        assert granted - earned - lowest <= config.burst + 1e-6


@given(st.sampled_from([0.05, 0.1, 0.2, 0.5]), st.integers(1, 400))
def test_the_share_is_granted_in_full(share: float, requests: int) -> None:
    budget = RetryBudget(BudgetConfig(share, floor=0.0, burst=100.0), now=0.0)
    while budget.withdraw(0.0):
        pass
    granted = 0
    for _ in range(requests):
        budget.deposit()
        granted += budget.withdraw(0.0)
    assert granted == int(share * requests + 1e-6)


def test_the_floor_grants_retries_without_traffic() -> None:
    budget = RetryBudget(BudgetConfig(share=0.0, floor=2.0, burst=5.0), now=0.0)
    assert [budget.withdraw(0.0) for _ in range(6)] == [True] * 5 + [False]
    assert [budget.withdraw(0.5), budget.withdraw(0.5)] == [True, False]
    assert sum(budget.withdraw(1000.0) for _ in range(50)) == 5


def test_a_clock_that_is_set_back_is_not_paid_twice() -> None:
    budget = RetryBudget(BudgetConfig(share=0.1, floor=1.0, burst=2.0), now=0.0)
    assert [budget.withdraw(10.0) for _ in range(3)] == [True, True, False]
    assert not budget.withdraw(0.0)
    assert not budget.withdraw(10.0)
    for _ in range(10):
        budget.deposit()
    assert budget.withdraw(0.0)


def test_the_balance_is_what_was_paid_and_not_granted() -> None:
    budget = RetryBudget(BudgetConfig(share=0.5, floor=1.0, burst=2.0), now=0.0)
    budget.deposit()
    for _ in range(3):
        budget.withdraw(0.0)
    assert budget.balance(0.25) == 0.25


def test_threads_together_get_no_more_than_one_alone() -> None:
    budget = RetryBudget(BudgetConfig(share=0.1, floor=0.0, burst=1000.0), now=0.0)
    granted: list[int] = []

    def one_thread() -> None:
        granted.append(sum(budget.withdraw(0.0) for _ in range(500)))

    threads = [threading.Thread(target=one_thread) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(granted) == 1000
