"""How much of what is asked for can be given now, and when its turn is: the degradation ladder and the queue."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from tidewright.resilience.degradation import Ladder, Level, Load, Route, Treatment, treatment
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright_gateway.admission.queue import Queue
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.replicas.failover import Failover, Generation, timed_out


class Admission:
    def __init__(self, settings: GatewaySettings, cluster: Failover, metrics: Metrics) -> None:
        self._settings, self._cluster, self._metrics = settings, cluster, metrics
        self._ladder = Ladder(settings.ladder_config())
        self._gate = Queue(self._capacity, settings.max_queue)
        self._level = Level.ALL_FEATURES

    def _capacity(self) -> int:
        usable = sum(replica.takes_requests for replica in self._cluster.replicas)
        return self._settings.max_running * max(usable, 1)  # without any, those that wait for one count

    def treatment(self, max_tokens: int) -> Treatment:
        """What a request gets that asks for `max_tokens`, by the load as of now.

        Raises:
            ApiError: 503, it is refused.
        """
        now, load = time.monotonic(), self._cluster.load()
        degradation = self._ladder.update(
            Load(
                kv_cache=load.kv_usage,
                queue=max(load.waiting, self._gate.share),
                wait=max(load.wait, self._gate.wait(now)),
                breaker_open=load.breakers_open,
            ),
            now,
        )
        self._level = degradation.level
        self._metrics.degraded(degradation.level)
        given = treatment(degradation, max_tokens, self._settings.degrade_max_tokens)
        if given.route is Route.REFUSE:
            reasons = ", ".join(degradation.reasons)
            raise ApiError(503, f"too much load ({reasons}); try again later", code="overloaded", retry_after=2)
        return given

    @asynccontextmanager
    async def place(self, task: Generation, caller: str, priority: int) -> AsyncGenerator[None, None]:
        """Among those that run at one time.

        Raises:
            ModelError: OVERLOADED, or REQUEST_TIMEOUT: there was none in time.
        """
        until = min(time.monotonic() + self._settings.queue_timeout, task.deadline.at)
        try:
            async with self._gate.place(caller, priority, until):
                yield
        except ModelError as error:
            if error.outcome is Outcome.OVERLOADED and task.deadline.expired(time.monotonic()):
                raise timed_out(error) from None
            raise

    def snapshot(self) -> dict[str, Any]:
        gate = self._gate
        return {"level": self._level.name.lower(), "running": gate.num_running, "waiting": gate.num_waiting}
