"""Which requests are answered when: some at once, the others in rounds that leave the processor to the model.

On a CPU every response of a stream takes time from the model: in this process, in Triton's and in the client's. Tokens
that come between two rounds leave together. First tokens and ends never wait for a round.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tidewright.bridge.active_request import ActiveRequest

LONGEST_WAIT = 0.1  # seconds between two rounds, at most


@dataclass(frozen=True, eq=False)
class Reply:
    """An answer to something else than a request for text."""

    send: Callable[[], None]


Job = ActiveRequest | Reply


class Outgoing:
    """Jobs that have something to send, in order of arrival. `changed` guards it, and its owner waits on it."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._urgent: dict[Job, None] = {}
        self._others: dict[Job, None] = {}
        self._next_round = 0.0  # time.monotonic()
        self._stopped = False
        self.share = 1.0
        """Of one core, what sending may take; from 1.0 on, nothing waits."""

    def add(self, job: Job, urgent: bool) -> None:
        """With `changed` held."""
        if urgent:
            self._others.pop(job, None)
        elif job in self._urgent:
            return
        waiting = self._urgent if urgent else self._others
        if not waiting:  # else whoever takes them knows, and must not be woken at each step
            self._changed.notify_all()
        waiting[job] = None

    def discard(self, job: Job) -> None:
        """With `changed` held: it has ended."""
        self._urgent.pop(job, None)
        self._others.pop(job, None)

    def stop(self) -> None:
        """With `changed` held: `take` gives out what there is, and then nothing."""
        self._stopped = True
        self._changed.notify_all()

    def take(self) -> list[Job]:
        """With `changed` held: wait for jobs to do now; none once it is stopped."""
        while not self._urgent and not self._stopped:
            wait = self._next_round - time.monotonic() if self._others else None
            if wait is not None and wait <= 0:
                break
            self._changed.wait(wait)
        jobs = list(self._urgent)
        self._urgent.clear()
        if self._stopped or time.monotonic() >= self._next_round:
            jobs += self._others
            self._others.clear()
        return jobs

    def sent(self, took: float) -> None:
        """A round took so many seconds. For the thread that takes."""
        wait = min(took * (1 / self.share - 1), LONGEST_WAIT) if self.share < 1 else 0.0
        self._next_round = time.monotonic() + wait
