"""What the gateway reads now and then for its metrics: lengths, states, sizes, and how late the event loop is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Generic, TypeVar

from tidewright.resilience.breaker import State
from tidewright_gateway.http import certificates
from tidewright_gateway.http.connection import PatientProtocol
from tidewright_gateway.metrics.families import PRIORITY_CLASSES
from tidewright_gateway.models import Models
from tidewright_gateway.parts import Parts

log = logging.getLogger(__name__)

LAG_INTERVAL = 0.25  # seconds
SAMPLES_EVERY = 4  # of these
REBALANCES_EVERY = 240

K = TypeVar("K")


class Sampler:
    def __init__(self, parts: Parts, certificate: str) -> None:
        """`certificate`: its file; empty without TLS."""
        self._parts, self._certificate = parts, certificate
        self._metrics, registry = parts.metrics, parts.metrics.registry
        self._queue_length = registry.gauge("queue_length", "livesum")
        self._places = registry.gauge("queue_places", "livesum")
        self._running = registry.gauge("generations_running", "livesum")
        self._cache_bytes = registry.gauge("cache_bytes", "livesum")
        self._usable = registry.gauge("replicas_usable", "livemin")
        self._in_flight = registry.gauge("replica_in_flight", "livesum")
        self._breakers = registry.gauge("breaker_state", "livemax")
        self._changes = registry.counter("breaker_transitions_total")
        self._budget = registry.gauge("retry_budget", "livesum")
        self._stores = registry.gauge("store_lost", "livemax")
        self._unchecked = registry.counter("limits_unchecked_total")
        self._key_expiry = registry.gauge("key_expiry_timestamp_seconds", "livemax")
        self._certificate_expiry = registry.gauge("certificate_expiry_timestamp_seconds", "livemax")
        self._connections = registry.gauge("connections_open", "livesum")
        self._credits = registry.gauge("websocket_credits", "livesum")
        self._stalled = registry.gauge("websocket_stalled", "livesum")
        self._unsent = registry.gauge("websocket_unsent_bytes", "livesum")
        self._lag = registry.histogram("event_loop_lag_seconds")
        self._changes_seen, self._unchecked_seen = _Growth[tuple[str, str]](), _Growth[str]()
        self._replicas: set[str] = set()

    async def run(self) -> None:
        """Runs for ever."""
        loop, tick = asyncio.get_running_loop(), 0
        while True:
            due = loop.time() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            self._lag.observe(max(loop.time() - due, 0.0))
            tick += 1
            try:
                # A process on its own samples when it is scraped; of several, only one is.
                if self._metrics.registry.is_shared and tick % SAMPLES_EVERY == 0:
                    self.sample()
                if tick % REBALANCES_EVERY == 0:
                    self._metrics.keys.rebalance()
            except Exception:
                log.exception("the metrics could not be sampled")

    def sample(self) -> None:
        """Brings what is only read now and then up to date."""
        parts = self._parts
        queues = [model.queue for model in parts.models]
        for name in PRIORITY_CLASSES:
            self._queue_length.labels(name).set(sum(queue.waiting_by_class[name] for queue in queues))
        self._places.set(sum(queue.capacity for queue in queues))
        self._running.set(parts.models.num_running)
        self._cache_bytes.set(parts.cache.num_bytes)
        for store, trouble in parts.stores.items():
            self._stores.labels(store).set(bool(trouble))
        for _, growth in self._unchecked_seen.of({"": parts.limiter.without_store}):
            self._unchecked.inc(growth)
        self._key_expiry.set(parts.authenticator.next_expiry)
        self._certificate_expiry.set(certificates.expiry(self._certificate) if self._certificate else 0)
        self._connections.set(PatientProtocol.open_connections)
        flow = parts.hub.flow()
        self._credits.set(flow.credits)
        self._stalled.set(flow.stalled)
        self._unsent.set(flow.unsent_bytes)
        self._sample_replicas(parts.models)

    def _sample_replicas(self, models: Models) -> None:
        now, changes = time.monotonic(), Counter[tuple[str, str]]()
        self._usable.set(models.num_usable)
        self._budget.set(models.retry_budget())
        labels_now = {replica.label for replica in models.replicas}
        for replica in models.replicas:
            breaker = replica.breaker.snapshot(now)
            for state in State:
                self._breakers.labels(replica.label, state.value).set(breaker.state is state)
            for (old, new), count in breaker.transitions.items():
                changes[replica.label, f"{old.value}_{new.value}"] = count
            self._in_flight.labels(replica.label).set(replica.in_flight)
        for labels, growth in self._changes_seen.of(changes):
            self._changes.labels(*labels).inc(growth)
        for label in self._replicas - labels_now:
            if not self._metrics.registry.is_shared:
                for metric in (self._breakers, self._changes, self._in_flight):
                    metric.remove_by_labels({"replica": label})
        self._replicas = labels_now


class _Growth(Generic[K]):
    """Of counts that are kept elsewhere."""

    def __init__(self) -> None:
        self._seen: dict[K, int] = {}

    def of(self, counts: Mapping[K, int]) -> list[tuple[K, int]]:
        """How much each has grown since the last call. One that is less than before counts from zero again."""
        grown = []
        for key, count in counts.items():
            seen = self._seen.get(key, 0)
            grown.append((key, count - seen if count >= seen else count))
        self._seen = dict(counts)
        return grown
