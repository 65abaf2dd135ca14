"""The account of one subject: what it has used of its limits. Pure: the time comes in as an argument.

Everything counts what is used, so an account that nobody uses becomes all zeros, and can be forgotten.

The bucket of tokens has two parts: `owed`, what settled requests used, and `held`, what running ones reserved. It
drains first what is owed and then what is held, of all reservations the same share. So a reservation that is settled
gives back exactly what of it neither was used nor has drained, and never what has drained: that was somebody's refill
already, and giving it back would let more through in a minute than the limit. How much of a reservation is left follows
from two readings of one number, `shrink`, the logarithm of the share of `held` that all draining so far left over.

A reservation can grow while it runs: what is left of it and what is added then drain together.

account.lua is the same in Redis; a test compares the two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tidewright_gateway.admission.limits.store import LimitName, Usage
from tidewright_gateway.auth.callers import Limits

MINUTE, DAY = 60.0, 86_400
CONCURRENT_WAIT = 1.0  # seconds; nobody knows when a request ends
ROUNDING = 1e-6  # of a token or request; more than sums of floats are off
EMPTY = -60.0  # a share of e^-60 is nothing


class Hold(NamedTuple):
    """A reservation that is not settled."""

    shrink: float
    """Of the account when it was made, or grew last."""
    left: float
    """What of it had not drained, then."""
    cost: int
    """All that was reserved."""
    day: int
    day_cost: int
    """What of it was reserved on that day."""


class Account:
    """Call `advance` before anything else, each time."""

    __slots__ = ("_limits", "at", "day", "day_used", "held", "holds", "owed", "requests", "shrink")

    def __init__(self, limits: Limits, now: float) -> None:
        """`now`: seconds since 1970 (UTC), here and below."""
        self._limits = limits
        self.at = now
        self.requests = 0.0
        self.owed = self.held = self.shrink = 0.0
        self.day, self.day_used = int(now // DAY), 0
        self.holds: dict[str, Hold] = {}

    def advance(self, now: float, limits: Limits | None = None) -> None:
        """Lets time pass, and takes over new limits. A clock that steps back pauses the buckets until the next call."""
        self._limits = limits = limits or self._limits
        seconds = max(now - self.at, 0.0)
        self.at = now
        rate = limits.requests_per_second
        self.requests = max(self.requests - rate * seconds, 0.0) if rate else 0.0
        if limits.tokens_per_minute:
            self._drain(limits.tokens_per_minute / MINUTE * seconds)
        else:
            self.owed = self.held = 0.0
        today = int(now // DAY)
        if today != self.day or not limits.tokens_per_day:
            self.day, self.day_used = today, 0

    def _drain(self, amount: float) -> None:
        paid = min(self.owed, amount)
        self.owed -= paid
        amount -= paid
        if not amount or not self.held:
            return
        left = max(self.held - amount, 0.0)
        self.shrink += max(math.log(left / self.held), EMPTY) if left else EMPTY
        self.held = left

    def refuses(self, id: str, cost: int) -> tuple[float, LimitName] | None:
        """Seconds until there is enough for `cost` tokens more, infinite for never, and of which limit; the longest if
        of several. None if there is enough. One that holds something already is no further request."""
        limits, found, is_new = self._limits, list[tuple[float, LimitName]](), id not in self.holds
        if is_new and (rate := limits.requests_per_second):
            over = self.requests + 1 - max(1.0, rate)
            if over > ROUNDING:
                found.append((over / rate, "requests_per_second"))
        if is_new and limits.concurrent and len(self.holds) >= limits.concurrent:
            found.append((CONCURRENT_WAIT, "concurrent"))
        if limit := limits.tokens_per_minute:
            over = self.owed + self.held + cost - limit
            if over > ROUNDING:
                found.append((over * MINUTE / limit if cost <= limit else math.inf, "tokens_per_minute"))
        if (limit := limits.tokens_per_day) and self.day_used + cost > limit:
            tomorrow = (self.day + 1) * DAY
            found.append((tomorrow - self.at if cost <= limit else math.inf, "tokens_per_day"))
        return max(found, key=lambda wait_and_name: wait_and_name[0], default=None)

    def hold(self, id: str, cost: int) -> None:
        """So many tokens, or so many more."""
        if hold := self.holds.get(id):
            day_cost = hold.day_cost if hold.day == self.day else 0
            left = self._left(hold) + cost
            self.holds[id] = Hold(self.shrink, left, hold.cost + cost, self.day, day_cost + cost)
        else:
            self.holds[id] = Hold(self.shrink, cost, cost, self.day, cost)
            if self._limits.requests_per_second:
                self.requests += 1
        if self._limits.tokens_per_minute:
            self.held += cost
        if self._limits.tokens_per_day:
            self.day_used += cost

    def settle(self, id: str, used: int) -> None:
        """Changes nothing if there is no such hold."""
        hold = self.holds.pop(id, None)
        if hold is None:
            return
        if self._limits.tokens_per_minute:
            left = self._left(hold)
            self.owed += max(used - (hold.cost - left), 0.0)
            # Once nobody holds anything, what sums of floats left over goes.
            self.held = max(self.held - left, 0.0) if self.holds else 0.0
        if self._limits.tokens_per_day and hold.day == self.day:
            used_before = hold.cost - hold.day_cost
            self.day_used = max(self.day_used + max(used - used_before, 0) - hold.day_cost, 0)

    def _left(self, hold: Hold) -> float:
        """What of it has not drained by now."""
        return hold.left * math.exp(self.shrink - hold.shrink)

    @property
    def usage(self) -> Usage:
        return Usage(self.requests, len(self.holds), self.owed + self.held, self.day_used)

    @property
    def idle(self) -> bool:
        """Nothing would be lost with it."""
        return not (self.holds or self.requests or self.owed or self.held or self.day_used)
