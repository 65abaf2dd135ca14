"""bridge/canceller.py: what Triton is asked, and when."""

from __future__ import annotations

import threading

from tidewright.bridge.canceller import Canceller

PATIENCE = 20.0  # seconds


def test_when_it_stops_triton_is_asked_nothing_more() -> None:
    """A question that is open when the process ends makes tritonserver abort."""
    asked: list[str] = []

    def is_loaded() -> bool:
        asked.append("loaded")
        return True

    canceller = Canceller(threading.Condition(), [], lambda call: None, is_loaded, lambda: None)
    canceller.start()
    canceller.stop(PATIENCE)
    assert not canceller.alive
    assert asked == []
