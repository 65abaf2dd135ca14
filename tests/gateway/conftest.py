"""What tests of the gateway share: a gateway with an echoing replica, scripted replicas, a Redis, key stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.echo_replica import EchoReplica
from helpers.gateway import RunningGateway
from helpers.redis import RunningRedis
from helpers.scripted_replicas import ScriptedClient, script_replicas
from tidewright_gateway.admission.limits import remote
from tidewright_gateway.auth import keyring

TIMEOUT = 1.0  # seconds, of the gateway's reading and sending


@pytest.fixture(scope="session")
def echo() -> Iterator[EchoReplica]:
    with EchoReplica(limit=50) as replica:
        yield replica


@pytest.fixture(scope="session")
def echo_gateway(model_dir: Path, echo: EchoReplica) -> Iterator[RunningGateway]:
    options = {"read_timeout": TIMEOUT, "send_timeout": TIMEOUT, "max_body": 32 * 2**20}
    with RunningGateway(model_dir, echo, **options) as gateway:
        yield gateway


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedClient]:
    return script_replicas(monkeypatch)


@pytest.fixture(scope="session")
def redis() -> Iterator[RunningRedis]:
    """For tests that neither kill it nor leave it frozen."""
    with RunningRedis() as running:
        yield running


@pytest.fixture(params=["file", pytest.param("redis", marks=pytest.mark.redis)])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store of API keys with nothing in it."""
    if request.param == "file":
        return str(tmp_path / "keys.yaml")
    server = request.getfixturevalue("redis")
    server.client.flushall()
    return server.url


@pytest.fixture
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    assert keyring.POLL_INTERVAL <= 0.5  # a change is to count within a second
    monkeypatch.setattr(keyring, "POLL_INTERVAL", 0.02)


@pytest.fixture
def patient_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine is not a store that is gone; where that is meant, connections break, or the test says so."""
    monkeypatch.setattr(remote, "TIMEOUT", 3600)


@pytest.fixture
def quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TICK", 0.05)
