"""When to try again: exponential backoff with full jitter, within the request's deadline and the retry budget.

"Full jitter" is of Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015. tenacity, backoff and
stamina wrap a function, sleep by themselves and read their own clock; a stream in a Triton model can't be wrapped so.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tidewright.resilience.budget import RetryBudget
from tidewright.resilience.deadline import Deadline

# Far beyond any longest delay, and far below what a float can't hold.
MAX_DOUBLINGS = 60


class NoRetry(Enum):
    """Why a request is not tried again; the values are labels for metrics."""

    ATTEMPTS = "attempts"
    DEADLINE = "deadline"
    BUDGET = "budget"


@dataclass(frozen=True)
class RetryPolicy:
    max_attempts: int  # the first one included
    base_delay: float
    max_delay: float
    min_time: float

    def ceiling(self, attempt: int) -> float:
        """Longest delay after the attempt of that number, from 1."""
        return min(self.max_delay, self.base_delay * 2.0 ** min(attempt - 1, MAX_DOUBLINGS))

    def next_delay(
        self, attempt: int, now: float, deadline: Deadline, random_u: float, budget: RetryBudget
    ) -> float | NoRetry:
        """Seconds to wait after attempt number `attempt` (from 1) failed; `random_u` is uniform in [0, 1).

        A delay is paid for: the budget is asked last, and only a retry that will be made takes from it.
        """
        if attempt >= self.max_attempts:
            return NoRetry.ATTEMPTS
        delay = random_u * self.ceiling(attempt)
        if deadline.expired(now) or delay + self.min_time > deadline.remaining(now):
            return NoRetry.DEADLINE
        if not budget.withdraw(now):
            return NoRetry.BUDGET
        return delay
