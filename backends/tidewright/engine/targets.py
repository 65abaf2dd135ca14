"""The latency targets of requests: their own, or else those of their priority class, or else the server's. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right

from tidewright.schema import MAX_PRIORITY, MAX_TARGET, MIN_PRIORITY, SamplingParams

MAX_CLASSES = 16
_FORM = "write PRIORITY:ttft=SECONDS:tpot=SECONDS, of which one may be left out, e.g. 0:ttft=2,100:ttft=60:tpot=1"


class Targets:
    """A class holds for its priority and all less urgent ones (larger numbers), up to the next class.

    All targets are in seconds; 0: none.
    """

    def __init__(self, ttft: float = 0.0, tpot: float = 0.0, classes: str = "") -> None:
        """The server's targets. Raises ValueError if `classes` can't be read, which says what to write."""
        found: dict[int, dict[str, float]] = {}
        for part in filter(None, (part.strip() for part in classes.split(","))):
            number, *targets = part.split(":")
            priority = _priority(number, part)
            if priority in found:
                raise ValueError(f"priority {priority} stands twice")
            found[priority] = _targets(targets, part)
        if len(found) > MAX_CLASSES:
            raise ValueError(f"there are {len(found)} classes, more than the limit of {MAX_CLASSES}")
        self._priorities = sorted(found)
        self.server_tpot = tpot
        server = {"ttft": ttft, "tpot": tpot}
        self._targets = [server, *(server | found[priority] for priority in self._priorities)]

    @property
    def has_classes(self) -> bool:
        return bool(self._priorities)

    def ttft(self, request: SamplingParams) -> float:
        """From arrival to the first token."""
        return request.ttft_target or self._of(request.priority)["ttft"]

    def tpot(self, request: SamplingParams) -> float:
        """Between two tokens."""
        return request.tpot_target or self.class_tpot(request.priority)

    def class_tpot(self, priority: int) -> float:
        """Likewise, of requests without a target of their own."""
        return self._of(priority)["tpot"]

    def _of(self, priority: int) -> dict[str, float]:
        return self._targets[bisect_right(self._priorities, priority)]


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
