"""What a step may cost while streams wait for their next token. Pure: rank 0 measures it (latency.py), and the same
numbers reach the schedulers of all ranks with the step.
"""

from __future__ import annotations

import math

import msgspec

_UNBOUNDED = 2**31 - 1


def prompt_cost(token: float, context: float, start: int, count: int) -> float:
    """Seconds of `count` prompt tokens behind the first `start`: of each `token`, and `context` for each before it."""
    return count * (token + context * (start + count / 2))


class StepPace(msgspec.Struct, frozen=True, array_like=True):
    """Only additions, products, quotients and square roots of these floats are taken, which IEEE 754 rounds the same
    on all processors: so ranks agree.
    """

    seconds: float = math.inf  # for the prompt tokens of a step beside streams
    token: float = 0.0  # seconds that one takes,
    context: float = 0.0  # and for each token before it in its prompt
    least: int = 0  # prompt tokens of such a step in any case, so that prompts come on however slow the machine is
    most: int = _UNBOUNDED
    running: int = _UNBOUNDED  # while so many run, a request is admitted only in the place of another
    others: float = math.inf  # as `seconds`, for prompts of tenants without a claim (fairness.py), streams or not

    def cost(self, start: int, count: int) -> float:
        """Seconds of `count` prompt tokens behind the first `start`."""
        return prompt_cost(self.token, self.context, start, count)

    def fits(self, start: int, seconds: float) -> int:
        """The largest count whose cost is within `seconds`."""
        if seconds <= 0:
            return 0
        first = self.token + self.context * start
        divisor = first + math.sqrt(first * first + 2 * self.context * seconds)
        # Of the two forms of the positive root, the one that loses no digits and allows context 0.
        return int(min(2 * seconds / divisor, self.most)) if divisor and math.isfinite(seconds) else self.most


UNPACED = StepPace()


class Allowance:
    """What is left of a pace in one step."""

    def __init__(self, pace: StepPace, beside_streams: bool) -> None:
        self._pace = pace if beside_streams or pace.others < math.inf else UNPACED
        self._claimed = pace.seconds if beside_streams else math.inf
        self._others = min(self._claimed, pace.others)
        self._taken, self._given = 0.0, 0

    def tokens(self, start: int, claims: bool) -> int:
        """Of a prompt behind its first `start` tokens. `claims`: its tenant has a claim to be first (fairness.py)."""
        pace, seconds = self._pace, self._claimed if claims else self._others
        return min(max(pace.fits(start, seconds - self._taken), pace.least - self._given), pace.most - self._given)

    def take(self, start: int, count: int) -> None:
        self._taken += self._pace.cost(start, count)
        self._given += count
