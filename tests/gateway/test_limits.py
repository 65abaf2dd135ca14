"""limits/: what is counted, by properties of the accounts. The stores: test_limit_*.py."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidewright_gateway.admission.limits import Subject
from tidewright_gateway.admission.limits import memory as memory_module
from tidewright_gateway.admission.limits.buckets import DAY
from tidewright_gateway.admission.limits.memory import MemoryStore
from tidewright_gateway.admission.limits.store import Settle, Take, TakeResult, Usage
from tidewright_gateway.auth.callers import Limits

START = 20_000 * DAY + DAY - 300.0  # five minutes before a day ends
CLOSE = 1e-3  # tokens or requests; sums of floats

LIMITS = st.builds(
    Limits,
    requests_per_second=st.sampled_from([None, None, 0.1, 1.0, 2.5, 10.0]),
    concurrent=st.sampled_from([None, None, 1, 3]),
    tokens_per_minute=st.sampled_from([None, 60, 600, 1000]),
    tokens_per_day=st.sampled_from([None, None, 500, 5000]),
)
PAUSES = st.sampled_from([0.0, 0.0, 0.0, 0.01, 0.3, 1.0, 7.0, 30.0, 45.0, 200.0])
COSTS = st.sampled_from([0, 1, 10, 50, 300, 500, 600, 700])
GROWS = 4
# A pause, and then a request of the first subject, the second (2) or both (3), one that ends (0) or that needs more.
STEPS = st.lists(st.tuples(PAUSES, st.tuples(st.sampled_from([0, 1, 2, 3, GROWS]), COSTS)), min_size=15, max_size=40)


@dataclass
class Clock:
    now: float = START

    def __call__(self) -> float:
        return self.now


@dataclass
class Request:
    take: Take
    parts: list[list[float]]
    """When how much was reserved; once it is settled, what of it was used."""


def in_loop(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Runs what waits for nothing."""
    with pytest.raises(StopIteration) as ended:
        coroutine.send(None)
    return ended.value.value


class History:
    """Requests to a MemoryStore, and all that came of them."""

    def __init__(self, *limits: Limits) -> None:
        self.clock = Clock()
        self.store = MemoryStore(self.clock)
        self.subjects = [Subject(f"subject {number}", each) for number, each in enumerate(limits)]
        self.admitted: list[Request] = []
        self.running: list[Request] = []

    def take(self, which: int, cost: int) -> TakeResult:
        """`which`: bits of the subjects, or GROWS."""
        if which == GROWS:
            return self.grow(cost)
        subjects = tuple(subject for bit, subject in enumerate(self.subjects) if which >> bit & 1)
        take = Take(f"r{len(self.admitted)}", subjects, cost)
        outcome = in_loop(self.store.take(take))
        if not outcome.refusal:
            request = Request(take, [[self.clock.now, cost]])
            self.admitted.append(request)
            self.running.append(request)
        return outcome

    def grow(self, cost: int) -> TakeResult:
        if not self.running:
            return TakeResult(self.clock.now, [])
        request = self.running[cost % len(self.running)]
        outcome = in_loop(self.store.take(msgspec.structs.replace(request.take, cost=cost)))
        if not outcome.refusal:
            request.parts.append([self.clock.now, cost])
        return outcome

    def settle(self, number: int, share: float = 0.0) -> None:
        if self.running:
            request = self.running.pop(number % len(self.running))
            used = left = math.floor(sum(cost for _, cost in request.parts) * share)
            for part in request.parts:  # what came first was used first
                part[1] = min(part[1], left)
                left -= part[1]
            request.parts[-1][1] += left
            in_loop(self.store.settle(Settle(request.take.id, request.take.subjects, used)))

    def of(self, subject: Subject, requests: list[Request]) -> list[Request]:
        return [request for request in requests if subject in request.take.subjects]

    def usage(self, subject: Subject) -> Usage:
        return self.store._account(subject, self.clock.now).usage


