"""How many users there are at each moment of a load test. Pure: locustfile.py asks once a second."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

STEPS = 8  # of a ramp: each long enough to see what it costs
BASE = 0.2  # share of the users that are there before, between and after peaks
BURSTS = 4
BURST_SHARE = 0.3  # of the time


@dataclass(frozen=True)
class Shape:
    about: str
    share: Callable[[float], float]
    """Of the users, at a share of the duration."""


def _burst(passed: float) -> float:
    return 1.0 if (passed * BURSTS) % 1.0 >= 1.0 - BURST_SHARE else BASE


def is_peak(passed: float) -> bool:
    """The middle third, in which the spike comes and, with several tenants, the first one floods."""
    return 1 / 3 <= passed < 2 / 3


def _spike(passed: float) -> float:
    return 1.0 if is_peak(passed) else BASE


SHAPES: Mapping[str, Shape] = {
    "steady": Shape("all users from the beginning to the end", lambda passed: 1.0),
    "ramp": Shape(
        f"more users in {STEPS} equal steps: where is the knee?",
        lambda passed: (math.floor(passed * STEPS) + 1) / STEPS,
    ),
    "burst": Shape(f"{BASE:.0%} of the users, and all of them in {BURSTS} bursts", _burst),
    "spike": Shape(f"{BASE:.0%} of the users, all in the middle third, then {BASE:.0%}: does it recover?", _spike),
    "soak": Shape("all users, meant for a long time; `soak` adds kills and a judgement", lambda passed: 1.0),
    "multi-tenant": Shape(
        f"{BASE:.0%} of the users, shared by all tenants; in the middle third the first tenant sends the rest as well: "
        "do the others notice?",
        _spike,
    ),
}


def users_at(name: str, seconds: float, duration: float, users: int) -> int:
    """At least one, within the duration; none after it."""
    if seconds >= duration:
        return 0
    return max(1, round(users * SHAPES[name].share(seconds / duration)))


def tenant_at(name: str, rank: int, users: int, tenants: int) -> int:
    """Which tenant the user of this rank (from 0, oldest first) speaks for, of `users` at the peak."""
    quiet = max(1, round(users * BASE))
    if name == "multi-tenant" and rank >= quiet:
        return 0
    return rank % tenants
