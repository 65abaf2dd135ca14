"""loadtests/driver.py: what the line of progress says."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from loadtests.driver import Run, progress
from loadtests.samples import Sample


@pytest.mark.parametrize(
    ("options", "begins"),
    [
        ({"requests": 0, "duration": 60.0}, "    0 of 60 s  4 users  1 requests  0.1/s"),
        ({"requests": 40, "duration": 3600.0}, "    0 s  4 users  1 requests of 40  0.1/s"),
    ],
)
def test_progress_says_what_ends_the_test(options: dict[str, Any], begins: str) -> None:
    """Also when the clocks of the workers, which date the samples, are ahead."""
    sample = Sample(time.time() + 5.0, "http", "chat", "", 10, 10, 0.2, 0.4, 0.1)
    run = SimpleNamespace(samples=[sample], options=SimpleNamespace(shape="steady", users=4, **options))
    assert progress(cast("Run", run)).startswith(begins)
