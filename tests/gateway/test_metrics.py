"""The gateway's own metrics without a server: what is counted as what, and how bad labels come out."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from helpers.scripted_replicas import samples
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.metrics.busiest import OTHER
from tidewright_gateway.metrics.sampling import _Growth


def ended(metrics: Metrics, status: int, code: str = "", limit: str = "", key: str = "k", path: str = "/v1/x") -> None:
    metrics.began()
    metrics.ended(path, status, 0.1, key, code, limit)


@pytest.mark.parametrize(
    ("status", "code", "limit", "outcome"),
    [
        (200, "", "", "ok"),
        (200, "engine_failed", "", "failed"),  # a stream had begun
        (200, "overloaded", "", "failed"),
        (400, "invalid_value", "", "client_error"),
        (413, "body_too_large", "max_body", "client_error"),
        (429, "rate_limit_exceeded", "concurrent", "limited"),
        (499, "cancelled", "", "disconnected"),
        (500, "internal_error", "", "failed"),
        (503, "unavailable", "", "failed"),
        (503, "overloaded", "max_queue", "overloaded"),
    ],
)
def test_each_end_has_one_outcome(status: int, code: str, limit: str, outcome: str) -> None:
    metrics = Metrics()
    before = samples(metrics)
    ended(metrics, status, code, limit)
    grown = {
        key for key, value in samples(metrics).items() if value != before.get(key, 0) and key[0].endswith("_total")
    }
    expected = {
        ("requests_total", code, "/v1/x", str(status)),
        ("request_outcomes_total", outcome),
        ("key_requests_total", "k", outcome),
    }
    if limit:
        expected |= {("refusals_total", limit), ("key_refusals_total", "k", limit)}
    assert {(name, *sorted(labels)) for name, *labels in grown if name != "process_cpu_seconds_total"} == {
        (name, *sorted(labels)) for name, *labels in expected
    }


def test_what_is_no_api_request_is_in_no_error_rate() -> None:
    metrics = Metrics()
    ended(metrics, 503, "not_ready", path="/health/ready")
    ended(metrics, 404, "no_such_path", path="other")
    assert not any(value for (name, *_), value in samples(metrics).items() if name == "request_outcomes_total")


@pytest.mark.parametrize("path", ["/metrics", "/health", "/health/live", "/health/ready"])
def test_scrapes_and_health_checks_are_no_requests_of_a_key(path: str) -> None:
    metrics = Metrics(busiest_keys=1)
    for _ in range(5):
        ended(metrics, 200, key="prometheus", path=path)
    ended(metrics, 200, key="me")
    metrics.keys.rebalance()
    found = samples(metrics)
    assert {key for key in found if key[0] == "key_requests_total"} == {("key_requests_total", "me", "ok")}
    assert found["requests_total", "", path, "200"] == 5


def test_outcomes_and_refusals_are_there_before_the_first() -> None:
    """Else Prometheus would not see the first error as growth."""
    found = samples(Metrics())
    assert found["request_outcomes_total", "failed"] == found["refusals_total", "max_queue"] == 0


def test_keys_with_odd_names_are_escaped_bounded_and_summed() -> None:
    metrics = Metrics(busiest_keys=3)
    for key in ('quote"', "new\nline", "long" * 1000):
        ended(metrics, 200, key=key)
    for number in range(10_000):
        ended(metrics, 200, key=f"jwt:{number}")
    text = metrics.text().decode()
    keys = {
        sample.labels["key_id"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "tidewright_gateway_key_requests_total"
    }
    assert keys == {'quote"': 1, "new\nline": 1, ("long" * 1000)[:128]: 1, OTHER: 10_000}
    assert len(text) < 60_000


def test_a_demoted_key_loses_its_series() -> None:
    metrics = Metrics(busiest_keys=1)
    ended(metrics, 200, key="idle")
    metrics.tokens("idle", 1, 0, 1)
    for _ in range(5):
        ended(metrics, 200, key="busy")
    metrics.keys.rebalance()
    ended(metrics, 200, key="busy")
    ended(metrics, 200, key="idle")
    found = samples(metrics)
    of_keys = {key: value for key, value in found.items() if key[0] == "key_requests_total"}
    assert of_keys == {
        ("key_requests_total", OTHER, "ok"): 6,
        ("key_requests_total", "busy", "ok"): 1,
    }
    assert not [key for key in found if "idle" in key]


def test_a_count_that_begins_again_never_falls() -> None:
    """As of a replica that left and is back: Prometheus' counters take no negative growth."""
    growth = _Growth[str]()
    assert [growth.of(counts) for counts in ({"a": 5}, {"a": 7, "b": 1}, {"a": 2, "b": 1}, {"a": 3})] == [
        [("a", 5)],
        [("a", 2), ("b", 1)],
        [("a", 2), ("b", 0)],
        [("a", 1)],
    ]
