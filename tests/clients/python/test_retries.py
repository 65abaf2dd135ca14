"""Retries, their budget and the deadline: pure, with clock and chance as arguments."""

from __future__ import annotations

import email.utils

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewright_client import retries
from tidewright_client.deadline import Deadline


def test_the_backoff_doubles_up_to_eight_seconds_and_half_of_it_is_random() -> None:
    most = [retries.wait_before(retry, None, None, lambda: 0.0) for retry in range(6)]
    least = [retries.wait_before(retry, None, None, lambda: 1.0) for retry in range(6)]
    assert most == [0.5, 1, 2, 4, 8, 8]
    assert least == [0.25, 0.5, 1, 2, 4, 4]


def test_retry_after_wins_and_too_long_a_wait_is_none() -> None:
    assert retries.wait_before(3, 60.0, None, lambda: 0.5) == 60
    assert retries.wait_before(0, 60.5, None, lambda: 0.5) is None
    assert retries.wait_before(0, 5.0, 5.0, lambda: 0.5) is None
    assert retries.wait_before(0, 5.0, 5.1, lambda: 0.5) == 5
    assert retries.wait_before(0, None, 0.4, lambda: 0.0) is None


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("3", 3),
        ("1.5", 1.5),
        ("-4", 0),
        ("nan", None),
        ("soon", None),
        (email.utils.formatdate(1_000_030, usegmt=True), 30),
        (email.utils.formatdate(1_000_030), 30),
        (email.utils.formatdate(999_000, usegmt=True), 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: float | None) -> None:
    assert retries.seconds_of(header, 1_000_000) == seconds


def test_the_budget_begins_with_ten_and_grows_by_a_tenth_of_a_request() -> None:
    budget = retries.Budget()
    for _ in range(100):
        budget.request()  # it is full already
    assert [budget.take() for _ in range(11)] == [True] * 10 + [False]
    for _ in range(9):
        budget.request()
    assert not budget.take()
    budget.request()
    assert budget.take()
    assert not budget.take()


@given(st.lists(st.booleans(), max_size=300))
def test_retries_are_never_more_than_ten_and_a_tenth_of_the_requests(takes: list[bool]) -> None:
    budget, requests, taken = retries.Budget(), 0, 0
    for take in takes:
        if take:
            taken += budget.take()
        else:
            budget.request()
            requests += 1
        assert taken <= 10 + requests / 10 + 1e-6


def test_a_deadline_counts_down_and_tells_the_server_a_bit_less() -> None:
    now = 100.0
    deadline = Deadline(20, lambda: now)
    assert (deadline.left(), deadline.of_server(), deadline.at_most(None), deadline.at_most(3)) == (20, 18, 20, 3)
    now = 115.0
    assert (deadline.left(), deadline.of_server(), deadline.at_most(60)) == (5, 4.5, 5)
    now = 130.0
    assert deadline.is_over
    assert deadline.left() == 0
    assert deadline.of_server() == deadline.at_most(3) == 0.001  # 0 would mean at once, or no limit at all


@pytest.mark.parametrize(("left", "margin"), [(0.4, 0.2), (1, 0.5), (2, 0.5), (5, 0.5), (8, 0.8), (20, 2), (600, 2)])
def test_the_server_is_told_less_by_a_tenth_within_bounds(left: float, margin: float) -> None:
    assert Deadline(left, lambda: 0.0).of_server() == pytest.approx(left - margin)


def test_no_deadline_is_none() -> None:
    deadline = Deadline(None, lambda: 1e9)
    assert (deadline.left(), deadline.of_server(), deadline.at_most(None), deadline.at_most(3)) == (None, None, None, 3)
    assert not deadline.is_over
