"""The process behind a model, which tells its number in its status: what was in it is lost when it ends."""

from __future__ import annotations

import math
import os
import select
import threading
from pathlib import Path


class StubProcess:
    """One thread tells what the model said; any may look, which costs a microsecond.

    Triton says that a process is gone a second after someone asked, and not at all once the model is loaded again.
    """

    def __init__(self) -> None:
        self.lost_before = -math.inf
        """What was sent to the model before this time, and was not answered by now, is lost."""
        self.died = False
        """The one that ended last was killed, or crashed: Triton had not asked it to end."""
        self._pid = 0
        self._is_unseen = False  # the kernel does not tell when it ends
        self._lives: dict[int, tuple[int, float]] = {}  # by pidfd: process, and when the next one took its place
        self._ends = select.poll()
        self._lock = threading.Lock()

    def named(self, pid: int, now: float) -> None:
        """The model's answer came from this process."""
        if pid == self._pid:
            return
        with self._lock:
            self._pid = pid
            if self._is_unseen:  # nobody knows whether the one before still works
                self.lost_before, self._is_unseen = now, False
            # One that was replaced may still answer what it has.
            self._lives = {life: (process, min(until, now)) for life, (process, until) in self._lives.items()}
            try:
                life = os.pidfd_open(pid)
            except OSError:  # an old kernel, or gone by now
                self._is_unseen = True
                return
            self._lives[life] = (pid, math.inf)
            self._ends.register(life, select.POLLIN)

    def look(self, now: float) -> bool:
        """A process has ended since the last look."""
        with self._lock:
            ended = [life for life, _ in self._ends.poll(0)]
            for life in ended:
                pid, until = self._lives.pop(life)
                self.lost_before, self.died = max(self.lost_before, min(until, now)), _has_died(pid)
                self._ends.unregister(life)
                os.close(life)
        return bool(ended)

    def close(self) -> None:
        with self._lock:
            for life in self._lives:
                self._ends.unregister(life)
                os.close(life)
            self._lives.clear()


def _has_died(pid: int) -> bool:
    """Of a process that has ended: Triton waits for one that it ends, and leaves another as a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return state == "Z" and fields[48] != "0"
