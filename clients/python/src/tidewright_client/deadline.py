"""The timeout of a request, from its call to its last byte. The clock comes in as an argument."""

from __future__ import annotations

from collections.abc import Callable

LEAST = 0.001  # seconds that an operation is given
# Seconds between the server's end and ours, for the way of its answer; a tenth of what is left in between.
_MARGIN, _LARGEST_MARGIN = 0.5, 2.0


class Deadline:
    def __init__(self, timeout: float | None, clock: Callable[[], float]) -> None:
        """`timeout`: seconds from now; None for no end. `clock`: as time.monotonic."""
        self.timeout = timeout
        self._clock = clock
        self._end = None if timeout is None else clock() + timeout

    def left(self) -> float | None:
        """Seconds, at least 0; None for no end."""
        return None if self._end is None else max(0.0, self._end - self._clock())

    @property
    def is_over(self) -> bool:
        return self.left() == 0

    def at_most(self, seconds: float | None) -> float | None:
        """So many seconds, or what is left if that is less: how long an operation may take."""
        left = self.left()
        least = [max(LEAST, one) for one in (seconds, left) if one is not None]
        return min(least, default=None)

    def of_server(self) -> float | None:
        """What the server is told: a bit less, so that it ends by itself and its answer still arrives."""
        left = self.left()
        if left is None:
            return None
        margin = min(max(left / 10, _MARGIN), _LARGEST_MARGIN, left / 2)
        return max(LEAST, round(left - margin, 3))
