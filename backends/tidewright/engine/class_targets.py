"""Latency targets of priority classes, which take the place of the server's. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right

from tidewright.schema import MAX_PRIORITY, MAX_TARGET, MIN_PRIORITY

MAX_CLASSES = 16
_FORM = "write PRIORITY:ttft=SECONDS:tpot=SECONDS, of which one may be left out, e.g. 0:ttft=2,100:ttft=60:tpot=1"


class ClassTargets:
    """A class holds for its priority and all less urgent ones (larger numbers), up to the next class."""

    def __init__(self, text: str = "") -> None:
        """Raises ValueError, which says what to write."""
        found: dict[int, dict[str, float]] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            number, *targets = part.split(":")
            priority = _priority(number, part)
            if priority in found:
                raise ValueError(f"priority {priority} stands twice")
            found[priority] = _targets(targets, part)
        if len(found) > MAX_CLASSES:
            raise ValueError(f"there are {len(found)} classes, more than the limit of {MAX_CLASSES}")
        self._priorities = sorted(found)
        self._targets = [found[priority] for priority in self._priorities]

    def __bool__(self) -> bool:
        return bool(self._priorities)

    def ttft(self, priority: int, server: float) -> float:
        """Seconds to the first token, of a request without a target of its own; 0: any."""
        return self._of(priority).get("ttft", server)

    def tpot(self, priority: int, server: float) -> float:
        """Likewise, between two tokens."""
        return self._of(priority).get("tpot", server)

    def _of(self, priority: int) -> dict[str, float]:
        place = bisect_right(self._priorities, priority)
        return self._targets[place - 1] if place else {}


NO_CLASSES = ClassTargets()


def _priority(number: str, part: str) -> int:
    try:
        priority = int(number)
    except ValueError:
        raise ValueError(f"{part!r} does not begin with a priority: {_FORM}") from None
    if not MIN_PRIORITY <= priority <= MAX_PRIORITY:
        raise ValueError(f"priority {priority} is not within {MIN_PRIORITY} and {MAX_PRIORITY}")
    return priority


def _targets(given: list[str], part: str) -> dict[str, float]:
    targets: dict[str, float] = {}
    for one in given:
        name, _, value = one.partition("=")
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if name not in ("ttft", "tpot") or name in targets or not 0 <= seconds <= MAX_TARGET:
            raise ValueError(f"{one!r} of {part!r} is no target of 0 (none) to {MAX_TARGET:g} seconds: {_FORM}")
        targets[name] = seconds
    if not targets:
        raise ValueError(f"{part!r} has no target: {_FORM}")
    return targets
