"""Replicas that come and go, are probed, and get their share; scripted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from helpers.scripted_replicas import WELL, ScriptedClient, error, generate, named, run, script_replicas, until
from tidewright.failsafe.models import ModelError
from tidewright.resilience.breaker import State
from tidewright.resilience.deadline import Deadline
from tidewright.resilience.outcome import Outcome
from tidewright.schema import SamplingParams
from tidewright_gateway import discovery
from tidewright_gateway.cluster import Cluster, Task
from tidewright_gateway.discovery import DnsSource, Endpoint
from tidewright_gateway.fleet import ClusterLoad
from tidewright_gateway.metrics import Metrics

PROBES = {"generation_probe_interval": 0.05, "generation_probe_timeout": 0.05}


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedClient]:
    return script_replicas(monkeypatch)


class Names:
    """What the name server says: addresses, or an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
        self.answer: list[str] | ValueError = list(addresses)
        self.asked = 0
        names = self

        async def look(source: DnsSource) -> list[Endpoint]:
            names.asked += 1
            if isinstance(names.answer, ValueError):
                raise names.answer
            return [Endpoint(address) for address in names.answer]

        monkeypatch.setattr(DnsSource, "look", look)

    async def say(self, *addresses: str, error: str = "") -> None:
        """Returns when the cluster knows."""
        self.answer = ValueError(error) if error else list(addresses)
        asked = self.asked
        await until(lambda: self.asked > asked + 1)


DNS: dict[str, Any] = {"replicas": "dns:replicas.test:1", "discovery_interval": 0.01}


