"""When a device comes to a point of its work: by its own clock, as the host only hands the work over."""

from __future__ import annotations

import time

import torch


class Moment:
    """Of a device that works while the host waits."""

    def __init__(self) -> None:
        self._time = time.monotonic()

    def until(self, later: Moment) -> float:
        """Seconds. Waits until the later one is over."""
        return later._time - self._time


class CudaMoment(Moment):
    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(torch.cuda.current_stream(device))

    def until(self, later: Moment) -> float:
        assert isinstance(later, CudaMoment)
        later._event.synchronize()  # of a step that sends nothing back, nobody has waited for
        return self._event.elapsed_time(later._event) / 1e3
