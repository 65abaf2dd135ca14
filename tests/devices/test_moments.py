"""devices/moments.py without a GPU: events of CUDA have to be waited for before they tell a time."""

from __future__ import annotations

import pytest
import torch

from tidewright.devices.moments import CudaMoment


class Event:
    """As torch's, of a device that is late: who has not waited for an event gets an error instead of a time."""

    def __init__(self, enable_timing: bool) -> None:
        self.is_over = False

    def record(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        self.is_over = True

    def elapsed_time(self, later: Event) -> float:
        if not later.is_over:
            raise RuntimeError("Both events must be completed before calculating elapsed time")
        return 1500.0


def test_a_step_that_sends_nothing_back_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a prompt, or a step on another rank: nobody has waited for the device before."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    began, ended = (CudaMoment(torch.device("cuda")) for _ in range(2))
    assert began.until(ended) == 1.5
