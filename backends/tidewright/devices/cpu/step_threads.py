"""The threads that steps compute with: as many as this process may use, fewer while other processes use the cores."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Protocol

import torch

from tidewright.cores import cpu_quota, usable_threads
from tidewright.devices.cpu.kernels import thread_ids
from tidewright.devices.cpu.processor_waits import ProcessorWaits
from tidewright.devices.cpu.thread_count import ThreadCount
from tidewright.logs import event

WINDOW = 0.1  # seconds of steps that are judged together
_PART = WINDOW / 10  # seconds of steps after which waits are read
_PAUSE = 0.005  # seconds between two steps; after a longer one, what the thread that runs them waited for is not theirs

log = logging.getLogger(__name__)


class Waits(Protocol):
    def seconds(self) -> float:
        """In which threads were ready to run without a processor, since the last call."""


def set_threads(asked: int, sharers: int) -> int:
    """Lets torch and the kernels use `asked` threads; 0: as many as one of `sharers` processes can keep busy here."""
    threads = asked or min(torch.get_num_threads(), usable_threads(sharers))
    torch.set_num_threads(threads)
    return threads


def processor_waits() -> Waits | None:
    """For kernels that are loaded; None where Linux does not tell."""
    waits = ProcessorWaits(thread_ids, cpu_quota())
    return waits if waits.known else None


class StepThreads:
    """To be used on the thread that runs the steps. `most` is what it has now; without `waits` that stays."""

    def __init__(self, most: int, waits: Waits | None) -> None:
        self._waits = waits
        self._count = ThreadCount(most)
        self._seconds = self._waited = 0.0  # in this window, as far as waits have been read
        self._unread = 0.0  # seconds of steps since
        self._ended = 0.0  # the last step

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around each step."""
        began = time.monotonic()
        waits = self._waits if self._count.most > 1 else None
        if waits and began - self._ended > _PAUSE:
            waits.seconds()
            self._unread = 0.0
        yield
        now = self._ended = time.monotonic()
        self._unread += now - began
        if waits and self._unread >= _PART:
            self._waited += waits.seconds()
            self._seconds += self._unread
            self._unread = 0.0
            if self._seconds >= WINDOW:
                self._judge(now)

    def _judge(self, now: float) -> None:
        before, settled = self._count.current, self._count.settled
        self._count.observe(now, self._seconds, self._waited)
        self._seconds = self._waited = 0.0
        if self._count.current != before:
            torch.set_num_threads(self._count.current)
        if self._count.settled != settled:
            why = "other processes use" if self._count.settled < settled else "other processes leave"
            numbers = self._count.settled, self._count.most
            log.info("%s the cores: steps compute with %d of %d threads", why, *numbers, extra=event("threads_changed"))
