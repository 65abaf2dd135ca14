"""One real gateway in front of one real Triton, for all clients; and one that asks for keys, for Tidewright's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.gateway import RunningGateway
from helpers.keyed_gateway import Keyed, keyed_gateway
from helpers.triton import RunningServer


@pytest.fixture(scope="session")
def gateway(model_dir: Path, server: RunningServer) -> Iterator[RunningGateway]:
    with RunningGateway(model_dir, server) as running:
        yield running


@pytest.fixture(scope="session")
def keyed(model_dir: Path, server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    with keyed_gateway(model_dir, server, tmp_path_factory.mktemp("keys")) as running:
        yield running
