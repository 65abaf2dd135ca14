"""A gateway process in front of a replica without a model, for all tests that need no answers of sense."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.echo_replica import EchoReplica
from helpers.gateway import RunningGateway

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
