"""Kills parts of the replicas by SIGKILL, at seeded times, never both replicas at once.

Promises hold as long as one replica works. So the next kill waits until the gateway has both again: what is drawn is
the pause after that, which replica, and what.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import psutil

VICTIMS = {"engine": 5, "stub of decoder": 3, "tritonserver": 2}
"""And how often each is killed, for one of the others."""
MOST_TRITONS = 2  # within the window; `tidewright serve` gives up at the fourth end of a tritonserver
WINDOW = 600.0  # seconds
WHOLE_PATIENCE = 180.0  # seconds for a replica to come back
NOTICED_AFTER = 1.0  # seconds from a kill until the gateway has had the time to notice


class Target(Protocol):
    def find(self, replica: int, what: str) -> psutil.Process | None: ...
    def wait_whole(self, seconds: float) -> bool: ...


@dataclass(frozen=True)
class Kill:
    at: float
    """Seconds since the epoch."""
    what: str
    replica: int
    recovered_after: float | None
    """Seconds until the gateway had all replicas again; None: it had not."""


class Schedule:
    """What is killed next; the same for the same seed."""

    def __init__(self, seed: int, pause: float, replicas: int) -> None:
        self._rng = random.Random(f"{seed} kills")
        self._pause, self._replicas = pause, replicas
        self._tritons: list[tuple[int, float]] = []

    def next(self, now: float) -> tuple[float, str, int]:
        """Seconds to wait, the victim, and the replica from 0. `now`: a clock in seconds."""
        pause = self._pause * self._rng.uniform(0.5, 1.5)
        replica = self._rng.randrange(self._replicas)
        (victim,) = self._rng.choices(list(VICTIMS), list(VICTIMS.values()))
        # A stub that is killed while it holds a lock takes its tritonserver with it, so it may count as one.
        recent = sum(1 for one, at in self._tritons if one == replica and at > now - WINDOW)
        if victim != "engine":
            if recent >= MOST_TRITONS:
                victim = "engine"
            else:
                self._tritons.append((replica, now))
        return pause, victim, replica


class Killer:
    """In a thread of its own, from `start` to `stop`."""

    def __init__(self, target: Target, schedule: Schedule, say: Callable[[str], None]) -> None:
        self._target, self._schedule, self._say = target, schedule, say
        self.kills: list[Kill] = []
        self.failure = ""
        """Why it ended before it was told to."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kills", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when what was killed last is back."""
        self._over.set()
        self._thread.join(WHOLE_PATIENCE + 10)

    def _run(self) -> None:
        while not self.failure:
            pause, victim, replica = self._schedule.next(time.monotonic())
            if self._over.wait(pause):
                return
            self._kill(victim, replica)

    def _kill(self, victim: str, replica: int) -> None:
        process = self._target.find(replica, victim)
        if process is None:
            return
        self._say(f"killing {victim} of replica {replica + 1} (process {process.pid})")
        at, began = time.time(), time.monotonic()
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        time.sleep(NOTICED_AFTER)
        whole = self._target.wait_whole(WHOLE_PATIENCE)
        passed = round(time.monotonic() - began, 2)
        self.kills.append(Kill(at, victim, replica + 1, passed if whole else None))
        if not whole:
            self.failure = f"{victim} of replica {replica + 1} was killed, and is not back after {passed:.0f} s"
            self._say(self.failure)
