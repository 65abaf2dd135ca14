"""The report's figures, from samples whose figures are known, against numpy."""

from __future__ import annotations

import random

import numpy as np
import pytest

from loadtests import figures
from loadtests.options import Options
from loadtests.resources import Point, growth
from loadtests.samples import Sample

BEGAN = 1_000.0
OPTIONS = Options(shape="steady", users=3, duration=100.0, keys=("a", "b"))


def sample(at: float, first: float = 0.1, last: float = 1.0, tokens: int = 10, **more: object) -> Sample:
    values = {"protocol": "http", "kind": "chat", "tenant": "tenant 1", "prompt_tokens": 7, "longest_gap": 0.2} | more
    return Sample(at=BEGAN + at, output_tokens=tokens, first=first, last=last, **values)  # type: ignore[arg-type]


def some(count: int = 500) -> list[Sample]:
    rng = random.Random(0)
    return [
        sample(
            rng.uniform(0, 99),
            first=rng.uniform(0.01, 0.5),
            last=rng.uniform(0.5, 1.5),
            tokens=rng.randint(1, 40),
            protocol=rng.choice(["http", "grpc"]),
            tenant=rng.choice(["tenant 1", "tenant 2"]),
            error=rng.choice(["", "", "", "status 503: busy", "connection: reset"]),
            cancelled=rng.random() < 0.1,
        )
        for _ in range(count)
    ]


def test_a_summary_is_numpys() -> None:
    samples = some()
    served = [one for one in samples if not one.error and not one.cancelled]
    found = figures.summary(samples, 100.0)
    assert (found["requests"], found["served"]) == (500, len(served))
    assert found["failed"] == sum(bool(one.error) for one in samples)
    assert found["error_rate"] == pytest.approx(found["failed"] / 500)
    assert found["requests_per_second"] == pytest.approx(len(served) / 100)
    assert found["output_tokens"] == sum(one.output_tokens for one in served)
    assert found["tokens_per_second"] == pytest.approx(found["output_tokens"] / 100)
    assert found["prompt_tokens"] == 7 * len(served)
    expected = {
        "ttft_ms": [one.first for one in served],
        "e2e_ms": [one.last for one in served],
        "tpot_ms": [(one.last - one.first) / (one.output_tokens - 1) for one in served if one.output_tokens > 1],
    }
    for name, seconds in expected.items():
        for percentile in (50, 90, 95, 99):
            assert found[name][f"p{percentile}"] == pytest.approx(1000 * np.percentile(seconds, percentile), abs=1e-3)
        assert found[name]["mean"] == pytest.approx(1000 * np.mean(seconds), abs=1e-3)
        assert found[name]["max"] == pytest.approx(1000 * max(seconds), abs=1e-3)
    assert figures.cdf(samples, "e2e")[::25] == pytest.approx(
        1000 * np.percentile(expected["e2e_ms"], (0, 25, 50, 75, 100)), abs=1e-3
    )


def test_nothing_served_has_no_latency() -> None:
    found = figures.report([sample(1, error="no")], OPTIONS, BEGAN, BEGAN + 100)
    assert found["summary"]["ttft_ms"]["p50"] is None
    assert found["summary"]["error_rate"] == 1.0
    assert found["cdf_ms"] == {"ttft": [], "tpot": [], "e2e": [], "longest_gap": []}
    assert figures.report([], OPTIONS, BEGAN, BEGAN)["summary"]["requests"] == 0


def test_windows_and_groups_lose_nothing() -> None:
    samples = some()
    found = figures.report(samples, OPTIONS, BEGAN, BEGAN + 101)
    assert len(found["windows"]) == 60
    assert sum(window["requests"] for window in found["windows"]) == 500
    assert {window["users"] for window in found["windows"] if window["at"] < 100} == {3}
    for group in found["groups"].values():
        assert sum(one["requests"] for one in group.values()) == 500
    assert found["groups"].keys() == {"protocol", "kind", "tenant"}
    assert sum(found["errors"].values()) == found["summary"]["failed"]
    assert found["peak"] is None
    assert "keys" in found["options"]
    assert found["options"]["keys"] == 2  # how many, not which


