"""When to ask a second replica because the first is slow ("The Tail at Scale", Dean and Barroso). Off by default."""

from __future__ import annotations

from dataclasses import dataclass

from tidewright.resilience.deadline import Deadline


@dataclass(frozen=True)
class HedgePolicy:
    """`delay` is best the 95th percentile of the time to the first token; 0 switches hedging off."""

    delay: float

    def wait(self, now: float, deadline: Deadline) -> float | None:
        """Seconds to give the first call before a second one is sent; None: send none.

        If there is no first token by then, a hedge is a retry: `RetryBudget.withdraw` must grant it at that moment.
        """
        return self.delay if 0 < self.delay < deadline.remaining(now) else None
