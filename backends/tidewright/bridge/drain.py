"""Ends the taking of requests: nothing new is taken, and what is in flight has until a time. No I/O."""

from __future__ import annotations

import math
import time

from tidewright.errors import EngineUnavailableError


class Drain:
    def __init__(self, grace: float) -> None:
        """`grace`: seconds for what is in flight (shutdown_grace)."""
        self._grace = grace
        self._why = self._message = ""
        self._ends_at = math.inf  # time.monotonic()

    @property
    def has_begun(self) -> bool:
        return bool(self._why)

    def begin(self, why: str, longest: float) -> None:
        """One caller at a time. `longest`: seconds that it may take at most. The first reason stays."""
        if not self._why:
            grace = min(self._grace, longest)
            self._message = f"{why}, and {grace:g} s (shutdown_grace) were not enough to finish"
            self._ends_at, self._why = time.monotonic() + grace, why

    def check(self) -> None:
        """Raises EngineUnavailableError: nothing new is taken."""
        if self._why:
            raise EngineUnavailableError(f"{self._why}; send the request to another")

    @property
    def overdue(self) -> str:
        """What to tell those that are still in flight when their time is over; empty until then."""
        return self._message if time.monotonic() > self._ends_at else ""
