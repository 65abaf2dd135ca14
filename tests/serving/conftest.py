from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil
import pytest

from helpers.processes import Serve, shared_memory


@pytest.fixture
def serve() -> Iterator[type[Serve]]:
    """Starts servers; whatever a failed test leaves is ended."""
    started: list[Serve] = []

    class Tracked(Serve):
        def __init__(self, *options: str) -> None:
            super().__init__(*options)
            started.append(self)

    before = shared_memory()
    yield Tracked
    for one in started:
        for process in [*one.family, psutil.Process(one.process.pid)] if one.process.poll() is None else one.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    assert shared_memory() <= before
