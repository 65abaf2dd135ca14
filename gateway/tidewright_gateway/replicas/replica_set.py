"""The current replicas: discovery, health checks, selection, removal."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc

from tidewright.logs import event
from tidewright.resilience.breaker import Permit, Refusal, State
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.served_models import changed_with
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.replicas import replica as replicas
from tidewright_gateway.replicas.adapters import Adapters
from tidewright_gateway.replicas.credentials import ReplicaCredentials
from tidewright_gateway.replicas.discovery import Discovery, Endpoint, make_source
from tidewright_gateway.replicas.health import STATUS_TIMEOUT, Expected, GenerationProbes, ask_fallback, ask_status
from tidewright_gateway.replicas.replica import DECODER, FALLBACK, Attempt, Replica
from tidewright_gateway.replicas.routing import Candidate, LeastLoad, make_router

log = logging.getLogger(__name__)

IDLE_INTERVALS = 10  # of `probe_interval` between two status checks while idle
FALLBACK_INTERVAL = 5.0  # seconds between two status checks of a fallback
LOAD_TIMEOUT = 1200.0  # seconds; a large model takes minutes
WATCH_INTERVAL = 0.05  # seconds between two checks of attempts in flight


@dataclass(frozen=True)
class ReplicaLoad:
    """The first two are the minimum over all replicas, since one with room takes what comes; 0 if unknown."""

    waiting: float
    """Queued requests, as a share of the engine's queue limit."""
    kv_usage: float
    """Share of the KV cache in use."""
    breakers_open: bool
    """The breakers of all usable replicas are open."""
    in_flight: int
    """Generations of this gateway at all replicas."""
    refuses: bool = False
    """The breakers of all usable replicas let nothing through now, not even a probe."""
    kv_tokens: int = 0
    """Tokens that the KV caches have room for, together; 0 if unknown."""


