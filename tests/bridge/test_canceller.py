"""bridge/canceller.py: what Triton is asked, and when."""

from __future__ import annotations

import logging
import threading

import pytest

from tidewright.bridge.canceller import Canceller

PATIENCE = 20.0  # seconds


def test_when_it_stops_triton_is_asked_nothing_more() -> None:
    """A question that is open when the process ends makes tritonserver abort."""
    asked: list[str] = []

    def is_loaded() -> bool:
        asked.append("loaded")
        return True

    canceller = Canceller(threading.Condition(), [], lambda request: None, is_loaded, lambda: None)
    canceller.start()
    canceller.stop(PATIENCE)
    assert not canceller.alive
    assert asked == []


@pytest.mark.parametrize(("error", "is_shown"), [("Server not ready", False), ("something else", True)])
def test_a_triton_that_is_ending_is_no_fault(caplog: pytest.LogCaptureFixture, error: str, is_shown: bool) -> None:
    asked = threading.Event()

    def is_loaded() -> bool:
        asked.set()
        raise RuntimeError(error)

    class Asked:
        """A request that Triton is not asked about."""

        askable = False

    canceller = Canceller(threading.Condition(), [Asked()], lambda request: None, is_loaded, lambda: None)  # type: ignore[list-item]
    with caplog.at_level(logging.INFO):
        canceller.start()
        assert asked.wait(PATIENCE)
        canceller.stop(PATIENCE)
    (record,) = caplog.records
    assert bool(record.exc_info) is is_shown
    assert (record.levelno >= logging.WARNING) is is_shown
