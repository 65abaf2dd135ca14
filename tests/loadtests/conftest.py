"""A gateway in front of an echoing replica with a fixed pace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.echo_replica import EchoReplica
from helpers.gateway import RunningGateway
from helpers.load_tests import PAUSE


@pytest.fixture(scope="session")
def paced() -> Iterator[EchoReplica]:
    with EchoReplica() as replica:
        replica.pause = PAUSE
        yield replica


@pytest.fixture(scope="session")
def paced_gateway(model_dir: Path, paced: EchoReplica) -> Iterator[RunningGateway]:
    with RunningGateway(model_dir, paced) as gateway:
        yield gateway
