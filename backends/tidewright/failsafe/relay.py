"""One request on its way through `failsafe`: which attempt has it now, and what its caller has got."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from tidewright.failsafe.limits import Progress
from tidewright.failsafe.models import ModelReply, Request
from tidewright.resilience.breaker import Permit
from tidewright.resilience.deadline import Deadline
from tidewright.resilience.succession import fallback_can_go_on
from tidewright.schema import ATTEMPT, FinishReason, SamplingParams


@dataclass(eq=False)
class Attempt:
    """One call of a model."""

    model: str
    request_id: str
    began: float
    reason: str = ""
    """Why it is the fallback that is asked."""
    permit: Permit | None = None
    """Of the breaker, for the decoder; given back with the outcome."""
    last_token: float | None = None
    over: bool = False
    """All is read."""


@dataclass(eq=False)
class Relay:
    """`lock` guards all that changes. Only the attempt that is `current` may answer."""

    request: Request
    client_id: str
    serial: int
    sampling: SamplingParams
    streams: bool
    deadline: Deadline
    lock: threading.Lock = field(default_factory=threading.Lock)
    current: Attempt | None = None
    tries: int = 0
    """Attempts at the decoder."""
    delivered: list[int] = field(default_factory=list)
    ended: bool = False
    _told: Attempt | None = None

    def begin(self, model: str, now: float, reason: str = "", permit: Permit | None = None) -> Attempt:
        """With the lock held: the attempt that may answer from now on."""
        self.tries += model == "decoder"
        request_id = f"{self.client_id}{ATTEMPT}{self.serial}.{self.tries}"
        self.current = Attempt(model, request_id, now, reason, permit)
        return self.current

    def take(self, attempt: Attempt, reply: ModelReply, now: float) -> bool:
        """Hand a reply on to the caller; False if it is not this attempt's turn any longer."""
        with self.lock:
            if self.ended or self.current is not attempt:
                return False
            if reply.token_ids:
                attempt.last_token = now
                self.delivered += reply.token_ids
            names = reply.final or self._told is not attempt
            self._told = attempt
            self.request.send(reply, attempt.model, attempt.reason, names)
            self.ended = reply.final
            return True

    def fail(self, message: str, reason: FinishReason) -> None:
        """With the lock held."""
        self.ended = True
        self.request.fail(message, reason)

    def progress(self, attempt: Attempt) -> Progress:
        return Progress(self.streams, attempt.began, attempt.last_token)

    @property
    def can_go_on(self) -> bool:
        """Another attempt could take up what is delivered, if that is anything."""
        return fallback_can_go_on(self.sampling, bool(self.delivered))

    @property
    def is_cancelled(self) -> bool:
        with self.lock:  # the caller must not be asked about once it has its last response
            return not self.ended and self.request.is_cancelled()
