"""Degradation under load: the ladder's level, updated by a clock."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from tidewright.logs import event
from tidewright.resilience.degradation import Degradation, Ladder, Level, Load, Route, Treatment, treatment
from tidewright_gateway.admission.queue import Queue
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.metrics.families import SIGNALS
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.replicas.failover import Failover

log = logging.getLogger(__name__)

TICK = 0.25  # seconds


async def tick_always(tick: Callable[[float], None]) -> None:
    """Calls it with the time again and again; an error ends one look at the load, not all to come."""
    while True:
        try:
            tick(time.monotonic())
        except Exception:
            log.exception("the load could not be looked at")
        await asyncio.sleep(TICK)


class LoadLadder:
    """Off unless the settings say `degradation`."""

    def __init__(
        self, settings: GatewaySettings, failover: Failover, queue: Queue, metrics: Metrics, model: str = ""
    ) -> None:
        self._model = model
        self._settings, self._failover, self._queue, self._metrics = settings, failover, queue, metrics
        self._ladder, self._ladder_of_replicas = Ladder(settings.ladder_config()), Ladder(settings.ladder_config())
        self._now = self._of_replicas = Degradation(Level.ALL_FEATURES, Level.ALL_FEATURES, ())

    @property
    def level(self) -> Level:
        return self._now.level

    async def run(self) -> None:
        """Runs for ever, so that an idle gateway recovers as well."""
        if self._settings.degradation:
            await tick_always(self.tick)

    def tick(self, now: float) -> None:
        """Updates the level. Only queueing counts as load: a long prefill takes its time on an idle server too."""
        before = self._now
        self._now = self._ladder.update(self.load(now), now)
        self._of_replicas = self._ladder_of_replicas.update(self._load_of_replicas(), now)
        if self._now != before:
            reasons = ", ".join(self._now.reasons) or "calm"
            is_worse = self._now.level > before.level
            log.log(
                logging.WARNING if is_worse else logging.INFO,
                "degradation%s: %s (%s)",
                f" of {self._model}" if self._model else "",
                self._now.level.name.lower().replace("_", " "),
                reasons,
                extra=event("degradation" if is_worse else "degradation_lifted"),
            )
            self._metrics.degraded(
                self._now.level, {signal: signal in self._now.reasons for signal in SIGNALS}, self._model
            )

    def load(self, now: float) -> Load:
        load = self._load_of_replicas()
        return replace(load, queue=max(load.queue, self._queue.share), wait=self._queue.wait(now))

    def _load_of_replicas(self) -> Load:
        load = self._failover.load()
        return Load(kv_cache=load.kv_usage, queue=load.waiting, wait=0.0, breaker_open=load.breakers_open)

    def treatment(self, max_tokens: int, *, is_guided: bool, is_next: bool) -> Treatment:
        """What a request for `max_tokens` gets. Answers with a grammar are never shortened: half of one is useless.

        Args:
            is_next: it goes before all that wait in the gateway, so how many and how long is no matter for it.

        Raises:
            ApiError: 503, it is refused.
        """
        load = self._of_replicas if is_next else self._now
        given = treatment(load, max_tokens, max_tokens if is_guided else self._settings.degrade_max_tokens)
        if given.route is Route.REFUSE:
            message = f"overloaded ({', '.join(load.reasons)}); try again later"
            raise ApiError(503, message, code="overloaded", retry_after=2, limit="degradation")
        return given
