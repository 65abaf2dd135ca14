"""Replicas that are probed by generations, and what a failed probe costs them; scripted."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import msgspec
import pytest

from helpers.scripted_replicas import WELL, ScriptedClient, error, generate, named, run, samples, until
from tidewright.resilience.outcome import Outcome
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.replicas.failover import Failover

PROBES = {"generation_probe_interval": 0.05, "generation_probe_timeout": 0.05}


def test_one_that_says_it_is_well_but_generates_nothing_is_ejected_until_it_does(client: type[ScriptedClient]) -> None:
    metrics = Metrics()
    client.probes["b:1"] = [None]
    client.scripts = {"a:1": [[7]] * 9}

    async def body(failover: Failover) -> None:
        bad = named(failover, "b:1")
        await until(lambda: bad.ejected)
        assert bad.failed_probes >= 3
        assert "generates nothing (no token within 0.05 s)" in failover.snapshot()[0]["trouble"]
        for _ in range(3):
            assert (await generate(failover))[1].served_by == ["a:1"]
        client.probes["b:1"] = [1]
        await until(lambda: bad.takes_requests)
        assert bad.candidate(10, time.monotonic()).share < 0.5  # slow start
        assert bad.probe_took is not None
        found = samples(metrics)
        assert found["generation_probes_total", "first_token_timeout", "b:1"] >= 3
        assert found["generation_probes_total", "success", "b:1"] >= 1
        assert found["generation_probes_total", "success", "a:1"] >= 1

    run(body, metrics, **PROBES, generation_probe_failures=3)


@pytest.mark.parametrize(
    "script", [[error(Outcome.OVERLOADED)], [error(Outcome.INVALID)], [error(Outcome.CANCELLED)], [1]]
)
def test_what_says_nothing_against_a_replica_ejects_none(client: type[ScriptedClient], script: list[Any]) -> None:
    client.probes = {"a:1": script, "b:1": script}

    async def body(failover: Failover) -> None:
        await until(lambda: len(client.probed) >= 12)
        counts = Counter(client.probed)
        assert abs(counts["a:1"] - counts["b:1"]) <= 1
        assert [replica.failed_probes for replica in failover.replicas] == [0, 0]

    run(body, **PROBES)


def test_probes_never_eject_all(client: type[ScriptedClient]) -> None:
    broken = error(Outcome.ENGINE_FAILED)
    client.probes = {"a:1": [broken], "b:1": [broken]}
    client.scripts = {"a:1": [[7]] * 3, "b:1": [[7]] * 3}

    async def body(failover: Failover) -> None:
        await until(lambda: all(replica.ejected for replica in failover.replicas))
        assert failover.trouble == ""
        served_by = (await generate(failover))[1].served_by
        # It did generate, so it is the one that is well now, until probes say else.
        assert [replica.address for replica in failover.replicas if not replica.ejected] == served_by

    run(body, **PROBES)


def test_a_request_that_goes_well_saves_the_probe(client: type[ScriptedClient]) -> None:
    client.scripts["b:1"] = [[7]]

    async def body(failover: Failover) -> None:
        (replica,), probes = failover.replicas, failover._set._probes
        await generate(failover)
        assert probes._next(replica.generated_at + 3599) is None
        assert probes._next(replica.generated_at + 3601) is replica

    run(body, replicas="b:1", generation_probe_interval=3600)


def test_a_request_that_gets_tokens_overrules_a_probe_that_does_not(client: type[ScriptedClient]) -> None:
    client.probes["b:1"] = [None]
    client.scripts["b:1"] = [[7]]

    async def body(failover: Failover) -> None:
        (replica,) = failover.replicas
        probing = asyncio.create_task(failover._set._probes.probe(replica))
        await until(lambda: client.probed)
        await generate(failover)
        await probing
        assert (replica.failed_probes, replica.ejected) == (0, None)

    run(body, replicas="b:1", generation_probe_timeout=0.3, generation_probe_failures=1)


def test_one_whose_probe_hangs_is_not_probed_again_meanwhile_and_others_are(client: type[ScriptedClient]) -> None:
    client.probes["b:1"] = [None]

    async def body(failover: Failover) -> None:
        await until(lambda: client.probed.count("a:1") >= 3)
        assert client.probed.count("b:1") == 1

    run(body, generation_probe_interval=0.05, generation_probe_timeout=60)


def test_none_is_probed_that_says_that_it_is_not_well_or_where_it_is_switched_off(client: type[ScriptedClient]) -> None:
    client.status["b:1"] = msgspec.structs.replace(WELL, draining=True)

    async def body(failover: Failover) -> None:
        await until(lambda: len(client.probed) >= 3)
        assert set(client.probed) == {"a:1"}

    run(body, **PROBES)
    client.probed.clear()
    run(lambda _: asyncio.sleep(0.1), generation_probe_interval=0)
    assert client.probed == []
