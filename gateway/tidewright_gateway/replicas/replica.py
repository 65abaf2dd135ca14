"""One replica as the gateway sees it: what it said last, what is in flight there, and whether to send it more."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from tidewright.resilience.breaker import BreakerConfig, CircuitBreaker, Permit
from tidewright.resilience.deadline import Deadline
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import DecoderStatus
from tidewright_gateway.replicas.discovery import Endpoint
from tidewright_gateway.replicas.routing import Candidate, slow_start
from tidewright_gateway.replicas.triton import Reply, TritonCall, TritonClient

LATE = 1.0  # seconds after a deadline within which the replica should have ended the generation
FRESH = 2.0  # seconds; what a replica said of its load before is not believed any more


@dataclass(eq=False)
class Attempt:
    """One generation at one model of one replica. Times are of time.monotonic()."""

    replica: Replica
    model: str
    """Of Triton: decoder or fallback."""
    call: TritonCall
    permit: Permit | None
    """Of the replica's breaker, for the decoder; given back with the outcome."""
    deadline: Deadline
    """Of its generation, which the replica is told and should keep by itself."""
    num_tokens: int = 0
    waits_since: float | None = None
    """For its next reply. None: nobody asks for one, as the caller has not taken what there is."""

    async def read(self) -> Reply:
        """The next reply. Raises ModelError: there is none."""
        self.waits_since = time.monotonic()
        try:
            reply = await self.call.read()
        finally:
            self.waits_since = None
        self.num_tokens += len(reply.token_ids)
        return reply

    def waited(self, now: float) -> float:
        """Seconds that the replica is silent; what the caller leaves unread is none of its."""
        return 0.0 if self.waits_since is None else now - self.waits_since

    def expired(self, now: float) -> ModelError | None:
        """Why to give it up, whatever its replica does: it has not kept the deadline."""
        if not self.deadline.expired(now - LATE):
            return None
        return ModelError("request timed out; the model did not end it in time", Outcome.REQUEST_TIMEOUT)

    def overdue(self, first_token: float, stall: float, now: float) -> ModelError | None:
        """Why not to wait for it any longer. Both limits are in seconds."""
        limit = stall if self.num_tokens else first_token
        if self.waited(now) <= limit:
            return None
        if self.num_tokens:
            return ModelError(f"no further token within {stall:g} s", Outcome.STALLED)
        return ModelError(f"no first token within {first_token:g} s", Outcome.FIRST_TOKEN_TIMEOUT)


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
    lived_at: float = -math.inf
    """When its engine gave a sign of life: it said something, or a request got tokens."""
    status_took: float | None = None
    """Seconds from the last question to its answer."""
    others: int = 0
    """Requests there that are not of this gateway, as of then."""
    in_flight_when_asked: int = 0
    asked_at: float | None = None
    """Since when a question waits for its answer."""
    unanswered: float = 0.0
    """Seconds of that in which this process listened, and heard nothing of its generations either."""
    fallback: DecoderStatus | None = None
    """What its fallback said last; None if there is none that can be asked."""
    trouble: ModelError | None = field(default_factory=lambda: ModelError("not checked yet", Outcome.UNAVAILABLE))
    """Why it can't be sent anything now, by what it says."""
    suspicion: ModelError | None = None
    """A request there failed as if nobody were there: nothing is sent until it says, or shows, that it is well."""
    leaving: bool = False
    """It is no longer among the replicas: gets nothing new, and is forgotten when what it has is done."""
    ejected: ModelError | None = None
    """Why it is not to be sent anything while others can be: it reports healthy, but generates nothing."""
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
    def at(
        cls, endpoint: Endpoint, channels: int, breaker: BreakerConfig, credentials: grpc.ChannelCredentials | None
    ) -> Replica:
        client = TritonClient(endpoint.address, channels, credentials)
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
        self.lived_at = max(self.lived_at, now - status.silence)
        # What ended or began since it was asked may be in the figure or not.
        self.others = max(status.active - max(len(self.attempts), self.in_flight_when_asked), 0)
        if status.silence > patience:
            self.trouble = ModelError(f"no sign of life from the engine for {status.silence:.1f} s", Outcome.STALLED)
        elif status.trouble and not status.draining:
            # Its bridge has all requests, and the next engine gets them: what is there stays.
            self.trouble = ModelError(status.trouble, Outcome.UNAVAILABLE)

    def misfits(self, why: str) -> None:
        """It answers, and is none of ours."""
        self.trouble = ModelError(why, Outcome.UNAVAILABLE)

    def lost(self, error: ModelError) -> None:
        """It did not answer, or with an error. Unless it is only silent, what is there is lost."""
        self.status, self.trouble, self.suspicion = None, error, None
        if not self.is_silent:
            gone = ModelError("the model is gone", error.outcome)  # who asked need not know where it was
            for attempt in tuple(self.attempts):
                attempt.call.abandon(gone)

    @property
    def is_silent(self) -> bool:
        """Nothing is heard of it: it may be gone, or have too much to do."""
        return self.trouble is not None and self.trouble.outcome is Outcome.STALLED

    def showed_life(self, now: float) -> None:
        """It answered a request, even if it has too much to do to say how it is."""
        self.unanswered, self.lived_at = 0.0, now

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
