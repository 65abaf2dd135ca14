"""Retry budget: retries are a share of the traffic, so that they can't multiply the load of a model in trouble.

As in Finagle's RetryBudget and the "per-client retry budget" of Google's SRE book (Handling Overload). pyresilience has
a bucket that time alone fills, so not in proportion to traffic; tenacity, backoff and stamina have no budget at all.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

# Ten deposits of 0.1 are not quite 1.0.
ROUNDING = 1e-9


@dataclass(frozen=True)
class BudgetConfig:
    share: float
    floor: float
    burst: float


class RetryBudget:
    """Token bucket. Over any stretch of time it grants at most burst + share * requests + floor * seconds.

    Thread-safe by a lock inside. Time that was seen already is not paid for again: a clock that is set back pauses the
    floor until it is where it was, and the share goes on.
    """

    def __init__(self, config: BudgetConfig, now: float) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._balance = config.burst
        self._paid_until = now

    def deposit(self) -> None:
        """Once for each request, not for its retries."""
        with self._lock:
            self._balance = min(self._balance + self._config.share, self._config.burst)

    def withdraw(self, now: float) -> bool:
        """Whether one more retry may be sent."""
        with self._lock:
            self._pay_floor(now)
            granted = self._balance >= 1 - ROUNDING
            if granted:
                self._balance = max(self._balance - 1, 0.0)
            return granted

    def balance(self, now: float) -> float:
        """Retries that may be sent now."""
        with self._lock:
            self._pay_floor(now)
            return self._balance

    def _pay_floor(self, now: float) -> None:
        if now > self._paid_until:
            pay = self._config.floor * (now - self._paid_until)
            self._balance = min(self._balance + pay, self._config.burst)
            self._paid_until = now