def figures(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """By name without prefix and values of labels, which come in the order of their names."""
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            key = (sample.name.removeprefix("tidewright_gateway_"), *sample.labels.values())
            found[key] = sample.value
    return found


def test_one_that_leaves_ends_what_it_has_and_then_its_connections(
    client: type[ScriptedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    names, metrics = Names(monkeypatch, "a:1", "b:1"), Metrics()
    client.scripts = {"a:1": [[7, None], [8], [8], [8]], "b:1": [[6]] * 9, "b:1/fallback": [[5]] * 3}

    async def body(cluster: Cluster) -> None:
        asking = asyncio.ensure_future(generate(cluster))
        await until(lambda: named(cluster, "a:1").attempts)
        await names.say("b:1")
        assert named(cluster, "a:1").snapshot(0, 0)["trouble"] == "leaving"
        for _ in range(3):
            assert (await generate(cluster))[1].served_by == ["b:1"]
            assert (await generate(cluster, fall_back=True))[1].served_by == ["b:1"]
        await asyncio.sleep(0.1)
        assert client.closed == []
        assert not asking.done()
        asking.cancel()
        await until(lambda: client.closed == ["a:1"])
        assert [replica.address for replica in cluster.replicas] == ["b:1"]
        assert not [labels for _, *labels in figures(metrics) if "a:1" in labels]

    run(body, metrics, **DNS)


def test_one_that_dies_while_it_leaves_loses_no_stream(
    client: type[ScriptedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names(monkeypatch, "a:1", "b:1")
    client.scripts = {"a:1": [[7, None]], "b:1": [[8]]}

    async def body(cluster: Cluster) -> None:
        asking = asyncio.ensure_future(generate(cluster))
        await until(lambda: named(cluster, "a:1").attempts)
        await names.say("b:1")
        client.status["a:1"] = error(Outcome.UNAVAILABLE)
        assert (await asking)[0] == "<7><8>"

    run(body, **DNS)


def test_one_that_comes_is_asked_before_it_gets_anything(
    client: type[ScriptedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names(monkeypatch, "b:1")
    client.scripts = {"a:1": [[7]] * 50, "b:1": [[8]] * 150}
    client.status["a:1"] = None  # no answer yet

    async def body(cluster: Cluster) -> None:
        assert named(cluster, "b:1").candidate(10, time.monotonic()).share == 1
        await names.say("a:1", "b:1")
        for _ in range(5):
            assert (await generate(cluster))[1].served_by == ["b:1"]
        client.status["a:1"] = WELL
        newcomer = named(cluster, "a:1")
        await until(lambda: newcomer.takes_requests)
        got = Counter([(await generate(cluster))[1].served_by[0] for _ in range(110)])
        assert got == {"b:1": 100, "a:1": 10}
        newcomer.came_at -= 1800
        assert cluster.snapshot()[1]["slow_start_share"] == pytest.approx(0.55, abs=0.01)

    run(body, **DNS, slow_start=3600, patience=0.05)


def test_one_that_comes_back_while_it_leaves_stays(
    client: type[ScriptedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names(monkeypatch, "a:1")
    client.scripts = {"a:1": [[7, None]]}

    async def body(cluster: Cluster) -> None:
        (replica,) = cluster.replicas
        asking = asyncio.ensure_future(generate(cluster))
        await until(lambda: replica.attempts)
        await names.say("b:1")
        assert replica.leaving
        await names.say("a:1")
        assert named(cluster, "a:1") is replica
        assert replica.takes_requests
        asking.cancel()
        await until(lambda: client.closed == ["b:1"])
        assert client.closed == ["b:1"]

    run(body, **DNS)


def test_a_failed_lookup_keeps_what_is_known_and_is_logged_once(
    client: type[ScriptedClient], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names, metrics = Names(monkeypatch), Metrics()
    names.answer = ValueError("replicas.test can't be resolved")
    client.scripts = {"a:1": [[7]] * 9}

    async def body(cluster: Cluster) -> None:
        assert cluster.trouble == "replicas.test can't be resolved"
        assert cluster.load() == ClusterLoad(0, 0, 0, False, 0)
        with pytest.raises(ModelError, match=r"no replica can take requests .*resolved"):
            await generate(cluster)
        await names.say("a:1")
        await until(lambda: not cluster.trouble)
        caplog.clear()
        await names.say(error="the name server is down")
        await names.say(error="the name server is down")
        assert (await generate(cluster))[0] == "<7>"
        assert [record.message for record in caplog.records] == [
            "the replicas stay as they are: the name server is down"
        ]
        assert figures(metrics)["discovery_failures_total",] >= 3

    with caplog.at_level(logging.WARNING):
        run(body, metrics, **DNS, wait_for_replica=0.02)


def test_a_name_server_that_does_not_answer_does_not_keep_the_gateway_from_starting(
    client: type[ScriptedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look(source: DnsSource) -> list[Endpoint]:
        await asyncio.sleep(0.2)
        return [Endpoint("a:1")]

    async def body(cluster: Cluster) -> None:
        assert cluster.trouble == "none is known yet"
        await until(lambda: not cluster.trouble)

    monkeypatch.setattr(DnsSource, "look", look)
    monkeypatch.setattr("tidewright_gateway.fleet.STATUS_TIMEOUT", 0.01)
    run(body, replicas="dns:replicas.test:1")


def test_a_file_that_changes_is_noticed_and_one_that_breaks_changes_nothing(
    client: type[ScriptedClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert discovery.FILE_INTERVAL <= 0.5
    monkeypatch.setattr(discovery.FileSource, "interval", 0.02)
    file = tmp_path / "replicas"
    file.write_text("a:1\n")

    async def body(cluster: Cluster) -> None:
        file.write_text("a:1*3\nb:1\n")
        await until(lambda: len(cluster.replicas) == 2)
        assert {replica["address"]: replica["weight"] for replica in cluster.snapshot()} == {"a:1": 3, "b:1": 1}
        file.write_text("a:1\noops\n")
        await until(lambda: "line 2: 'oops' is not HOST:PORT" in caplog.text)
        assert len(cluster.replicas) == 2
        file.write_text("b:1\n")
        await until(lambda: len(cluster.replicas) == 1)
        await until(lambda: client.closed == ["a:1"])

    run(body, replicas=f"file:{file}")


def test_one_that_says_it_is_well_but_generates_nothing_is_ejected_until_it_does(client: type[ScriptedClient]) -> None:
    metrics = Metrics()
    client.probes["b:1"] = [None]
    client.scripts = {"a:1": [[7]] * 9}

    async def body(cluster: Cluster) -> None:
        bad = named(cluster, "b:1")
        await until(lambda: bad.ejected)
        assert bad.failed_probes >= 3
        assert "generates nothing (no token within 0.05 s)" in cluster.snapshot()[0]["trouble"]
        for _ in range(3):
            assert (await generate(cluster))[1].served_by == ["a:1"]
        client.probes["b:1"] = [1]
        await until(lambda: bad.takes_requests)
        assert bad.candidate(10, time.monotonic()).share < 0.5  # slow start
        assert bad.probe_took is not None
        found = figures(metrics)
        assert found["generation_probes_total", "first_token_timeout", "b:1"] >= 3
        assert found["generation_probes_total", "success", "b:1"] >= 1
        assert found["generation_probes_total", "success", "a:1"] >= 1

    run(body, metrics, **PROBES, generation_probe_failures=3)


@pytest.mark.parametrize(
    "script", [[error(Outcome.OVERLOADED)], [error(Outcome.INVALID)], [error(Outcome.CANCELLED)], [1]]
)
def test_what_says_nothing_against_a_replica_ejects_none(client: type[ScriptedClient], script: list[Any]) -> None:
    client.probes = {"a:1": script, "b:1": script}

    async def body(cluster: Cluster) -> None:
        await until(lambda: len(client.probed) >= 12)
        counts = Counter(client.probed)
        assert abs(counts["a:1"] - counts["b:1"]) <= 1
        assert [replica.failed_probes for replica in cluster.replicas] == [0, 0]

    run(body, **PROBES)


def test_probes_never_eject_all(client: type[ScriptedClient]) -> None:
    broken = error(Outcome.ENGINE_FAILED)
    client.probes = {"a:1": [broken], "b:1": [broken]}
    client.scripts = {"a:1": [[7]] * 3, "b:1": [[7]] * 3}

    async def body(cluster: Cluster) -> None:
        await until(lambda: all(replica.ejected for replica in cluster.replicas))
        assert cluster.trouble == ""
        served_by = (await generate(cluster))[1].served_by
        # It did generate, so it is the one that is well now, until probes say else.
        assert [replica.address for replica in cluster.replicas if not replica.ejected] == served_by

    run(body, **PROBES)


def test_a_request_that_goes_well_saves_the_probe(client: type[ScriptedClient]) -> None:
    client.scripts["b:1"] = [[7]]

    async def body(cluster: Cluster) -> None:
        (replica,), probes = cluster.replicas, cluster._fleet._probes
        await generate(cluster)
        assert probes._next(replica.generated_at + 3599) is None
        assert probes._next(replica.generated_at + 3601) is replica

    run(body, replicas="b:1", generation_probe_interval=3600)


def test_a_request_that_gets_tokens_overrules_a_probe_that_does_not(client: type[ScriptedClient]) -> None:
    client.probes["b:1"] = [None]
    client.scripts["b:1"] = [[7]]

    async def body(cluster: Cluster) -> None:
        (replica,) = cluster.replicas
        probing = asyncio.create_task(cluster._fleet._probes.probe(replica))
        await until(lambda: client.probed)
        await generate(cluster)
        await probing
        assert (replica.failed_probes, replica.ejected) == (0, None)

    run(body, replicas="b:1", generation_probe_timeout=0.3, generation_probe_failures=1)


def test_one_whose_probe_hangs_is_not_probed_again_meanwhile_and_others_are(client: type[ScriptedClient]) -> None:
    client.probes["b:1"] = [None]

    async def body(cluster: Cluster) -> None:
        await until(lambda: client.probed.count("a:1") >= 3)
        assert client.probed.count("b:1") == 1

    run(body, generation_probe_interval=0.05, generation_probe_timeout=60)


def test_none_is_probed_that_says_that_it_is_not_well_or_where_it_is_switched_off(client: type[ScriptedClient]) -> None:
    client.status["b:1"] = msgspec.structs.replace(WELL, draining=True)

    async def body(cluster: Cluster) -> None:
        await until(lambda: len(client.probed) >= 3)
        assert set(client.probed) == {"a:1"}

    run(body, **PROBES)
    client.probed.clear()
    run(lambda _: asyncio.sleep(0.1), generation_probe_interval=0)
    assert client.probed == []


def test_a_breaker_that_closes_begins_the_slow_start_anew(client: type[ScriptedClient]) -> None:
    client.scripts["b:1"] = [[error(Outcome.ENGINE_FAILED)]] * 5 + [[7]] * 2

    async def body(cluster: Cluster) -> None:
        (replica,) = cluster.replicas
        for _ in range(5):
            with pytest.raises(ModelError):
                await generate(cluster)
        assert replica.breaker.state is State.OPEN
        assert cluster.load().breakers_open
        await asyncio.sleep(0.06)
        await generate(cluster)
        assert replica.breaker.state is State.CLOSED
        assert not cluster.load().breakers_open
        assert cluster.snapshot()[0]["slow_start_share"] < 0.2

    run(body, replicas="b:1", retry_max_attempts=1, breaker_cool_down=0.05, slow_start=3600)


def test_one_that_breaks_a_connection_gets_nothing_until_it_is_asked_and_has_its_share_at_once(
    client: type[ScriptedClient],
) -> None:
    client.scripts = {"b:1": [[error(Outcome.UNAVAILABLE)], [8]], "a:1": [[7]] * 9}

    async def body(cluster: Cluster) -> None:
        client.status["b:1"] = None  # it is asked, and has not answered yet
        bad = named(cluster, "b:1")
        await until(lambda: bad.asked_at)
        for _ in range(6):
            assert (await generate(cluster))[0] == "<7>"
        assert len(client.orders) == 7
        assert "scripted" in cluster.snapshot()[0]["trouble"]
        cluster._fleet.settle(bad)  # as after any look at the replicas
        client.status["b:1"] = WELL
        await until(lambda: bad.takes_requests)
        assert bad.candidate(10, time.monotonic()).share == 1
        assert "b:1" in [(await generate(cluster))[1].served_by[0] for _ in range(2)]

    run(body, patience=60)


def test_a_gateway_that_is_busy_itself_takes_no_replica_for_gone(client: type[ScriptedClient]) -> None:
    async def body(cluster: Cluster) -> None:
        replica = cluster.replicas[0]
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
    async def body(cluster: Cluster) -> int:
        replica = cluster.replicas[0]
        client.scripts[replica.address] = [[*range(40)]]
        task = Task("r", [1, 2], SamplingParams(), Deadline())
        client.status[replica.address] = None
        await until(lambda: replica.asked_at)
        async with aclosing(cluster.generate(task)) as replies:
            async for _ in replies:
                assert replica.is_up
                await asyncio.sleep(0.02)
        assert client.status[replica.address] is None
        await until(lambda: not replica.is_up)
        return len(task.served_by)

    assert run(body, patience=0.3, replicas="b:1") == 1


def test_the_load_is_that_of_the_one_with_the_most_room(client: type[ScriptedClient]) -> None:
    full = msgspec.structs.replace(WELL, waiting=0.9, kv_usage=0.8, wait=7.0, active=3)
    client.status = {
        "a:1": full,
        "b:1": msgspec.structs.replace(WELL, waiting=0.5, kv_usage=0.9, wait=3.0, active=2),
        "c:1": msgspec.structs.replace(WELL, trouble="it restarts"),
    }
    client.scripts = {"a:1": [[7, None]]}

    async def body(cluster: Cluster) -> None:
        asking = asyncio.ensure_future(generate(cluster))
        await until(lambda: cluster.load().in_flight)
        assert cluster.load() == ClusterLoad(waiting=0.5, kv_usage=0.8, wait=3.0, breakers_open=False, in_flight=1)
        asking.cancel()

    run(body, replicas="a:1,b:1,c:1", routing="round_robin")


def test_a_replica_whose_load_is_not_known_is_shown(
    client: type[ScriptedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidewright_gateway.replica.FRESH", 0.1)
    metrics = Metrics()

    async def body(cluster: Cluster) -> None:
        await until(lambda: figures(metrics)["replica_load_stale", "b:1"] == 0)
        client.status["b:1"] = None
        await until(lambda: figures(metrics)["replica_load_stale", "b:1"] == 1)
        assert figures(metrics)["replica_load_stale", "a:1"] == 0
        stale, known = cluster.snapshot()
        assert (stale["load"], stale["takes_requests"], known["load"]) == (None, True, 0)

    run(body, metrics, patience=60)


def test_the_snapshot_is_json(client: type[ScriptedClient]) -> None:
    async def body(cluster: Cluster) -> None:
        first = msgspec.json.decode(msgspec.json.encode(cluster.snapshot()))[0]
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
        }

    run(body, replicas="b:1*2,a:1")
