"""One replica as the gateway sees it: what it said last, what is in flight there, and whether to send it more."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tidewright.resilience.breaker import BreakerConfig, CircuitBreaker
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import DecoderStatus
from tidewright_gateway.replicas.discovery import Endpoint
from tidewright_gateway.replicas.routing import Candidate, slow_start
from tidewright_gateway.replicas.triton import TritonCall, TritonClient

FRESH = 2.0  # seconds; what a replica said of its load before is not believed any more


@dataclass(eq=False)
class Attempt:
    """One generation at one replica. Times are of time.monotonic()."""

    generation: TritonCall
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
    """All of it belongs to the event loop's thread. Times are of time.monotonic(), and -inf is never."""

    address: str
    client: TritonClient
    breaker: CircuitBreaker
    weight: float = 1.0
    status: DecoderStatus | None = None
    """What it said last; None before it said anything, and after an error."""
    heard_at: float = -math.inf
    """When it said something."""
    status_took: float | None = None
    """Seconds from the last question to its answer."""
    others: int = 0
    """Requests there that are not of this gateway, as of then."""
    in_flight_when_asked: int = 0
    asked_at: float | None = None
    """Since when a question waits for its answer."""
    unanswered: float = 0.0
    """Seconds of that in which this process listened, and heard nothing of its generations either."""
    trouble: ModelError | None = field(default_factory=lambda: ModelError("not asked yet", Outcome.UNAVAILABLE))
    """Why it can't be sent anything now, by what it says."""
    suspicion: ModelError | None = None
    """A request there failed as if nobody were there: nothing is sent until it says, or shows, that it is well."""
    leaving: bool = False
    """It is no longer among the replicas: gets nothing new, and is forgotten when what it has is done."""
    ejected: ModelError | None = None
    """Why it is not to be sent anything while others can be: it says that it is well, but generates nothing."""
    failed_probes: int = 0
    """Generation probes that failed, one after the other."""
    probed_at: float = -math.inf
    """When its last generation probe began, or was needless."""
    probe_took: float | None = None
    """Seconds that the last one that succeeded took."""
    generated_at: float = -math.inf
    """When a request last got its first tokens."""
    came_at: float = -math.inf
    """When it came, or came back; before the gateway started is -inf."""
    took_requests: bool = False
    load_is_stale: bool = True
    """Both as they were last told to the log or the metrics."""
    attempts: set[Attempt] = field(default_factory=set)
    """Of the decoder."""
    fallbacks: set[Attempt] = field(default_factory=set)
    """Of the fallback, which goes on when the decoder fails."""

    @classmethod
    def at(cls, endpoint: Endpoint, channels: int, breaker: BreakerConfig) -> Replica:
        client = TritonClient(endpoint.address, channels)
        return cls(endpoint.address, client, CircuitBreaker(breaker), endpoint.weight)

    @property
    def is_up(self) -> bool:
        """It says that it takes requests."""
        is_well = self.trouble is None and self.suspicion is None
        return is_well and not self.leaving and not (self.status and self.status.draining)

    @property
    def takes_requests(self) -> bool:
        return self.is_up and self.ejected is None

    @property
    def why_not(self) -> str:
        """Why it can't be sent anything, or had better not; empty if it can."""
        if self.takes_requests:
            return ""
        return "leaving" if self.leaving else str(self.trouble or self.suspicion or self.ejected or "draining")

    @property
    def in_flight(self) -> int:
        """Of this gateway."""
        return len(self.attempts) + len(self.fallbacks)

    @property
    def running(self) -> Iterator[Attempt]:
        """A copy: they may end meanwhile."""
        return itertools.chain(tuple(self.attempts), tuple(self.fallbacks))

    def heard(self, status: DecoderStatus, patience: float, now: float) -> None:
        """It answered. `patience`: longest silence of its engine, in seconds."""
        self.status, self.heard_at, self.trouble, self.suspicion = status, now, None, None
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
        self.status, self.trouble, self.suspicion = None, error, None
        self.abandon_all(error)

    def abandon_all(self, error: ModelError) -> None:
        for attempt in tuple(self.attempts):
            attempt.generation.abandon(error)

    def generated(self, now: float) -> None:
        """A request got its first tokens."""
        self.generated_at, self.suspicion = now, None
        self.can_generate()

    def can_generate(self) -> None:
        """Whatever probes found before."""
        self.failed_probes, self.ejected = 0, None

    def fresh_status(self, now: float) -> DecoderStatus | None:
        """None if it did not say lately how much load it has."""
        return self.status if now - self.heard_at < FRESH else None

    def candidate(self, ramp: float, now: float) -> Candidate:
        """`ramp`: seconds until one that came has its whole share."""
        status = self.fresh_status(now)
        return Candidate(
            name=self.address,
            in_flight=len(self.attempts) + (self.others if status else 0),
            load=None if status is None else max(status.waiting, status.kv_usage),
            weight=self.weight,
            share=slow_start(now - self.came_at, ramp),
        )

    def snapshot(self, ramp: float, now: float) -> dict[str, Any]:
        """For people; times in seconds, `load` None if it is not known."""
        candidate = self.candidate(ramp, now)
        return {
            "address": self.address,
            "weight": self.weight,
            "takes_requests": self.takes_requests,
            "trouble": self.why_not,
            "draining": bool(self.status and self.status.draining),
            "leaving": self.leaving,
            "breaker": self.breaker.state.value,
            "in_flight": self.in_flight,
            "others_in_flight": self.others,
            "load": candidate.load,
            "status_seconds": self.status_took,
            "generation_probe_seconds": self.probe_took,
            "failed_generation_probes": self.failed_probes,
            "slow_start_share": candidate.share,
        }
