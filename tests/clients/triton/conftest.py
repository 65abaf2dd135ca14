"""Both clients of Triton."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from helpers.both_clients import Clients


@pytest.fixture(params=["sync", "async"])
def clients(request: pytest.FixtureRequest) -> Iterator[Clients]:
    made = Clients(request.param)
    yield made
    made.stop()
