"""One real gateway in front of one real Triton, for all clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.gateway import RunningGateway
from helpers.triton import RunningServer


@pytest.fixture(scope="session")
def gateway(model_dir: Path, server: RunningServer) -> Iterator[RunningGateway]:
    with RunningGateway(model_dir, server) as running:
        yield running