class ReplicaSet:
    def __init__(self, settings: GatewaySettings, metrics: Metrics, expected: Expected, decoder: str = DECODER) -> None:
        self._decoder = decoder
        self._settings, self._metrics, self._expected = settings, metrics, expected
        self._router, self._fallback_router = make_router(settings.routing), LeastLoad()
        self._credentials = (
            ReplicaCredentials(settings.replica_ca, settings.replica_cert, settings.replica_key)
            if settings.replica_tls
            else None
        )
        self.replicas: list[Replica] = []
        """Including those that are leaving, until they are empty."""
        source = make_source(settings.replicas, settings.discovery_interval)
        self._discovery = Discovery(source, self._take, metrics.discovery_failed)
        self._probes = GenerationProbes(settings, metrics, self.replicas, self.settle)
        self._lives: dict[Replica, asyncio.Task[None]] = {}
        self._jobs: list[asyncio.Task[None]] = []
        self._started = False
        self._changed = asyncio.Event()
        self.adapters = Adapters(self, self._changed.set)

    async def start(self) -> None:
        """Discovers and checks the replicas, and keeps doing so. Call it in the event loop: gRPC needs it."""
        self._jobs.append(asyncio.create_task(self._discovery.run()))
        with suppress(asyncio.TimeoutError):  # an unresponsive name server must not block the start
            await asyncio.wait_for(self._discovery.looked.wait(), STATUS_TIMEOUT)
        first, self._started = list(self.replicas), True
        await asyncio.gather(*map(self.ask, first), self._ask_fallbacks())
        for replica in first:
            replica.came_at = -math.inf  # no slow start for replicas that were there before the gateway
            self._live(replica)
        self._jobs += map(asyncio.create_task, (self._probes.run_for_ever(), self._watch_for_ever()))
        if self._settings.fallback:
            self._jobs.append(asyncio.create_task(self._look_after_fallbacks()))
        if self._credentials:
            self._jobs.append(asyncio.create_task(self._credentials.watch(self._renew)))

    def _renew(self, credentials: grpc.ChannelCredentials) -> None:
        for replica in self.replicas:
            replica.client.renew(credentials)

    async def stop(self) -> None:
        jobs = [*self._jobs, *self._lives.values()]
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, self.adapters.stop(), return_exceptions=True)
        for replica in self.replicas:
            await replica.client.close()

    @property
    def usable(self) -> list[Replica]:
        """Replicas that may get requests; ejected ones only if there is no other."""
        well = [replica for replica in self.replicas if replica.takes_requests]
        return well or [replica for replica in self.replicas if replica.is_up]

    @property
    def trouble(self) -> str:
        """Why no replica is usable; empty if one is."""
        if self.usable:
            return ""
        known = "; ".join(f"{replica.address}: {replica.why_not}" for replica in self.replicas)
        return known or self._discovery.problem or "none is known yet"

    @property
    def capacity(self) -> int | None:
        """Total batch size of all usable replicas, in sequences; None if one does not report it."""
        sizes = [replica.status.max_running if replica.status else 0 for replica in self.usable]
        return sum(sizes) if sizes and all(sizes) else None

    def max_model_len(self, limit: int) -> int:
        """The smallest context of all replicas in tokens, at most `limit`."""
        lengths = [replica.status.max_model_len for replica in self.own if replica.status]
        return min(filter(None, lengths), default=limit)  # 0: it does not say

    @property
    def own(self) -> list[Replica]:
        """Those of this gateway's model, as far as they have said so: others may share its DNS name."""
        return [replica for replica in self.replicas if not (replica.leaving or replica.misfit)]

    @property
    def embedding_sizes(self) -> set[int]:
        """Of all replicas that have ever answered; 0 is one that generates text."""
        sizes = (replica.embedding_size for replica in self.own)
        return {size for size in sizes if size is not None}

    def snapshot(self) -> list[dict[str, Any]]:
        """Each replica for people; times in seconds."""
        now = time.monotonic()
        return [replica.snapshot(self._settings.slow_start, now) for replica in self.replicas]

    def load(self) -> ReplicaLoad:
        now = time.monotonic()
        usable = self.usable
        known = [status for replica in usable if (status := replica.fresh_status(now))]
        return ReplicaLoad(
            waiting=min((status.waiting for status in known), default=0.0),
            kv_usage=min((status.kv_usage for status in known), default=0.0),
            breakers_open=bool(usable) and all(replica.breaker.state is State.OPEN for replica in usable),
            in_flight=sum(replica.in_flight for replica in self.replicas),
            refuses=bool(usable) and all(replica.breaker.refuses(now) for replica in usable),
            kv_tokens=sum(status.kv_tokens for status in known),
        )

    def choose(
        self, prompt: Sequence[int], avoid: str, now: float, embeds: bool = False, adapter: str | None = None
    ) -> tuple[Replica, Permit] | None:
        """Selects a replica and acquires its breaker's permit; avoids `avoid` if there is another. None: no replica.

        `embeds`: one that computes embeddings instead of one that generates. `adapter`: one that has it.
        """
        able = [replica for replica in self.usable if replica.embeds == embeds and replica.has_adapter(adapter)]
        able = [replica for replica in able if replica.address != avoid] or able
        refused: Replica | None = None
        while able:
            candidates = [replica.candidate(self._settings.slow_start, now) for replica in able]
            replica = able[self._router.choose(candidates, prompt, adapter)]
            permit = replica.breaker.acquire(now)
            if not isinstance(permit, Refusal):
                return replica, permit
            refused = refused or replica
            able.remove(replica)
        # All breakers are open: a replica that may fail is better than none. No breaker counts this call.
        return (refused, Permit(-1, is_probe=False)) if refused else None

    def choose_fallback(self, length: int, avoid: Sequence[str] = ()) -> Replica | None:
        """Selects a replica by its fallback, which can be healthy where the decoder is not. `length`: tokens of prompt
        and output so far. None: there is none but those in `avoid`."""
        able = [one for one in self.own if one.address not in avoid and _takes(one, length)]
        if not able:
            return None
        candidates = [Candidate(one.address, len(one.fallbacks), None, one.weight) for one in able]
        return able[self._fallback_router.choose(candidates, [])]

    @property
    def _has_fallback(self) -> bool:
        return any(_takes(replica, 0) for replica in self.own)

    def elsewhere(self, replica: Replica, adapter: str | None) -> bool:
        """Whether another replica can take over what needs the adapter."""
        others = (other for other in self.replicas if other is not replica and other.embeds == replica.embeds)
        return any(other.takes_requests and other.has_adapter(adapter) for other in others)

    def generated(self, replica: Replica, now: float) -> None:
        """A request there got its first token."""
        replica.generated(now)
        self.settle(replica)

    def failed(self, replica: Replica, error: ModelError) -> None:
        """A request there failed. If the replica seems gone, it gets no requests until the next status check.

        That alone is no return with a slow start: most such errors are of one request.
        """
        if error.outcome in (Outcome.UNAVAILABLE, Outcome.STUB_DIED):
            replica.suspicion = error

    async def drain(self, replica: Replica) -> None:
        """Tells it to take no new requests and to end once it has finished those it has.

        Raises:
            ModelError: it did not accept that.
        """
        await replica.client.control("drain", STATUS_TIMEOUT, replica.decoder)
        await self.ask(replica)

    async def change(self, replica: Replica, load: bool) -> None:
        """Loads or unloads its model. Raises ModelError: it could not be done."""
        chain = changed_with(replica.decoder)
        for model in chain if load else reversed(chain):
            await replica.client.change(model, load, LOAD_TIMEOUT)
        await self.ask(replica)

    def settle(self, replica: Replica) -> None:
        """Call it after any change: logs whether the replica takes requests, and wakes those that wait for one."""
        if replica.suspicion or replica.takes_requests == replica.took_requests:
            return
        replica.took_requests = replica.takes_requests
        if replica.takes_requests:
            replica.came_at = time.monotonic()
        up, why_not = replica.takes_requests, replica.why_not
        extra = event("replica_up" if up else "replica_down", replica=replica.label)
        log.log(logging.INFO if up else logging.WARNING, "%s: %s", replica.label, why_not or "healthy", extra=extra)
        self._metrics.replica_is(replica.label, replica.takes_requests)
        self._changed.set()

    async def wait_for_change(self, seconds: float) -> None:
        """Waits until a replica's state changes, at most `seconds`."""
        self._changed.clear()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

    def _take(self, endpoints: Sequence[Endpoint]) -> None:
        """Takes the result of a discovery."""
        weights = {endpoint.address: endpoint.weight for endpoint in endpoints}
        for replica in self.replicas:
            replica.leaving = replica.address not in weights
            replica.weight = weights.get(replica.address, replica.weight)
            self.settle(replica)
        known = {replica.address for replica in self.replicas}
        for endpoint in endpoints:
            if endpoint.address not in known:
                settings, credentials = self._settings, self._credentials and self._credentials.current
                replica = Replica.at(endpoint, settings.channels, settings.breaker_config(), credentials, self._decoder)
                self.replicas.append(replica)
                self._metrics.replica_added(replica.label)
                self._metrics.replica_is(replica.label, False)
                self._metrics.load_is_stale(replica.label, True)
                if self._started:
                    self._live(replica)

    def _live(self, replica: Replica) -> None:
        self._lives[replica] = asyncio.create_task(self._life(replica))

    async def _life(self, replica: Replica) -> None:
        """Checks the replica until it is removed and empty."""
        while not replica.leaving or replica.in_flight:
            try:
                await self.ask(replica)
            except Exception:
                log.exception("a replica could not be asked how it is")
            await self._pause(replica)
        self.replicas.remove(replica)
        for router in (self._router, self._fallback_router):
            router.forget(replica.address)
        self._metrics.forget(replica.label)
        await replica.client.close()
        del self._lives[replica]

    async def _pause(self, replica: Replica) -> None:
        """Waits until the next status check: longer while it is healthy and nothing is in flight anywhere."""
        interval = self._settings.probe_interval
        until = time.monotonic() + min(IDLE_INTERVALS * interval, replicas.FRESH / 2)
        while True:
            await asyncio.sleep(interval)
            is_awaited = not replica.takes_requests or any(one.in_flight for one in self.replicas)
            if is_awaited or time.monotonic() >= until:
                return

    async def ask(self, replica: Replica) -> None:
        """Its status, now: the next check may be a second away."""
        await ask_status(replica, self._settings.patience, self._expected)
        self.settle(replica)
        self.adapters.heard(replica)

    async def _ask_fallbacks(self) -> None:
        if self._settings.fallback:
            await asyncio.gather(*(ask_fallback(replica, self._expected) for replica in self.replicas))

    async def _look_after_fallbacks(self) -> None:
        while True:
            await asyncio.sleep(FALLBACK_INTERVAL)
            try:
                await self._ask_fallbacks()
            except Exception:
                log.exception("a fallback could not be asked how it is")

    async def _watch_for_ever(self) -> None:
        """Abandons attempts that take too long, so that they resume elsewhere."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            now = time.monotonic()
            # If more time has passed, this process was suspended or busy, and answers may wait to be read.
            listened, last = min(now - last, 2 * WATCH_INTERVAL), now
            for replica in self.replicas:
                try:
                    self._watch(replica, listened, now)
                except Exception:
                    log.exception("the attempts at a replica could not be watched")

    def _watch(self, replica: Replica, listened: float, now: float) -> None:
        """`listened`: seconds of listening since the last check."""
        settings = self._settings
        if replica.asked_at is not None:
            replica.unanswered += min(listened, now - replica.asked_at)
            if replica.unanswered > settings.patience and not replica.is_silent:
                replica.lost(ModelError(f"no answer for {now - replica.asked_at:.1f} s", Outcome.STALLED))
                self.settle(replica)
        is_stale = replica.fresh_status(now) is None
        if is_stale != replica.load_is_stale:
            replica.load_is_stale = is_stale
            self._metrics.load_is_stale(replica.label, is_stale)
        if not replica.in_flight:
            return
        adapters = {attempt.adapter for attempt in replica.running}
        elsewhere = {adapter: self.elsewhere(replica, adapter) for adapter in adapters}
        has_fallback = self._has_fallback
        for attempt in replica.running:
            can_move = elsewhere[attempt.adapter]
            has_other = can_move or (has_fallback and attempt.adapter is None)
            if error := self._overdue(attempt, can_move, has_other, now):
                attempt.call.abandon(error)

    def _overdue(self, attempt: Attempt, elsewhere: bool, has_other: bool, now: float) -> ModelError | None:
        """The reason to abandon an attempt, if any. Without another replica, slow ones are waited for, and silent ones
        longer: a retry would only start over at the same replica. `has_other`: another replica, or a fallback."""
        settings, replica = self._settings, attempt.replica
        if expired := attempt.expired(now):
            return expired
        if attempt.model == FALLBACK:
            return attempt.overdue(settings.first_token_timeout, settings.stall_timeout, now)
        if replica.is_silent:
            # Replicas short of CPU are silent by turns: a generation that was moved from one to the next would fail.
            gives_up = elsewhere and not (attempt.is_last and not attempt.num_tokens)
            silence = settings.patience if gives_up else settings.stall_timeout
            if replica.is_stopping and not has_other:
                silence = max(silence, settings.first_token_timeout)  # it should end by itself, and nobody else can
            return replica.gone if attempt.waited(now) > silence else None
        if has_other or attempt.outlived or now - replica.lived_at > settings.stall_timeout:
            return attempt.overdue(settings.first_token_timeout, settings.stall_timeout, now)
        return None


def _takes(replica: Replica, length: int) -> bool:
    """Whether its fallback takes a sequence of `length` tokens."""
    status = replica.fallback
    return status is not None and not status.draining and length < (status.max_model_len or math.inf)
