"""How many prompt tokens a step may compute while streams wait for their next token: measured, not configured.

The scheduler reads no clock; it gets the number as an argument, and so do the schedulers of other ranks.
"""

from __future__ import annotations

from tidewright.engine.plan import StepPlan

FIRST = 128  # tokens, until a step has been measured
LEAST = 64  # so that a prompt comes on however slow the machine is
_WEIGHT = 0.5  # of the newest step: a token costs more the longer the context is


class Pace:
    def __init__(self, seconds: float, most: int) -> None:
        """`seconds`: what a step should take at most; 0: any time. `most`: tokens of a step."""
        self._seconds, self._most = seconds, most
        self._cost = 0.0  # seconds a token
        self.tokens = min(FIRST, most) if seconds else most

    def computed(self, plan: StepPlan, seconds: float) -> None:
        count = sum(planned.count for planned in plan.sequences)
        # Few tokens say nothing about many: reading the weights takes the same time for both.
        if not self._seconds or count - len(plan.sequences) < min(LEAST, self._most) // 2:
            return
        cost = seconds / count
        self._cost = cost if self._cost == 0.0 else _WEIGHT * cost + (1 - _WEIGHT) * self._cost
        self.tokens = max(min(int(self._seconds / max(self._cost, 1e-9)), self._most), min(LEAST, self._most))
