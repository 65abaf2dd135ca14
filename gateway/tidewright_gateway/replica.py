"""One replica as the gateway sees it: what it said last, what is in flight there, and whether to send it more."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tidewright.failsafe.models import ModelError
from tidewright.resilience.breaker import BreakerConfig, CircuitBreaker
from tidewright.resilience.outcome import Outcome
from tidewright.schema import DecoderStatus
from tidewright_gateway.triton import Generation, TritonClient


@dataclass(eq=False)
class Attempt:
    """One generation at one replica. Times are of time.monotonic()."""

    generation: Generation
    began: float
    last_token: float | None = None

    def overdue(self, first_token: float, stall: float, now: float) -> ModelError | None:
        """Why not to wait for it any longer. Both limits are in seconds."""
        if self.last_token is None:
            if now - self.began > first_token:
                return ModelError(f"no first token within {first_token:g} s", Outcome.FIRST_TOKEN_TIMEOUT)
        elif now - self.last_token > stall:
            return ModelError(f"no further token within {stall:g} s", Outcome.STALLED)
        return None


@dataclass(eq=False)
class Replica:
    """All of it belongs to the event loop's thread."""

    address: str
    client: TritonClient
    breaker: CircuitBreaker
    status: DecoderStatus | None = None
    """What it said last; None before it said anything, and after an error."""
    heard_at: float = -math.inf
    """When it said something, time.monotonic()."""
    others: int = 0
    """Requests there that are not of this gateway, as of then."""
    in_flight_when_asked: int = 0
    asked_at: float | None = None
    """Since when a question waits for its answer, time.monotonic()."""
    trouble: ModelError | None = field(default_factory=lambda: ModelError("not asked yet", Outcome.UNAVAILABLE))
    """Why it can't be sent anything now."""
    attempts: set[Attempt] = field(default_factory=set)

    @classmethod
    def at(cls, address: str, channels: int, breaker: BreakerConfig) -> Replica:
        return cls(address, TritonClient(address, channels), CircuitBreaker(breaker))

    @property
    def takes_requests(self) -> bool:
        return self.trouble is None and not (self.status and self.status.draining)

    def heard(self, status: DecoderStatus, patience: float, now: float) -> None:
        """It answered. `patience`: longest silence of its engine, in seconds."""
        self.status, self.heard_at, self.trouble = status, now, None
        # What ended or began since it was asked may be in the figure or not.
        self.others = max(status.active - max(len(self.attempts), self.in_flight_when_asked), 0)
        if status.silence > patience:
            self.trouble = ModelError(f"no sign of life from the engine for {status.silence:.1f} s", Outcome.STALLED)
            self.abandon_all(self.trouble)
        elif status.trouble and not status.draining:
            # Its bridge has all requests, and the next engine gets them: what is there stays.
            self.trouble = ModelError(status.trouble, Outcome.UNAVAILABLE)

    def lost(self, error: ModelError) -> None:
        """It did not answer, or with an error: what is there is lost, or will never be seen."""
        self.status, self.trouble = None, error
        self.abandon_all(error)

    def abandon_all(self, error: ModelError) -> None:
        for attempt in tuple(self.attempts):
            attempt.generation.abandon(error)
