"""Keeps steps short for a tenant whose next request may come at any time. For rank 0: it reads arrivals and costs.

A first token waits for the step in flight and then for its own, which is as long as it would be alone: so it comes
within twice that time if the step in flight takes no longer. That is what this bounds: the prompts of the others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from tidewright.engine.fairness import FairQueue
from tidewright.engine.pace import StepPace
from tidewright.engine.sequence import Sequence
from tidewright.engine.step_cost import StepCost

WINDOW = 60.0  # seconds after its last request, in which a tenant may come again
MOST = 16  # tenants that are remembered, the latest
IN_FLIGHT = 0.75  # of the time that the newcomer's prompt takes alone; the rest is for the streams beside its own step
# Prompts take so many times what a step takes without them, if there are enough: short steps are inefficient, and
# this bounds what they cost.
WORTH = 3.0
_NEWEST = 0.25  # weight of a tenant's newest prompt in its usual length


class _Seen(NamedTuple):
    at: float
    tokens: float  # of its prompts, less what the prefix cache has


class Newcomers:
    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._seen: dict[str, _Seen] = {}  # by tenant, the latest last

    def submitted(self, sequence: Sequence, now: float) -> None:
        tenant = sequence.sampling.tenant
        tokens = float(max(len(sequence.prompt_token_ids) - sequence.likely_cached, 1))
        if before := self._seen.pop(tenant, None):
            tokens = before.tokens + _NEWEST * (tokens - before.tokens)
        elif len(self._seen) == MOST:
            del self._seen[next(iter(self._seen))]
        self._seen[tenant] = _Seen(now, tokens)

    def shorten(self, pace: StepPace, running: int, waiting: FairQueue, now: float) -> StepPace:
        """`pace`, with a bound for prompts of tenants that are not new. While there is one tenant, as it is."""
        seen = self._seen
        while seen and next(iter(seen.values())).at < now - WINDOW:
            del seen[next(iter(seen))]
        if len(seen) < 2 or pace.seconds == math.inf or not self._cost.is_known:
            return pace
        # One whose requests wait gets its share of the steps, however long they are.
        shortest = min((one.tokens for tenant, one in seen.items() if not waiting.is_behind(tenant)), default=math.inf)
        if shortest == math.inf:
            return pace
        decode, alone = self._cost.decode(running), self._cost.decode(1) + self._cost.prompt(0, int(shortest))
        others = max(IN_FLIGHT * alone - decode, WORTH * decode)
        return msgspec.structs.replace(pace, others=min(others, pace.seconds))
