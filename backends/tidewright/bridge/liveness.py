"""Whether a process works, as the kernel sees it."""

from __future__ import annotations

from pathlib import Path


class Work:
    """Of one process: does it compute, or wait for a processor? One that is stopped or waits for something does not."""

    def __init__(self, pid: int) -> None:
        self._stat = Path(f"/proc/{pid}/stat")
        self._ticks = 0

    def went_on(self) -> bool:
        """Since the question before, as finely as the kernel counts (10 ms)."""
        try:
            # After the name, which may hold anything: state, ten more, then the ticks in user and in system mode.
            state, *fields = self._stat.read_text().rpartition(")")[2].split()
        except OSError:
            return False
        before, self._ticks = self._ticks, int(fields[10]) + int(fields[11])
        return state == "R" or self._ticks > before
