"""What share of the requests a replica gets, when it counts as gone, and what is shown of its load; scripted."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import msgspec
import pytest

from helpers.scripted_replicas import WELL, ScriptedClient, error, generate, named, run, samples, until
from tidewright.resilience.breaker import State
from tidewright.resilience.deadline import Deadline
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import SamplingParams
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.replicas.failover import Failover, Generation
from tidewright_gateway.replicas.replica_set import ReplicaLoad


def test_a_breaker_that_closes_begins_the_slow_start_anew(client: type[ScriptedClient]) -> None:
    client.scripts["b:1"] = [[error(Outcome.ENGINE_FAILED)]] * 5 + [[7]] * 2

    async def body(failover: Failover) -> None:
        (replica,) = failover.replicas
        for _ in range(5):
            with pytest.raises(ModelError):
                await generate(failover)
        assert replica.breaker.state is State.OPEN
        assert failover.load().breakers_open
        await asyncio.sleep(0.06)
        await generate(failover)
        assert replica.breaker.state is State.CLOSED
        assert not failover.load().breakers_open
        assert failover.snapshot()[0]["slow_start_share"] < 0.2

    run(body, replicas="b:1", retry_max_attempts=1, breaker_cool_down=0.05, slow_start=3600)


def test_one_that_breaks_a_connection_gets_nothing_until_it_is_asked_and_has_its_share_at_once(
    client: type[ScriptedClient],
) -> None:
    client.scripts = {"b:1": [[error(Outcome.UNAVAILABLE)], [8]], "a:1": [[7]] * 9}

    async def body(failover: Failover) -> None:
        client.status["b:1"] = None  # it is asked, and has not answered yet
        bad = named(failover, "b:1")
        await until(lambda: bad.asked_at)
        for _ in range(6):
            assert (await generate(failover))[0] == "<7>"
        assert len(client.requests) == 7
        assert "scripted" in failover.snapshot()[0]["trouble"]
        failover._set.settle(bad)  # as after any look at the replicas
        client.status["b:1"] = WELL
        await until(lambda: bad.takes_requests)
        assert bad.candidate(10, time.monotonic()).share == 1
        assert "b:1" in [(await generate(failover))[1].served_by[0] for _ in range(2)]

    run(body, patience=60)


def test_a_gateway_that_is_busy_itself_takes_no_replica_for_gone(client: type[ScriptedClient]) -> None:
    async def body(failover: Failover) -> None:
        replica = failover.replicas[0]
        client.status[replica.address] = None
        await until(lambda: replica.asked_at)
        for _ in range(4):
            time.sleep(0.4)  # as a thousand requests at once would keep it
            await asyncio.sleep(0.06)
            assert replica.is_up
        client.status[replica.address] = WELL
        await until(lambda: replica.asked_at is None)

    run(body, patience=1.2)


def test_one_that_generates_is_not_gone_if_it_has_no_time_to_say_so(client: type[ScriptedClient]) -> None:
    async def body(failover: Failover) -> int:
        replica = failover.replicas[0]
        client.scripts[replica.address] = [[*range(40)]]
        generation = Generation("r", [1, 2], SamplingParams(), Deadline())
        client.status[replica.address] = None
        await until(lambda: replica.asked_at)
        async with aclosing(failover.generate(generation)) as replies:
            async for _ in replies:
                assert replica.is_up
                await asyncio.sleep(0.02)
        assert client.status[replica.address] is None
        await until(lambda: not replica.is_up)
        return len(generation.served_by)

    assert run(body, patience=0.3, replicas="b:1") == 1


def test_the_load_is_that_of_the_one_with_the_most_room(client: type[ScriptedClient]) -> None:
    full = msgspec.structs.replace(WELL, waiting=0.9, kv_usage=0.8, wait=7.0, active=3)
    client.status = {
        "a:1": full,
        "b:1": msgspec.structs.replace(WELL, waiting=0.5, kv_usage=0.9, wait=3.0, active=2),
        "c:1": msgspec.structs.replace(WELL, trouble="it restarts"),
    }
    client.scripts = {"a:1": [[7, None]]}

    async def body(failover: Failover) -> None:
        asking = asyncio.ensure_future(generate(failover))
        await until(lambda: failover.load().in_flight)
        assert failover.load() == ReplicaLoad(waiting=0.5, kv_usage=0.8, breakers_open=False, in_flight=1)
        asking.cancel()

    run(body, replicas="a:1,b:1,c:1", routing="round_robin")


def test_a_replica_whose_load_is_not_known_is_shown(
    client: type[ScriptedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidewright_gateway.replicas.replica.FRESH", 0.1)
    metrics = Metrics()

    async def body(failover: Failover) -> None:
        await until(lambda: samples(metrics)["replica_load_stale", "b:1"] == 0)
        client.status["b:1"] = None
        await until(lambda: samples(metrics)["replica_load_stale", "b:1"] == 1)
        # Of a:1 it is known again with each status, which may take longer than what counts as fresh here.
        await until(lambda: samples(metrics)["replica_load_stale", "a:1"] == 0)
        await until(lambda: [one["load"] for one in failover.snapshot()] == [None, 0])
        assert failover.snapshot()[0]["takes_requests"]

    run(body, metrics, patience=60)


def test_the_snapshot_is_json(client: type[ScriptedClient]) -> None:
    async def body(failover: Failover) -> None:
        first = msgspec.json.decode(msgspec.json.encode(failover.snapshot()))[0]
        assert first.pop("status_seconds") >= 0
        assert first == {
            "address": "b:1",
            "weight": 2,
            "takes_requests": True,
            "trouble": "",
            "draining": False,
            "leaving": False,
            "breaker": "closed",
            "in_flight": 0,
            "others_in_flight": 0,
            "load": 0,
            "generation_probe_seconds": None,
            "failed_generation_probes": 0,
            "slow_start_share": 1,
            "adapters": [],
            "adapter_troubles": {},
        }

    run(body, replicas="b:1*2,a:1")
