"""What the gateway counts and times, as it happens. What it only reads now and then is in `sampling.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client.metrics import MetricWrapperBase

from tidewright import __version__
from tidewright.resilience.outcome import Outcome, Verdict
from tidewright_gateway.cache.responses import CacheState
from tidewright_gateway.metrics.busiest import OTHER, Busiest
from tidewright_gateway.metrics.registry import Registry
from tidewright_gateway.probes import is_probe

_PROMOTIONS_OF_WORKERS = 4  # times `busiest_keys`: their series stay for ever
_MOST_ADAPTERS = 64  # with series of their own, since the process began
_MAX_LABEL = 128  # characters
_FAILURES = [outcome for outcome in Outcome if outcome.verdict is Verdict.FAILURE]
_API_PATHS = ("/tokenize", "/detokenize")


class Metrics:
    def __init__(self, model: str = "", busiest_keys: int = 20) -> None:
        """`busiest_keys`: maximum number of keys with series of their own."""
        self.registry = registry = Registry()
        limit = _PROMOTIONS_OF_WORKERS * busiest_keys if registry.is_shared else float("inf")
        self.keys = Busiest(busiest_keys, self._demoted, limit)
        self._requests = registry.counter("requests_total")
        self._outcomes = registry.counter("request_outcomes_total")
        self._active = registry.gauge("requests_active", "livesum")
        self._duration = registry.histogram("request_duration_seconds")
        self._ttft = registry.histogram("time_to_first_token_seconds")
        self._tpot = registry.histogram("time_per_output_token_seconds")
        self._overhead = registry.histogram("overhead_seconds")
        self._tokens = registry.counter("tokens_total")
        self._cached_tokens = registry.counter("cached_tokens_total")
        self._streams = registry.gauge("streams_open", "livesum")
        self._key_requests = registry.counter("key_requests_total")
        self._key_tokens = registry.counter("key_tokens_total")
        self._key_refusals = registry.counter("key_refusals_total")
        self._refusals = registry.counter("refusals_total")
        self._adapter_requests = registry.counter("adapter_requests_total")
        self._adapters: set[str] = set()
        self._queue_wait = registry.histogram("queue_wait_seconds")
        self._degradation = registry.gauge("degradation_level", "livemax")
        self._reasons = registry.gauge("degradation_reason", "livemax")
        self._smaller_variant = registry.gauge("smaller_variant", "livemax")
        self._cache = registry.counter("cache_requests_total")
        self._up = registry.gauge("replica_up", "livemin")
        self._stale = registry.gauge("replica_load_stale", "livemax")
        self._attempts = registry.counter("attempts_total")
        self._failures = registry.counter("attempt_failures_total")
        self._moved = registry.counter("streams_moved_total")
        self._retries = registry.counter("retries_total")
        self._refused_retries = registry.counter("retries_refused_total")
        self._probes = registry.counter("generation_probes_total")
        self._lookups_failed = registry.counter("discovery_failures_total")
        self._spans_exported = registry.counter("spans_exported_total")
        self._spans_dropped = registry.counter("spans_dropped_total")
        self._connections = registry.gauge("websocket_connections", "livesum")
        self._log_lines_dropped = registry.counter("log_lines_dropped_total")
        registry.gauge("info", "livemax").labels(__version__, model).set(1)
        self._levels: dict[str, tuple[int, Mapping[str, bool]]] = {}
        self._series: dict[tuple[Any, ...], Any] = {}

    def text(self) -> bytes:
        """For Prometheus."""
        return self.registry.text()

    def log_lines_dropped(self, number: int) -> None:
        self._log_lines_dropped.inc(number)

    def _of(self, metric: MetricWrapperBase, *labels: str) -> Any:
        """The series with these labels; prometheus_client's own lookup takes a microsecond, ten times as long."""
        key = (metric, *labels)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = metric.labels(*labels)
        return series

    def _remove(self, labels: dict[str, str], *metrics: MetricWrapperBase) -> None:
        if not self.registry.is_shared:  # prometheus_client can't remove series of several processes
            for metric in metrics:
                metric.remove_by_labels(labels)
            self._series.clear()

    # Requests.

    def began(self) -> None:
        self._active.inc()

    def ended(self, path: str, status: int, seconds: float, key_id: str, code: str, limit: str) -> None:
        """`code`: of the error, if it ended with one; `limit`: what refused it, if a limit did."""
        self._active.dec()
        self._of(self._requests, path, str(status), code).inc()
        self._of(self._duration, path).observe(seconds)
        outcome = _outcome(status, code, limit)
        if path.startswith("/v1/") or path in _API_PATHS:
            self._of(self._outcomes, outcome).inc()
        if limit:
            self._of(self._refusals, limit).inc()
        if is_probe(path):
            return  # or monitoring would be among the busiest keys
        key = self.keys.name(key_id[:_MAX_LABEL])
        self._of(self._key_requests, key, outcome).inc()
        if limit:
            self._of(self._key_refusals, key, limit).inc()

    def adapter_asked(self, name: str) -> None:
        if len(self._adapters) < _MOST_ADAPTERS:
            self._adapters.add(name)
        self._of(self._adapter_requests, name if name in self._adapters else OTHER).inc()

    def refused_connection(self) -> None:
        self._of(self._refusals, "max_connections").inc()

    def asked(self, overhead: float) -> None:
        self._overhead.observe(overhead)

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def time_per_output_token(self, seconds: float) -> None:
        self._tpot.observe(seconds)

    def tokens(self, key_id: str, prompt: int, cached: int, completion: int) -> None:
        key = self.keys.label(key_id[:_MAX_LABEL])
        for kind, count in (("prompt", prompt), ("completion", completion)):
            self._of(self._tokens, kind).inc(count)
            self._of(self._key_tokens, key, kind).inc(count)
        self._cached_tokens.inc(cached)

    def stream(self, kind: str, change: int) -> None:
        """`kind`: sse or websocket; `change`: of the number of open ones."""
        self._of(self._streams, kind).inc(change)

    def connected(self, change: int) -> None:
        """`change`: of the number of WebSocket connections."""
        self._connections.inc(change)

    def _demoted(self, key: str) -> None:
        self._remove({"key_id": key}, self._key_requests, self._key_tokens, self._key_refusals)

    # Traces. From the exporter's thread, too.

    def spans_exported(self, count: int) -> None:
        self._spans_exported.inc(count)

    def spans_dropped(self, reason: str, count: int) -> None:
        self._of(self._spans_dropped, reason).inc(count)

    # Admission and cache.

    def queued(self, priority_class: str, seconds: float) -> None:
        self._of(self._queue_wait, priority_class).observe(seconds)

    def degraded(self, level: int, reasons: Mapping[str, bool], model: str = "") -> None:
        """`reasons`: each signal, and whether it holds the level. Of several models, the worst is shown."""
        self._levels[model] = (level, reasons)
        self._degradation.set(max(level for level, _ in self._levels.values()))
        for signal in reasons:
            self._of(self._reasons, signal).set(any(reasons[signal] for _, reasons in self._levels.values()))

    def smaller_variant(self, *, is_on: bool) -> None:
        self._smaller_variant.set(is_on)

    def cache(self, state: CacheState) -> None:
        self._of(self._cache, state.value.lower()).inc()

    # Replicas.

    def attempt(self, replica: str, model: str) -> None:
        self._of(self._attempts, replica, model).inc()

    def attempt_failed(self, replica: str, model: str, outcome: Outcome) -> None:
        self._of(self._failures, replica, model, outcome.label).inc()

    def moved(self) -> None:
        self._moved.inc()

    def retried(self) -> None:
        self._retries.inc()

    def retry_refused(self, reason: str) -> None:
        self._of(self._refused_retries, reason).inc()

    def replica_added(self, replica: str) -> None:
        """Its failures are series from now on: Prometheus does not see those grow that begin with their first."""
        for outcome in _FAILURES:
            self._of(self._failures, replica, "decoder", outcome.label)

    def replica_is(self, replica: str, up: bool) -> None:
        self._of(self._up, replica).set(up)

    def load_is_stale(self, replica: str, stale: bool) -> None:
        self._of(self._stale, replica).set(stale)

    def generation_probed(self, replica: str, outcome: Outcome) -> None:
        self._of(self._probes, replica, outcome.label).inc()

    def discovery_failed(self) -> None:
        self._lookups_failed.inc()

    def forget(self, replica: str) -> None:
        """It is gone for good: where addresses change, the list would grow for ever."""
        of_replica = (self._attempts, self._failures, self._up, self._stale, self._probes)
        self._remove({"replica": replica}, *of_replica)


def _outcome(status: int, code: str, limit: str) -> str:
    """One of OUTCOMES."""
    if limit and status in (429, 503):
        return "limited" if status == 429 else "overloaded"
    if status == 499:
        return "disconnected"
    if status >= 500 or (code and status < 400):  # or a stream that ended with an error
        return "failed"
    return "client_error" if status >= 400 else "ok"
