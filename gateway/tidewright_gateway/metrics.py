"""The gateway's own Prometheus metrics, at /metrics. What the replicas measure stays at their own endpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from tidewright.resilience.outcome import Outcome
from tidewright_gateway.cache.responses import CacheState

_OfWorkers = Literal["livesum", "livemin", "livemax"]
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
_OVERHEAD = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)


class Metrics:
    """Prefix `tidewright_gateway_`; times in seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests_total", "Requests that ended, by path and status.", "path", "status")
        self._active = self._gauge("livesum", "requests_active", "Requests that run or wait.")
        self._duration = self._histogram("request_seconds", "From the request to its last byte.", _SECONDS, "path")
        self._ttft = self._histogram("first_token_seconds", "From the request to its first token.", _SECONDS)
        self._overhead = self._histogram(
            "overhead_seconds",
            "What the gateway itself took, until it sent the request on or let it wait.",
            _OVERHEAD,
        )
        self._tokens = self._counter("tokens_total", "Tokens, by kind: prompt or completion.", "kind")
        self._attempts = self._counter(
            "attempts_total", "Generations that a replica was asked for.", "replica", "model"
        )
        self._failures = self._counter(
            "attempt_failures_total", "Those that failed there, by outcome.", "replica", "model", "outcome"
        )
        self._moved = self._counter("streams_moved_total", "Streams that went on at another replica.")
        self._refused = self._counter("retries_refused_total", "Retries that were not made, by reason.", "reason")
        self._connections = self._gauge("livesum", "websocket_connections", "WebSocket connections that are open.")
        self._up = self._gauge("livemin", "replica_up", "1 if it can be sent requests.", "replica")
        self._stale = self._gauge(
            "livemax",
            "replica_load_stale",
            "1 if it did not say lately how much load it has, so only requests count.",
            "replica",
        )
        self._probes = self._counter(
            "generation_probes_total",
            "Tokens that a replica was asked for to see if it can, by outcome.",
            "replica",
            "outcome",
        )
        self._lookups_failed = self._counter(
            "discovery_failures_total", "Looks for the replicas, by DNS or in a file, that found nothing of use."
        )
        self._degradation = self._gauge(
            "livemax", "degradation_level", "0 all features, 1 short answers, 2 fallback only, 3 requests are refused."
        )
        self._reasons = self._gauge("livemax", "degradation_reason", "1 if this signal holds the level.", "signal")
        self._stores = self._gauge(
            "livemax", "store_lost", "1 if the store of keys, limits or responses can't be used as it should.", "store"
        )
        self._cache = self._counter(
            "cache_total", "Generations, by what the cache did: hit, shared, miss, bypass.", "state"
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tidewright_gateway_{name}", text, labels, registry=self.registry)

    def _gauge(self, mode: _OfWorkers, name: str, text: str, *labels: str) -> Gauge:
        """`mode`: what several workers together show."""
        return Gauge(f"tidewright_gateway_{name}", text, labels, registry=self.registry, multiprocess_mode=mode)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"tidewright_gateway_{name}", text, labels, buckets=buckets, registry=self.registry)

    def degraded(self, level: int, reasons: Mapping[str, bool]) -> None:
        """`reasons`: each signal, and whether it holds the level."""
        self._degradation.set(level)
        for signal, holds in reasons.items():
            self._reasons.labels(signal).set(holds)

    def store_lost(self, store: str, lost: bool) -> None:
        self._stores.labels(store).set(lost)

    def cache(self, state: CacheState) -> None:
        self._cache.labels(state.value.lower()).inc()

    def text(self) -> bytes:
        """Of all workers, if this is one of several."""
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if not folder:
            return generate_latest(self.registry)
        for file in Path(folder).glob("gauge_live*.db"):
            pid = int(file.stem.rpartition("_")[2])
            if not psutil.pid_exists(pid):
                mark_process_dead(pid, folder)
        registry = CollectorRegistry()
        MultiProcessCollector(registry, folder)
        return generate_latest(registry)

    def began(self) -> None:
        self._active.inc()

    def ended(self, path: str, status: int, seconds: float) -> None:
        self._active.dec()
        self._requests.labels(path, str(status)).inc()
        self._duration.labels(path).observe(seconds)

    def asked(self, overhead: float) -> None:
        self._overhead.observe(overhead)

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def tokens(self, prompt: int, completion: int) -> None:
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("completion").inc(completion)

    def attempt(self, replica: str, model: str) -> None:
        self._attempts.labels(replica, model).inc()

    def attempt_failed(self, replica: str, model: str, outcome: Outcome) -> None:
        self._failures.labels(replica, model, outcome.label).inc()

    def moved(self) -> None:
        self._moved.inc()

    def retry_refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def connected(self, change: int) -> None:
        """`change`: of the number of WebSocket connections."""
        self._connections.inc(change)

    def replica_is(self, replica: str, up: bool) -> None:
        self._up.labels(replica).set(up)

    def load_is_stale(self, replica: str, stale: bool) -> None:
        self._stale.labels(replica).set(stale)

    def generation_probed(self, replica: str, outcome: Outcome) -> None:
        self._probes.labels(replica, outcome.label).inc()

    def discovery_failed(self) -> None:
        self._lookups_failed.inc()

    def forget(self, replica: str) -> None:
        """It is gone for good: where addresses change, the list would grow for ever."""
        for metric in (self._attempts, self._failures, self._up, self._stale, self._probes):
            metric.remove_by_labels({"replica": replica})
