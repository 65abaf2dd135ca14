"""When a device comes to a point of its work: by its own clock, as the host only hands the work over."""

from __future__ import annotations

import time

import torch


class Moment:
    """Of a device that works while the host waits."""

    def __init__(self) -> None:
        self._time = time.monotonic()

    def until(self, later: Moment) -> float:
        """Seconds. Both have to be over: a result that came later has arrived."""
        return later._time - self._time


class CudaMoment(Moment):
    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(torch.cuda.current_stream(device))

    def until(self, later: Moment) -> float:
        assert isinstance(later, CudaMoment)
        return self._event.elapsed_time(later._event) / 1e3
