"""Whether a failed attempt is tried again, and when. No I/O and no clock."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

STATUSES = frozenset({408, 409, 429, 500, 502, 503, 504})
FIRST_WAIT, LONGEST_BACKOFF = 0.5, 8.0  # seconds
LONGEST_WAIT = 60.0  # seconds; what would wait longer is not retried

BUDGET = 10.0  # retries
BUDGET_PER_REQUEST = 0.1


class Budget:
    """Retries that a client may still make, so that it does not multiply an outage. Thread-safe."""

    def __init__(self) -> None:
        self._left = BUDGET
        self._lock = threading.Lock()

    def request(self) -> None:
        """One begins."""
        with self._lock:
            self._left = min(BUDGET, self._left + BUDGET_PER_REQUEST)

    def take(self) -> bool:
        """Whether a retry may be made; then it is taken."""
        with self._lock:
            # Tenths do not add up exactly.
            if self._left < 1 - 1e-9:
                return False
            self._left -= 1
            return True


def wait_before(retry: int, retry_after: float | None, left: float | None, random: Callable[[], float]) -> float | None:
    """Seconds before a retry, the first of which is 0; None if it would take too long.

    `left`: of the request's timeout. `random`: gives 0 to 1.
    """
    wait = retry_after
    if wait is None:
        wait = min(LONGEST_BACKOFF, FIRST_WAIT * 2.0**retry) * (1 - random() / 2)
    return None if wait > LONGEST_WAIT or (left is not None and wait >= left) else wait


def seconds_of(header: str | None, now: float) -> float | None:
    """A Retry-After header, which is seconds or a date; None if it is neither. `now`: time.time()."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except ValueError:
            return None
        if date.tzinfo is None:
            date = date.replace(tzinfo=timezone.utc)
        seconds = (date - datetime.fromtimestamp(now, timezone.utc)).total_seconds()
    return None if math.isnan(seconds) else max(0.0, seconds)
