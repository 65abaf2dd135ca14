"""resilience/window.py: what is forgotten when, and that memory stays small. Histories: test_breaker_machine.py."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidewright.resilience.window import BUCKETS, FailureWindow


def test_calls_are_forgotten_one_bucket_after_the_other() -> None:
    window = FailureWindow(10.0)
    for now in range(10):
        window.add(now % 2 == 0, now + 0.5)
    assert window.counts(9.9) == (10, 5)
    assert [window.counts(now) for now in (10.0, 11.0, 18.0, 19.0)] == [(9, 4), (8, 4), (1, 0), (0, 0)]


@given(st.lists(st.sampled_from([0.0, 0.25, -0.25, 3.0, -3.0, 100.0, -100.0]), min_size=50, max_size=200))
def test_no_clock_makes_it_keep_more_than_its_buckets(steps: list[float]) -> None:
    window, now = FailureWindow(5.0), 0.0
    for step in steps:
        now += step
        window.add(True, now)
        assert len(window._buckets) <= BUCKETS
        assert window.counts(now)[0] >= 1
