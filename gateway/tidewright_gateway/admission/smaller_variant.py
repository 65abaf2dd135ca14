"""By load: new requests for a model are answered by a smaller variant of it, which computes more tokens a second.

A rung of the degradation ladder between short answers and the fallback, with the ladder's own hysteresis. Never silent:
a log line, a metric, a header and `served_by` say so.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from tidewright.logs import event
from tidewright.resilience.degradation import Ladder, Level, Load
from tidewright_gateway.admission.ladder import tick_always
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.metrics import Metrics

if TYPE_CHECKING:
    from tidewright_gateway.models import Model
    from tidewright_gateway.openai.protocol import GenerationBody

log = logging.getLogger(__name__)

SERVED_BY = "smaller"


def can_replace(smaller: Model, whole: Model, request: GenerationBody, longest: int) -> bool:
    """Whether the variant's answer is as the model's but for its quality. `longest`: tokens of prompt and answer."""
    limit = smaller.failover.max_model_len
    if longest > limit and limit < whole.failover.max_model_len:  # else the answer would end as early at the model
        return False
    tokenizers = {model.prompts.tokenizer.fingerprint for model in (smaller, whole)}
    return len(tokenizers) == 1 or not request.has_token_ids


class SmallerVariant:
    def __init__(self, settings: GatewaySettings, whole: Model, smaller: Model, metrics: Metrics) -> None:
        self._whole, self._smaller, self._metrics = whole, smaller, metrics
        self._ladder = Ladder(settings.smaller_ladder_config())
        self._own = Ladder(settings.ladder_config())
        self._is_on = self._is_full = False
        metrics.smaller_variant(is_on=False)

    def of(self, model: Model) -> Model | None:
        """The variant, if it is to answer a new request for `model` now.

        One that is itself so loaded that its requests should go to the fallback, or that fails, would refuse what the
        model and its fallback can answer.
        """
        if not self._is_on or self._is_full or model is not self._whole:
            return None
        failover = self._smaller.failover
        return None if failover.trouble or failover.load().refuses else self._smaller

    async def run(self) -> None:
        """Runs for ever."""
        await tick_always(self.tick)

    def tick(self, now: float) -> None:
        """While it answers both loads count, or the one that falls then would bring the requests back at once."""
        load, own = self._whole.ladder.load(now), self._smaller.ladder.load(now)
        self._is_full = self._own.update(own, now).load_level >= Level.FALLBACK_ONLY
        if self._is_on:
            load = self._together(load, own)
        degradation = self._ladder.update(replace(load, breaker_open=False), now)  # which says nothing of the load
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

    def _together(self, first: Load, second: Load) -> Load:
        """What the model would have to bear without the variant, whose KV cache is a small part of the model's."""
        sizes = [model.failover.load().kv_tokens for model in (self._whole, self._smaller)]
        kv_cache = max(first.kv_cache, second.kv_cache)
        if all(sizes):
            kv_cache = first.kv_cache + second.kv_cache * sizes[1] / sizes[0]
        return replace(
            first, kv_cache=kv_cache, queue=max(first.queue, second.queue), wait=max(first.wait, second.wait)
        )
