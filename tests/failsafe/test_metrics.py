"""failsafe/metrics.py: what goes into Triton's metrics."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest

from helpers.metric_family import Family
from helpers.two_models import WELL, World, world
from tidewright.failsafe.metrics import FAILSAFE_PREFIX, FALLBACK_REASONS, METRICS, Counters, samples
from tidewright.metrics import MetricsMirror
from tidewright.resilience.breaker import TRANSITIONS, BreakerSnapshot, State
from tidewright.resilience.degradation import Level
from tidewright.resilience.outcome import Outcome
from tidewright.resilience.retry import NoRetry
from tidewright.schema import FINISH_REASONS

# Every name that the failsafe counts, and all that its label may be.
COUNTED = {
    "requests_served_total": ("decoder", "fallback"),
    "requests_failed_total": FINISH_REASONS,
    "calls_total": ("decoder", "fallback"),
    "outcomes_total": tuple(outcome.label for outcome in Outcome),
    "fallbacks_total": FALLBACK_REASONS,
    "resumed_total": ("",),
    "retries_total": ("",),
    "retries_refused_total": tuple(cause.value for cause in NoRetry),
}


@pytest.fixture
def family() -> type[Family]:
    return Family.fresh()


def snapshot(state: State = State.CLOSED, **transitions: int) -> BreakerSnapshot:
    counts = {pair: transitions.get(f"{pair[0].value}_{pair[1].value}", 0) for pair in TRANSITIONS}
    return BreakerSnapshot(state, 0, 0, 0, 0, 1.0, counts)


def test_every_sample_arrives_under_its_name(family: type[Family]) -> None:
    counters, number, expected = Counters(), 0, {}
    labels = {spec.name: spec.labels[0].name for spec in METRICS if spec.labels}
    for name, values in COUNTED.items():
        for value in values:
            number += 1
            expected[name + (f"{{{labels[name]}={value}}}" if value else "")] = number
            for _ in range(number):
                counters.count(name, value)
    breaker = snapshot(State.HALF_OPEN, closed_open=201, open_half_open=202, half_open_closed=203, half_open_open=204)
    MetricsMirror(
        METRICS, lambda: samples(counters, 300, breaker, 7.5, Level.FALLBACK_ONLY), family, FAILSAFE_PREFIX
    ).refresh()
    expected |= {
        "requests_active": 300,
        "breaker_state{state=closed}": 0,
        "breaker_state{state=open}": 0,
        "breaker_state{state=half_open}": 1,
        "breaker_transitions_total{change=closed_open}": 201,
        "breaker_transitions_total{change=open_half_open}": 202,
        "breaker_transitions_total{change=half_open_closed}": 203,
        "breaker_transitions_total{change=half_open_open}": 204,
        "retry_budget": 7.5,
        "degradation_level": 2,
    }
    series = dict(family.series)
    assert time.time() - 2 <= series.pop(f"{FAILSAFE_PREFIX}heartbeat_timestamp_seconds") <= time.time()
    assert series == {FAILSAFE_PREFIX + name: value for name, value in expected.items()}


def test_a_name_that_is_not_declared_is_not_counted() -> None:
    with pytest.raises(AssertionError):
        Counters().count("requests_served_total", "tokenizer")
    with pytest.raises(KeyError):
        Counters().count("requests_lost_total")


def test_any_thread_may_count() -> None:
    counters, threads, times = Counters(), 8, 2000

    def count() -> None:
        for _ in range(times):
            counters.count("retries_total")

    workers = [threading.Thread(target=count) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert counters.read() == {("retries_total", ""): threads * times}


def test_the_state_of_the_breaker_is_one_of_three(family: type[Family]) -> None:
    states = iter(State)
    mirror = MetricsMirror(
        METRICS,
        lambda: samples(Counters(), 0, snapshot(next(states)), 0.0, Level.ALL_FEATURES),
        family,
        FAILSAFE_PREFIX,
    )
    for state in State:
        mirror.refresh()
        seen = {other: family.series[f"{FAILSAFE_PREFIX}breaker_state{{state={other.value}}}"] for other in State}
        assert seen == {other: int(other is state) for other in State}


def served(it: World) -> None:
    it.submit().end()


def fell_back(it: World) -> None:
    it.models.scripts["decoder"] = [[[1], "it broke [engine_failed]"]]
    it.submit().end()


def failed(it: World) -> None:
    it.models.scripts["decoder"] = [["wrong [invalid]"]]
    it.submit().end()


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (
            served,
            {"requests_served_total{by=decoder}", "calls_total{model=decoder}", "outcomes_total{outcome=success}"},
        ),
        (
            fell_back,
            {
                "requests_served_total{by=fallback}",
                "calls_total{model=decoder}",
                "calls_total{model=fallback}",
                "outcomes_total{outcome=engine_failed}",
                "fallbacks_total{reason=engine_failed}",
                "resumed_total",
            },
        ),
        (
            failed,
            {"requests_failed_total{reason=invalid}", "calls_total{model=decoder}", "outcomes_total{outcome=invalid}"},
        ),
    ],
)
def test_what_a_request_adds(family: type[Family], what: Callable[[World], None], expected: set[str]) -> None:
    with world() as it:
        what(it)
    MetricsMirror(METRICS, it.failsafe.samples, family, FAILSAFE_PREFIX).refresh()
    series = {name.removeprefix(FAILSAFE_PREFIX): value for name, value in family.series.items()}
    del series["heartbeat_timestamp_seconds"]
    gauges = {"requests_active": 0, "breaker_state{state=closed}": 1, "retry_budget": 10, "degradation_level": 0}
    assert {name: value for name, value in series.items() if value} == {
        **dict.fromkeys(expected, 1),
        **{name: value for name, value in gauges.items() if value},
    }


def test_what_was_refused_before_counts_as_failed() -> None:
    it = World()
    it.failsafe.refused("invalid")
    assert it.sample("requests_failed_total", "invalid") == 1


def test_load_and_requests_in_flight_show() -> None:
    with world() as it:
        it.models.scripts["decoder"] = [["hang"]]
        it.says(WELL)
        it.submit("one")
        it.submit("two")
        assert it.sample("requests_active") == 2
        assert Counter(name for name, _ in it.samples())["breaker_state"] == 3
        it.failsafe.cancel("one")
        it.failsafe.cancel("two")