def test_a_request_counts_where_it_ended() -> None:
    found = figures.windows([sample(10, last=30.0)], OPTIONS, BEGAN, 100.0)
    (window,) = [window for window in found if window["requests"]]
    assert abs(window["at"] - 40) <= 100 / 60


def test_the_peak_is_the_middle_third() -> None:
    options = Options(shape="multi-tenant", users=10, duration=90.0, keys=("a", "b"))
    samples = [sample(at, tenant="tenant 1") for at in (5, 31, 32, 33, 70)] + [sample(45, tenant="tenant 2")]
    found = figures.report(samples, options, BEGAN, BEGAN + 90)["peak"]
    assert [found["tenant 1"][part]["requests"] for part in ("before", "peak", "after")] == [1, 3, 1]
    assert [found["tenant 2"][part]["requests"] for part in ("before", "peak", "after")] == [0, 1, 0]
    assert found["tenant 1"]["peak"]["requests_per_second"] == pytest.approx(3 / 30)


def closed_system(users: int, most: float, service: float, think: float) -> dict:
    """A system that serves `most` requests a second, and none faster than `service` (the bounds, exactly)."""
    rate = min(users / (service + think), most)
    return {"users": users, "requests_per_second": rate, "e2e_ms": {"mean": 1000 * (users / rate - think)}}


@pytest.mark.parametrize("think", [0.0, 0.5])
def test_the_knee_is_where_the_asymptotes_meet(think: float) -> None:
    points = [closed_system(users, 20.0, 0.4, think) for users in range(2, 65, 2)]
    found = figures.knee(points, think)
    assert found["reached"]
    assert found["users"] == pytest.approx(20.0 * (0.4 + think))
    assert found["requests_per_second"] == pytest.approx(20.0)
    assert found["latency_alone_ms"] == pytest.approx(400)


def test_a_knee_that_was_not_reached_is_called_so() -> None:
    assert not figures.knee([closed_system(users, 1000.0, 0.4, 0) for users in range(1, 9)])["reached"]
    assert "at least three" in figures.knee([closed_system(users, 10.0, 0.4, 0) for users in (1, 2)])["why"]


def test_steps_know_how_long_there_were_so_many() -> None:
    options = Options(shape="ramp", users=8, duration=80.0)
    samples = [sample(at + 0.5, last=0.1) for at in range(80)]  # one a second, whatever the users
    found = figures.report(samples, options, BEGAN, BEGAN + 80)["steps"]
    assert [step["users"] for step in found] == list(range(1, 9))
    assert [step["requests_per_second"] for step in found] == pytest.approx([1.0] * 8)
    early = figures.report(samples[:20], options, BEGAN, BEGAN + 20)["steps"]  # stopped by hand
    assert [step["requests_per_second"] for step in early] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("shape", ["ramp", "burst", "spike"])
def test_a_test_may_end_at_any_moment(shape: str) -> None:
    """Also just after more users came: the report of a test that was stopped must not be lost."""
    options = Options(shape=shape, users=8, duration=240.0)
    for moment in range(2, 240, 2):
        end = moment + 0.001
        samples = [sample(0.0, last=at) for at in (1.0, end)]
        found = figures.steps(samples, options, BEGAN, end)
        assert 1 <= sum(one["requests"] for one in found) <= 2, moment


def test_growth_is_numpys_regression_after_the_warm_up() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, 600)
    points = [
        Point(second, 0.0, 100 + (50 if second < 60 else 0) + 0.3 * second / 60 + n, 20)
        for second, n in enumerate(noise)
    ]
    found = growth(points, 60)
    assert found["mib_per_minute"] == pytest.approx(0.3, abs=0.01)
    assert found["descriptors_per_minute"] == 0
    assert growth(points[:65], 60)["mib_per_minute"] is None
