"""How many threads a step should use while other processes use the same cores. Pure: no clock, no torch, no /proc.

The threads meet at the end of each kernel, so a team runs at the pace of its slowest thread. If its threads wait for a
processor for a share `s` of the time (the waits of all threads, divided by the time), a team of n runs at about 1 - s
of its speed. One thread less, without waits, runs at 1 - 1/n. So fewer threads are faster once n * s exceeds 1. Later,
one more thread is tried, and kept if the waits do not come back.
"""

from __future__ import annotations

LIMIT = 0.7  # of n * s: below 1, because memory is shared, so the last thread adds less than its share
PATIENCE = 3  # windows over the limit in a row before the number changes: short disturbances do not count
FIRST_HOLD = 0.25  # seconds until one more thread is tried; doubles with each trial that fails
LONGEST_HOLD = 30.0


class ThreadCount:
    """`current` threads for the next window; `settled` is the number that the last trial, if it fails, returns to."""

    def __init__(self, most: int) -> None:
        self.most = self.settled = self.current = most
        self._over = 0  # windows in a row
        self._hold = FIRST_HOLD
        self._next_trial = 0.0

    def observe(self, now: float, seconds: float, waited: float) -> None:
        """Decides after a window in which steps took `seconds` and their threads, all together, spent `waited` seconds
        ready to run without a processor. `now` is the time of any clock that does not go back.
        """
        # No more than all threads all the time, whatever the clocks say.
        share = min(waited / seconds, self.current) if seconds > 0 else 0.0
        crowded = share * self.current > LIMIT
        self._over = self._over + 1 if crowded else 0
        if self.current > self.settled:
            self._end_trial(now, failed=crowded)
        elif self._over >= PATIENCE and self.current > 1:
            # A busy neighbour takes half of a core from a thread, so at least `share` cores have one.
            self.settled = self.current = max(1, self.current - max(1, round(share)))
            self._over, self._hold, self._next_trial = 0, FIRST_HOLD, now + FIRST_HOLD
        # With waits even now, one more thread would not help.
        calm = share * self.current < LIMIT / 2
        if calm and self.current == self.settled < self.most and now >= self._next_trial:
            self.current += 1

    def _end_trial(self, now: float, failed: bool) -> None:
        if failed:
            self._hold = min(2 * self._hold, LONGEST_HOLD)
            self._next_trial = now + self._hold
            self.current, self._over = self.settled, 0
        else:
            self.settled, self._hold = self.current, FIRST_HOLD
