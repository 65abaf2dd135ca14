"""The moment until which an answer is of use; handed down, so that no part of a request outlives it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Deadline:
    at: float = math.inf

    @classmethod
    def after(cls, seconds: float | None, now: float) -> Deadline:
        """None: no deadline."""
        return cls() if seconds is None else cls(now + seconds)

    def remaining(self, now: float) -> float:
        return max(self.at - now, 0.0)

    def expired(self, now: float) -> bool:
        return now >= self.at
