"""observe/findings.py: each trouble is named by a finding, and a service that is well has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tidewright.observe.findings import Finding, Severity, diagnose
from tidewright.observe.look import Look
from tidewright.observe.scrape import Change, parse
from tidewright_gateway.metrics import Metrics

NOW = 1_800_000_000.0
WELL = {
    'nv_inference_count{model="decoder"}': 1,
    "tidewright_heartbeat_timestamp_seconds": NOW - 1,
    "tidewright_engine_up": 1,
    "tidewright_healthy": 1,
    "tidewright_engine_restarts_total": 0,
    "tidewright_engine_restart_timestamp_seconds": 0,
    "tidewright_preemptions_total": 0,
    "tidewright_kv_usage_ratio": 0.5,
    "tidewright_requests_running": 3,
    "tidewright_requests_waiting": 0,
    "tidewright_batch_places": 64,
}


def exposition(samples: dict[str, float]) -> str:
    return "".join(f"# TYPE {name.partition('{')[0]} gauge\n{name} {value}\n" for name, value in samples.items())


def triton(**changed: float) -> list[Finding]:
    """Of a Triton that was well, in which this has changed since."""
    now = {**WELL, **{f"tidewright_{name}": value for name, value in changed.items()}}
    change = Change(parse(exposition(WELL), 0.0), parse(exposition(now), 2.0, NOW))
    return diagnose([Look("http://t:8002/metrics", change)])


def gateway(act: Callable[[Metrics], None], extra: dict[str, float] | None = None, **status: Any) -> list[Finding]:
    """Of a gateway where this has happened. `extra`: what is sampled."""
    metrics = Metrics()
    metrics.replica_is("a:1", True)
    sampled = {"tidewright_gateway_replicas_usable": 1.0, "tidewright_gateway_queue_places": 8.0}
    before = parse(metrics.text().decode() + exposition(sampled), 0.0)
    act(metrics)
    sampled |= {f"tidewright_gateway_{name}": value for name, value in (extra or {}).items()}
    change = Change(before, parse(metrics.text().decode() + exposition(sampled), 2.0, NOW))
    return diagnose([Look("http://g:8080/metrics", change, status=status)])


def nothing(metrics: Metrics) -> None:
    pass


def ended(status: int, code: str, limit: str = "", key: str = "k") -> Callable[[Metrics], None]:
    def act(metrics: Metrics) -> None:
        metrics.began()
        metrics.ended("/v1/completions", status, 0.1, key, code, limit)

    return act


def down(*replicas: str) -> Callable[[Metrics], None]:
    def act(metrics: Metrics) -> None:
        for replica in replicas:
            metrics.replica_is(replica, False)

    return act


def test_what_is_well_has_no_finding() -> None:
    assert triton() == []
    assert gateway(nothing) == []
    assert gateway(ended(200, "")) == []


def test_each_of_several_models_is_judged_by_its_own_series() -> None:
    def small(**changed: float) -> list[tuple[Severity, str]]:
        of_small = {
            f'{name.removeprefix("tidewright_")}{{model="small"}}': value
            for name, value in {**WELL, **{f"tidewright_{name}": value for name, value in changed.items()}}.items()
            if name.startswith("tidewright_")
        }
        return [(finding.severity, finding.cause) for finding in triton(**of_small)]

    assert small() == []
    assert small(engine_up=0) == [(Severity.CRITICAL, "the engine of decoder_small is down and being started again")]
    ((_, cause),) = small(heartbeat_timestamp_seconds=NOW - 60)
    assert cause.startswith("the process of model decoder_small has been silent for 60 s")
    assert small(requests_waiting=2) == [
        (
            Severity.WARNING,
            "model small: the KV cache is short: 50% used, 0.0 preemptions/s, 2 requests wait "
            "although 3 of 64 places of the batch are taken",
        )
    ]


@pytest.mark.parametrize(
    ("changed", "severity", "cause"),
    [
        (
            {"heartbeat_timestamp_seconds": NOW - 60},
            Severity.CRITICAL,
            "model decoder has been silent for 60 s",
        ),
        ({"failsafe_heartbeat_timestamp_seconds": NOW - 9}, Severity.CRITICAL, "model failsafe has been silent"),
        ({"engine_up": 0}, Severity.CRITICAL, "the engine of decoder is down"),
        ({"healthy": 0}, Severity.CRITICAL, "decoder is not healthy: `tidewright health` says why"),
        (
            {"healthy": 0, 'unhealthy{cause="engine_silent"}': 1, 'unhealthy{cause="stuck"}': 0},
            Severity.CRITICAL,
            "its engine has said and computed nothing",
        ),
        ({"healthy": 0, 'unhealthy{cause="stuck"}': 1}, Severity.CRITICAL, "a thread of its bridge has ended"),
        ({"healthy": 0, 'unhealthy{cause="draining"}': 1}, Severity.WARNING, "it was asked to end"),
        (
            {"engine_restart_timestamp_seconds": NOW - 30, "engine_restarts_total": 2},
            Severity.INFO,
            "started again 30 s ago (restart 2)",
        ),
        (
            {"engine_restart_timestamp_seconds": NOW - 30, "engine_restarts_total": 3},
            Severity.CRITICAL,
            "started again 30 s ago (restart 3)",
        ),
        ({"heartbeat_timestamp_seconds": 0}, Severity.CRITICAL, "Triton has no model decoder"),
        ({"preemptions_total": 5}, Severity.WARNING, "2.5 preemptions/s"),
        ({"requests_waiting": 4}, Severity.WARNING, "KV cache is short: 50% used"),
        ({"requests_waiting": 4, "requests_running": 64}, Severity.INFO, "batch is full: 64 run, 4 wait"),
    ],
    ids=[
        "stub",
        "failsafe",
        "engine",
        "unhealthy",
        "silent",
        "stuck",
        "draining",
        "restarted",
        "often",
        "unloaded",
        "preempted",
        "blocks",
        "full",
    ],
)
def test_of_a_triton(changed: dict[str, float], severity: Severity, cause: str) -> None:
    (found,) = triton(**changed)
    assert found.severity is severity
    assert cause in found.cause


@pytest.mark.parametrize(
    ("act", "extra", "severity", "cause"),
    [
        (down("b:1"), {}, Severity.WARNING, "replica b:1 takes no requests: it is gone"),
        (down("a:1", "b:1"), {"replicas_usable": 0}, Severity.CRITICAL, "replica b:1 takes no requests: it is gone"),
        (nothing, {'breaker_state{replica="a:1",state="open"}': 1}, Severity.WARNING, "breaker of replica a:1 is open"),
        (nothing, {'store_lost{store="limits"}': 1}, Severity.CRITICAL, "store of limits is lost: Redis is gone"),
        (nothing, {'queue_length{class="low"}': 7}, Severity.WARNING, "7 queued, 0 of 8 places taken"),
        (ended(503, "overloaded", "max_queue"), {}, Severity.CRITICAL, "0.5/s by max_queue; busiest key k"),
        (ended(429, "rate_limit_exceeded", "concurrent"), {}, Severity.INFO, "refused 0.5/s by its limit concurrent"),
        (ended(400, "invalid_value"), {}, Severity.INFO, "end with invalid_value (status 400), 0.5/s"),
        (ended(200, "engine_failed"), {}, Severity.WARNING, "end with engine_failed (status 200)"),
        (lambda metrics: metrics.attempt("a:1", "fallback"), {}, Severity.WARNING, "the fallback answers"),
        (lambda metrics: metrics.degraded(1, {"wait": True}), {}, Severity.CRITICAL, "shortened, because of wait"),
        (lambda metrics: metrics.refused_connection(), {}, Severity.CRITICAL, "max_connections is reached"),
        (nothing, {"certificate_expiry_timestamp_seconds": NOW + 86400}, Severity.WARNING, "expires in 1.0 days"),
        (nothing, {"key_expiry_timestamp_seconds": NOW + 86400}, Severity.WARNING, "API key expires in 1.0 days"),
        (nothing, {"certificate_expiry_timestamp_seconds": NOW - 1}, Severity.CRITICAL, "certificate has expired"),
        (nothing, {"websocket_stalled": 3}, Severity.INFO, "3 WebSocket clients"),
    ],
    ids=[
        *("replica", "no-replica", "breaker", "store", "queue", "overload", "limit", "client", "failed", "fallback"),
        *("degraded", "connections", "certificate", "key", "expired", "stalled"),
    ],
)  # fmt: skip
def test_of_a_gateway(act: Callable[[Metrics], None], extra: dict[str, float], severity: Severity, cause: str) -> None:
    told = [{"address": address, "trouble": "it is gone"} for address in ("a:1", "b:1")]
    found = gateway(act, extra, replicas=told, stores={"limits": "Redis is gone"})
    assert [one.severity for one in found if cause in one.cause] == [severity], found


def test_a_gateway_that_discovers_nothing() -> None:
    found = gateway(lambda metrics: metrics.forget("a:1"), {"replicas_usable": 0})
    assert [one.cause for one in found] == ["no replica is known: discovery has found none"]


def test_a_gateway_without_keys_says_so_although_it_shows_its_metrics_to_nobody() -> None:
    refused = Look("http://g:8080/metrics", None, "refuses the API key", {"key_store_empty": True})
    (found,) = diagnose([refused])
    assert (found.severity, found.runbook) == (Severity.CRITICAL, "no-keys")
    assert "the key store is empty" in found.cause
    (found,) = gateway(nothing, {'store_lost{store="keys"}': 1}, key_store_empty=True, stores={"keys": "no keys"})
    assert (found.severity, found.runbook) == (Severity.CRITICAL, "no-keys")
    (found,) = diagnose([Look("http://g:8080/metrics", None, "refuses the API key", {"not_ready": "no replica"})])
    assert (found.severity, found.cause) == (Severity.CRITICAL, "it refuses the API key; no replica")


def test_a_gateway_that_is_well_and_asks_for_a_key_is_not_down() -> None:
    (found,) = diagnose([Look("http://g:8080/metrics", None, "requires an API key", {"status": "ready"})])
    assert (found.severity, found.runbook) == (Severity.WARNING, "endpoint-down")
    assert "it requires an API key; it takes requests" in found.cause


def test_the_worst_comes_first_and_endpoints_that_are_gone_are_the_worst() -> None:
    change = Change(
        parse(exposition(WELL), 0.0), parse(exposition({**WELL, "tidewright_requests_waiting": 1}), 1.0, NOW)
    )
    found = diagnose([Look("http://t:8002/metrics", change), Look("http://u:8002/metrics", None, "can't be reached")])
    assert [one.where for one in found] == ["u:8002", "t:8002"]
