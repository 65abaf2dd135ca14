"""Replicas that come and go, as the name server or a file says; scripted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from helpers.scripted_replicas import WELL, ScriptedClient, error, generate, named, run, samples, until
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import AdapterStatus
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.replicas import discovery
from tidewright_gateway.replicas.discovery import DnsSource, Endpoint
from tidewright_gateway.replicas.failover import Failover
from tidewright_gateway.replicas.replica_set import ReplicaLoad

DNS: dict[str, Any] = {"replicas": "dns:replicas.test:1", "discovery_interval": 0.01}


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
        """Returns when the failover knows."""
        self.answer = ValueError(error) if error else list(addresses)
        asked = self.asked
        await until(lambda: self.asked > asked + 1)


def test_adapters_of_another_model_s_replica_are_nothing_to_this_one(client: type[ScriptedClient]) -> None:
    theirs, ours = AdapterStatus("theirs", "p", True, 5.0), AdapterStatus("ours", "p", True, 5.0)
    client.status["a:1"] = msgspec.structs.replace(WELL, model="another", adapters=[theirs])
    client.status["b:1"] = msgspec.structs.replace(WELL, adapters=[ours])

    async def body(failover: Failover) -> None:
        assert failover.adapters.loaded == {"ours": ours}
        assert not named(failover, "b:1").adapter_troubles  # nobody told it to load theirs

    run(body)


def test_one_that_leaves_ends_what_it_has_and_then_its_connections(
    client: type[ScriptedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    names, metrics = Names(monkeypatch, "a:1", "b:1"), Metrics()
    client.scripts = {"a:1": [[7, None], [8], [8], [8]], "b:1": [[6]] * 9, "b:1/fallback": [[5]] * 3}

    async def body(failover: Failover) -> None:
        asking = asyncio.ensure_future(generate(failover))
        await until(lambda: named(failover, "a:1").attempts)
        await names.say("b:1")
        assert named(failover, "a:1").snapshot(0, 0)["trouble"] == "leaving"
        for _ in range(3):
            assert (await generate(failover))[1].served_by == ["b:1"]
            assert (await generate(failover, fall_back=True))[1].served_by == ["b:1"]
        await asyncio.sleep(0.1)
        assert client.closed == []
        assert not asking.done()
        asking.cancel()
        await until(lambda: client.closed == ["a:1"])
        assert [replica.address for replica in failover.replicas] == ["b:1"]
        assert not [labels for _, *labels in samples(metrics) if "a:1" in labels]

    run(body, metrics, **DNS)


def test_one_that_dies_while_it_leaves_loses_no_stream(
    client: type[ScriptedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names(monkeypatch, "a:1", "b:1")
    client.scripts = {"a:1": [[7, None]], "b:1": [[8]]}

    async def body(failover: Failover) -> None:
        asking = asyncio.ensure_future(generate(failover))
        await until(lambda: named(failover, "a:1").attempts)
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

    async def body(failover: Failover) -> None:
        assert named(failover, "b:1").candidate(10, time.monotonic()).share == 1
        await names.say("a:1", "b:1")
        for _ in range(5):
            assert (await generate(failover))[1].served_by == ["b:1"]
        client.status["a:1"] = WELL
        newcomer = named(failover, "a:1")
        await until(lambda: newcomer.takes_requests)
        got = Counter([(await generate(failover))[1].served_by[0] for _ in range(110)])
        assert got == {"b:1": 100, "a:1": 10}
        newcomer.came_at -= 1800
        assert failover.snapshot()[1]["slow_start_share"] == pytest.approx(0.55, abs=0.01)

    run(body, **DNS, slow_start=3600, patience=0.05)


def test_one_that_comes_back_while_it_leaves_stays(
    client: type[ScriptedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names(monkeypatch, "a:1")
    client.scripts = {"a:1": [[7, None]]}

    async def body(failover: Failover) -> None:
        (replica,) = failover.replicas
        asking = asyncio.ensure_future(generate(failover))
        await until(lambda: replica.attempts)
        await names.say("b:1")
        assert replica.leaving
        await names.say("a:1")
        assert named(failover, "a:1") is replica
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

    async def body(failover: Failover) -> None:
        assert failover.trouble == "replicas.test can't be resolved"
        assert failover.load() == ReplicaLoad(0, 0, False, 0)
        with pytest.raises(ModelError, match="no replica can take requests"):
            await generate(failover)
        await names.say("a:1")
        await until(lambda: not failover.trouble)
        caplog.clear()
        await names.say(error="the name server is down")
        await names.say(error="the name server is down")
        assert (await generate(failover))[0] == "<7>"
        assert [record.message for record in caplog.records] == ["keeping the known replicas: the name server is down"]
        assert samples(metrics)["discovery_failures_total",] >= 3

    with caplog.at_level(logging.WARNING):
        run(body, metrics, **DNS, wait_for_replica=0.02)


def test_a_name_server_that_does_not_answer_does_not_keep_the_gateway_from_starting(
    client: type[ScriptedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look(source: DnsSource) -> list[Endpoint]:
        await asyncio.sleep(0.2)
        return [Endpoint("a:1")]

    async def body(failover: Failover) -> None:
        assert failover.trouble == "none is known yet"
        await until(lambda: not failover.trouble)

    monkeypatch.setattr(DnsSource, "look", look)
    monkeypatch.setattr("tidewright_gateway.replicas.replica_set.STATUS_TIMEOUT", 0.01)
    run(body, replicas="dns:replicas.test:1")


def test_a_file_that_changes_is_noticed_and_one_that_breaks_changes_nothing(
    client: type[ScriptedClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert discovery.FILE_INTERVAL <= 0.5
    monkeypatch.setattr(discovery.FileSource, "interval", 0.02)
    file = tmp_path / "replicas"
    file.write_text("a:1\n")

    async def body(failover: Failover) -> None:
        file.write_text("a:1*3\nb:1\n")
        await until(lambda: len(failover.replicas) == 2)
        assert {replica["address"]: replica["weight"] for replica in failover.snapshot()} == {"a:1": 3, "b:1": 1}
        file.write_text("a:1\noops\n")
        await until(lambda: "line 2: 'oops' is not HOST:PORT" in caplog.text)
        assert len(failover.replicas) == 2
        file.write_text("b:1\n")
        await until(lambda: len(failover.replicas) == 1)
        await until(lambda: client.closed == ["a:1"])

    run(body, replicas=f"file:{file}")


def test_a_replica_that_does_not_say_its_context_bounds_nothing(client: type[ScriptedClient]) -> None:
    client.status["a:1"] = msgspec.structs.replace(WELL, max_model_len=0)
    client.status["b:1"] = msgspec.structs.replace(WELL, max_model_len=100)

    async def body(failover: Failover) -> None:
        assert failover.max_model_len == 100

    run(body)
