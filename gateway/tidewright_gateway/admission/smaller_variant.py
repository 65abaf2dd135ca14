"""By load: new requests for a model are answered by a smaller variant of it, which computes more tokens a second.

A rung of the degradation ladder between short answers and the fallback, with the ladder's own hysteresis. Never silent:
a log line, a metric, a header and `served_by` say so.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from tidewright.logs import event
from tidewright.resilience.degradation import Ladder, Load
from tidewright_gateway.admission.ladder import TICK
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.metrics import Metrics

if TYPE_CHECKING:
    from tidewright_gateway.models import Model

log = logging.getLogger(__name__)

SERVED_BY = "smaller"


class SmallerVariant:
    def __init__(self, settings: GatewaySettings, whole: Model, smaller: Model, metrics: Metrics) -> None:
        self._whole, self._smaller, self._metrics = whole, smaller, metrics
        self._ladder = Ladder(settings.smaller_ladder_config())
        self._is_on = False
        metrics.smaller_variant(is_on=False)

    def of(self, model: Model) -> Model | None:
        """The variant, if it is to answer a new request for `model` now."""
        if not self._is_on or model is not self._whole or self._smaller.failover.trouble:
            return None
        return self._smaller

    async def run(self) -> None:
        """Runs for ever."""
        while True:
            self.tick(time.monotonic())
            await asyncio.sleep(TICK)

    def tick(self, now: float) -> None:
        """Both loads count, or the one that falls once requests go elsewhere would bring them back at once."""
        first, second = self._whole.ladder.load(now), self._smaller.ladder.load(now)
        load = Load(
            kv_cache=max(first.kv_cache, second.kv_cache),
            queue=max(first.queue, second.queue),
            wait=max(first.wait, second.wait),
            breaker_open=False,  # which says nothing of the load
        )
        degradation = self._ladder.update(load, now)
        if (is_on := degradation.level > 0) == self._is_on:
            return
        self._is_on = is_on
        self._metrics.smaller_variant(is_on=is_on)
        if is_on:
            reasons = ", ".join(degradation.reasons)
            log.warning(
                "degradation: %s answers new requests for %s (%s)",
                self._smaller.name,
                self._whole.name,
                reasons,
                extra=event("degradation"),
            )
        else:
            log.info(
                "degradation: %s answers its requests itself again", self._whole.name, extra=event("degradation_lifted")
            )