@settings(max_examples=100, deadline=None)
@given(LIMITS, LIMITS, STEPS)
def test_nobody_gets_more_than_the_limits_in_any_window_or_day(first: Limits, second: Limits, steps: list) -> None:
    history = History(first, second)
    for pause, (which, number) in steps:
        history.clock.now += pause
        if which:
            history.take(which, number)
        else:
            history.settle(number // 10, number % 7 / 6)
        for subject in history.subjects:
            limits = subject.limits
            running = len(history.of(subject, history.running))
            assert running <= (limits.concurrent or running)
            check_windows(history.of(subject, history.admitted), limits)


def check_windows(requests: list[Request], limits: Limits) -> None:
    """All windows that end at the last request; those before were looked at before. What a settled request used counts
    when it was admitted."""
    if not requests:
        return
    tokens = 0
    begun, days = [request.parts[0][0] for request in requests], defaultdict(int)
    for count, at in enumerate(reversed(begun), 1):
        if rate := limits.requests_per_second:
            assert count <= max(1, rate) + rate * (begun[-1] - at) + CLOSE
    parts = sorted(part for request in requests for part in request.parts)
    for at, used in reversed(parts):
        tokens += used
        days[at // DAY] += used
        if limit := limits.tokens_per_minute:
            assert tokens <= limit + limit / 60 * (parts[-1][0] - at) + CLOSE
    if limit := limits.tokens_per_day:
        assert max(days.values()) <= limit


@settings(max_examples=60, deadline=None)
@given(LIMITS, STEPS)
def test_a_refusal_is_right_and_says_how_long_to_wait(limits: Limits, steps: list) -> None:
    history = History(limits)
    for pause, (which, number) in steps:
        history.clock.now += pause
        if not which:
            history.settle(number // 10, number % 7 / 6)
            continue
        if not (refusal := history.take(which if which == GROWS else 1, number).refusal) or which == GROWS:
            continue
        if refusal.limit == "concurrent":
            assert len(history.running) >= limits.concurrent
        elif refusal.wait is None:
            assert number > getattr(limits, refusal.limit)
        else:
            # As good as then it is still refused; then only requests that run could be in the way.
            history.clock.now += refusal.wait - 0.001
            assert history.take(1, number).refusal
            history.clock.now += 0.002
            again = history.take(1, number).refusal
            assert again is None or again.limit == "concurrent"


@settings(max_examples=40, deadline=None)
@given(LIMITS, LIMITS, STEPS)
def test_what_is_settled_at_once_is_all_back(first: Limits, second: Limits, steps: list) -> None:
    history = History(first, second)
    for _, (which, number) in steps:
        if which:
            history.take(which, number)
        else:
            history.settle(number)
    while history.running:
        history.settle(0)
    for subject in history.subjects:
        usage = history.usage(subject)
        assert (usage.concurrent, usage.tokens, usage.day) == (0, 0, 0)


@settings(max_examples=40, deadline=None)
@given(LIMITS, LIMITS, STEPS)
def test_a_refused_request_takes_nothing(first: Limits, second: Limits, steps: list) -> None:
    history = History(first, second)
    for pause, (which, number) in steps:
        history.clock.now += pause
        before = [history.usage(subject) for subject in history.subjects]
        if history.take(which or 3, number).refusal:
            assert [history.usage(subject) for subject in history.subjects] == before


def test_a_late_refund_is_what_neither_was_used_nor_has_drained() -> None:
    history = History(Limits(tokens_per_minute=6000))
    (subject,) = history.subjects
    for _ in range(6):
        history.take(1, 1000)
    history.clock.now += 30  # 3000 of the 6000 have drained
    for _ in range(5):
        history.settle(0, 0.0)
        assert history.usage(subject).tokens > 0
    # Half of its 1000 has drained, so 100 more are owed.
    history.settle(0, 0.6)
    assert history.usage(subject).tokens == pytest.approx(100)


def test_what_a_minute_refilled_is_not_given_back_once_more() -> None:
    history = History(Limits(tokens_per_minute=1000))
    history.take(1, 1000)
    history.clock.now += 60
    assert history.take(1, 1000).refusal is None
    history.settle(0, 0.0)
    assert history.take(1, 1000).refusal


def test_a_reservation_that_grows_is_one_request() -> None:
    history = History(Limits(requests_per_second=1, concurrent=1, tokens_per_minute=600, tokens_per_day=1000))
    (subject,) = history.subjects
    history.take(1, 100)
    assert history.grow(200).refusal is None
    assert history.usage(subject) == Usage(1, 1, 300, 300)
    assert history.grow(301).refusal.limit == "tokens_per_minute"
    assert history.usage(subject) == Usage(1, 1, 300, 300)
    history.clock.now += 10  # 100 of them have drained
    history.settle(0, 150 / 300)
    assert history.usage(subject) == Usage(0, 0, 50, 150)


def test_a_reservation_may_grow_into_another_day() -> None:
    history = History(Limits(tokens_per_day=1000))
    (subject,) = history.subjects
    history.take(1, 300)
    history.clock.now += 301
    assert history.grow(400).refusal is None
    assert history.usage(subject).day == 400
    history.settle(0, 500 / 700)  # 300 of them yesterday
    assert history.usage(subject).day == 200


def test_more_than_was_reserved_is_charged() -> None:
    history = History(Limits(tokens_per_minute=100, tokens_per_day=1000))
    history.take(1, 10)
    history.settle(0, 25.0)
    usage = history.usage(history.subjects[0])
    assert (usage.tokens, usage.day) == (250, 250)
    history.clock.now += 60
    assert history.usage(history.subjects[0]).tokens == 150


def test_a_day_gets_back_only_what_was_reserved_on_it() -> None:
    history = History(Limits(tokens_per_day=1000))
    history.take(1, 1000)
    assert history.take(1, 1).refusal.wait == 300
    history.clock.now += 301
    assert history.take(1, 600).refusal is None
    history.settle(0, 0.0)
    assert history.usage(history.subjects[0]).day == 600


def test_accounts_that_nobody_uses_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "SWEEP_AT", 10)
    history = History(Limits(concurrent=1))
    history.store._sweep_at = 10
    limits = Limits(requests_per_second=1, tokens_per_minute=60)
    for number in range(1000):
        history.clock.now += 1
        history.subjects = [Subject(f"user {number}", limits)]
        history.take(1, 10)
        if number >= 5:  # the first five go on
            history.settle(-1, 0.5)
    assert len(history.store._accounts) < 40
    assert {f"user {number}" for number in range(5)} <= set(history.store._accounts)


def test_limits_that_change_apply_at_once() -> None:
    history = History(Limits(requests_per_second=1, tokens_per_minute=100, tokens_per_day=100))
    history.take(1, 100)
    (subject,) = history.subjects
    history.subjects = [msgspec.structs.replace(subject, limits=Limits(concurrent=1))]
    assert history.take(1, 10**6).refusal.limit == "concurrent"
    history.subjects = [msgspec.structs.replace(subject, limits=Limits(tokens_per_minute=200, tokens_per_day=200))]
    assert history.take(1, 200).refusal is None
