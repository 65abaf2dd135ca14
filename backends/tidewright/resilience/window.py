"""Calls and failures of the last seconds, in buckets: constant memory, and each call costs O(1) amortised."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

BUCKETS = 10


@dataclass(slots=True)
class _Bucket:
    index: int
    calls: int = 0
    failures: int = 0


class FailureWindow:
    """Not locked: its owner is. Looks back between 9/10 of `seconds` and all of it."""

    def __init__(self, seconds: float) -> None:
        self._width = seconds / BUCKETS
        self._buckets: deque[_Bucket] = deque()
        self._calls = self._failures = 0

    def add(self, failed: bool, now: float) -> None:
        index = self._slide(now)
        if not self._buckets or self._buckets[-1].index != index:
            self._buckets.append(_Bucket(index))
        bucket = self._buckets[-1]
        bucket.calls += 1
        bucket.failures += failed
        self._calls += 1
        self._failures += failed

    def counts(self, now: float) -> tuple[int, int]:
        """Calls, and how many of them failed."""
        self._slide(now)
        return self._calls, self._failures

    def clear(self) -> None:
        self._buckets.clear()
        self._calls = self._failures = 0

    def _slide(self, now: float) -> int:
        """Drops what is too old; the index of the bucket that `now` belongs to."""
        index = int(now // self._width)
        if self._buckets and (behind := self._buckets[-1].index - index) > 0:
            if behind < BUCKETS:
                index += behind  # read before another thread's later time: belongs to the newest bucket
            else:
                self.clear()  # the clock was set back; these buckets would not grow old for a long time
        while self._buckets and self._buckets[0].index <= index - BUCKETS:
            bucket = self._buckets.popleft()
            self._calls -= bucket.calls
            self._failures -= bucket.failures
        return index
