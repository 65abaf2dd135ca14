"""Whom the gateway's own queue degrades."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tidewright.resilience.degradation import Route
from tidewright_gateway.admission.ladder import LoadLadder
from tidewright_gateway.admission.queue import Queue
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.replicas.replica_set import ReplicaLoad

LATER = 1e9  # on any clock
CALM = ReplicaLoad(waiting=0.0, kv_usage=0.0, breakers_open=False, in_flight=0)


def test_what_waits_in_the_gateway_degrades_only_who_waits_behind_it() -> None:
    async def main() -> None:
        queue, replicas = Queue(lambda: 1, 100), SimpleNamespace(now=CALM)
        failover: Any = SimpleNamespace(load=lambda: replicas.now)
        ladder = LoadLadder(GatewaySettings(degrade_dwell=10), failover, queue, Metrics())
        place = await queue.enter("flood", 1, LATER)
        waiting = asyncio.create_task(queue.enter("flood", 1, LATER))
        await asyncio.sleep(0)

        def treated(caller: str, priority: int) -> Route:
            is_next = queue.is_next(caller, priority)
            return ladder.treatment(9, is_guided=False, is_next=is_next).route

        ladder.tick(asyncio.get_running_loop().time() + 1e6)
        for caller, priority in (("flood", 1), ("other", 2)):
            with pytest.raises(ApiError, match=r"overloaded \(wait\)"):
                treated(caller, priority)
        assert [treated("other", 1), treated("flood", 0)] == [Route.DECODER] * 2
        replicas.now = ReplicaLoad(waiting=1.0, kv_usage=0.0, breakers_open=False, in_flight=0)
        ladder.tick(asyncio.get_running_loop().time() + 1e6)
        with pytest.raises(ApiError, match=r"overloaded \(queue\)"):
            treated("other", 1)
        place.leave()
        (await waiting).leave()

    asyncio.run(main())
