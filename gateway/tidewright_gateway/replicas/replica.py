"""The gateway's view of one replica: its last status, the generations in flight there, and whether it may get more."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc

from tidewright.resilience.breaker import BreakerConfig, CircuitBreaker, Permit
from tidewright.resilience.deadline import Deadline
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import AdapterStatus, DecoderStatus
from tidewright.served_models import further_name
from tidewright_gateway.replicas.discovery import Endpoint
from tidewright_gateway.replicas.routing import Candidate, slow_start
from tidewright_gateway.replicas.triton import Reply, TritonCall, TritonClient

DECODER, FALLBACK = "decoder", "fallback"
"""Triton's models of the first model; a further one has a decoder of another name, and no fallback."""
LATE = 1.0  # seconds after a deadline within which the replica should have ended the generation
FRESH = 2.0  # seconds until a reported load is stale


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
    """Of its generation. The replica is told, and should keep it by itself."""
    adapter: str | None = None
    """Its LoRA adapter."""
    is_last: bool = False
    """No further one follows if it brings no token."""
    num_tokens: int = 0
    outlived: bool = False
    """Its replica said meanwhile that it has no such model: it may be of a model that is gone, and never end."""
    outcome: Outcome | None = None
    """Once it has ended."""
    # For its span.
    span_id: str = ""
    began: float = 0.0
    tokens_before: int = 0
    """Of its generation, from earlier attempts."""
    timings: bytes | None = None
    """JSON of schema.Timings, if the replica told them."""
    waits_since: float | None = None
    """When the pending read began. None: no read is pending, because the client has not taken earlier replies."""

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
        """Seconds that the replica has been silent. A client that reads slowly does not count."""
        return 0.0 if self.waits_since is None else now - self.waits_since

    def expired(self, now: float) -> ModelError | None:
        """Set if the replica has missed the deadline: the reason to give the attempt up."""
        if not self.deadline.expired(now - LATE):
            return None
        return ModelError("request timed out; the model did not end it in time", Outcome.REQUEST_TIMEOUT)

    def overdue(self, first_token: float, stall: float, now: float) -> ModelError | None:
        """The reason to stop waiting for it, if any. Both limits are in seconds."""
        limit = stall if self.num_tokens else first_token
        if self.waited(now) <= limit:
            return None
        if self.num_tokens:
            return ModelError(f"no further token within {stall:g} s", Outcome.STALLED)
        return ModelError(f"no first token within {first_token:g} s", Outcome.FIRST_TOKEN_TIMEOUT)


@dataclass(eq=False)
class Replica:
    """Used by the event loop's thread only. Times are of time.monotonic(); -inf means never."""

    address: str
    client: TritonClient
    breaker: CircuitBreaker
    weight: float = 1.0
    decoder: str = DECODER
    """Its model in Triton that this is about."""
    label: str = field(init=False)
    """In log and metrics: its address, and the name of the model if that is not the first."""
    status: DecoderStatus | None = None
    """Its last status; None before the first one and after an error."""
    heard_at: float = -math.inf
    """When the last status arrived."""
    lived_at: float = -math.inf
    """When its engine last gave a sign of life, by a status or by tokens."""
    status_took: float | None = None
    """Duration of the last status request, in seconds."""
    others: int = 0
    """Requests of other clients there, as of the last status."""
    in_flight_when_asked: int = 0
    asked_at: float | None = None
    """When the pending status request was sent."""
    unanswered: float = 0.0
    """Seconds of that in which this process was listening and received no tokens either."""
    embedding_size: int | None = None
    """By its last status: numbers in an embedding, 0 if it generates text. None before the first one."""
    tells_details: bool = False
    """It knows the outputs that older servers refuse to be asked for."""
    tells_timings: bool = False
    """Likewise, of `timings`."""
    adapters: Mapping[str, AdapterStatus] = field(default_factory=dict)
    """By name, as of its last status: LoRA adapters that it has, or had."""
    serves_adapters: bool = False
    """By its last status."""
    adapter_troubles: dict[str, str] = field(default_factory=dict)
    """Why it did not load or unload an adapter as it was told."""
    adapters_retry_at: float = -math.inf
    """When it may be told again."""
    knows_tenants: bool = False
    """Likewise, the sampling parameters `tenant` and `tenant_weight`."""
    knows_targets: bool = False
    """Likewise, `ttft_target` and `tpot_target`."""
    fallback: DecoderStatus | None = None
    """The last status of its fallback; None if it has none that can be used."""
    trouble: ModelError | None = field(default_factory=lambda: ModelError("not checked yet", Outcome.UNAVAILABLE))
    """Why it can't take requests, by its status."""
    misfit: str = ""
    """By its last status: what it serves instead of this gateway's model; nothing of it says anything of that model."""
    suspicion: ModelError | None = None
    """A request failed as if the replica were gone: it gets nothing until it proves healthy."""
    leaving: bool = False
    """It was removed from the replicas: it gets no new requests and is dropped when those it has are done."""
    ejected: ModelError | None = None
    """Why it is avoided while others are healthy: it reports healthy, but generates nothing."""
    failed_probes: int = 0
    """Consecutive failed generation probes."""
    probed_at: float = -math.inf
    """When its last generation probe began or was skipped."""
    probe_took: float | None = None
    """Duration of the last successful one, in seconds."""
    generated_at: float = -math.inf
    """When a request last got its first token."""
    came_at: float = -math.inf
    """When it was added or recovered; -inf if it was healthy when the gateway started."""
    took_requests: bool = False
    load_is_stale: bool = True
    """Both as last reported to log and metrics."""
    attempts: set[Attempt] = field(default_factory=set)
    """At the decoder."""
    fallbacks: set[Attempt] = field(default_factory=set)
    """At the fallback; they survive a failure of the decoder."""

    def __post_init__(self) -> None:
        name = further_name(self.decoder)
        self.label = f"{self.address}/{name}" if name else self.address

    @classmethod
    def at(
        cls,
        endpoint: Endpoint,
        channels: int,
        breaker: BreakerConfig,
        credentials: grpc.ChannelCredentials | None,
        decoder: str = DECODER,
    ) -> Replica:
        client = TritonClient(endpoint.address, channels, credentials)
        return cls(endpoint.address, client, CircuitBreaker(breaker), endpoint.weight, decoder)

    @property
    def embeds(self) -> bool:
        """It computes embeddings, and generates no text."""
        return bool(self.embedding_size)

    def has_adapter(self, name: str | None) -> bool:
        """None is the base model."""
        return name is None or ((found := self.adapters.get(name)) is not None and found.loaded)

    @property
    def is_up(self) -> bool:
        """Its status allows requests."""
        is_well = self.trouble is None and self.suspicion is None
        return is_well and not self.leaving and not (self.status and self.status.draining)

    @property
    def takes_requests(self) -> bool:
        return self.is_up and self.ejected is None

    @property
    def why_not(self) -> str:
        """Why it gets no requests; empty if it does."""
        if self.takes_requests:
            return ""
        return "leaving" if self.leaving else str(self.trouble or self.suspicion or self.ejected or "draining")

    @property
    def in_flight(self) -> int:
        """Generations of this gateway there."""
        return len(self.attempts) + len(self.fallbacks)

    @property
    def running(self) -> Iterator[Attempt]:
        """A copy, since attempts may end while it is iterated."""
        return itertools.chain(tuple(self.attempts), tuple(self.fallbacks))

    def heard(self, status: DecoderStatus, patience: float, now: float, misfit: str = "") -> None:
        """Takes a status.

        Args:
            patience: maximum silence of its engine, in seconds.
            misfit: what it serves, if that is not what this gateway is for.
        """
        self.status, self.heard_at, self.trouble, self.suspicion = status, now, None, None
        self.misfit = misfit
        self.embedding_size, self.tells_details = status.embedding_size, status.tells_details
        self.serves_adapters = status.adapters is not None
        self.adapters = {adapter.name: adapter for adapter in status.adapters or ()}
        self.tells_timings, self.knows_tenants = status.tells_timings, status.knows_tenants
        self.knows_targets = status.knows_targets
        self.lived_at = max(self.lived_at, now - status.silence)
        # The figure may or may not include what began or ended since the status request.
        self.others = max(status.active - max(len(self.attempts), self.in_flight_when_asked), 0)
        if misfit:
            self.trouble = ModelError(misfit, Outcome.UNAVAILABLE)
        elif status.silence > patience:
            self.trouble = ModelError(f"no sign of life from the engine for {status.silence:.1f} s", Outcome.STALLED)
        elif status.trouble and not status.draining:
            # Its bridge keeps all requests and replays them to the next engine, so streams stay.
            self.trouble = ModelError(status.trouble, Outcome.UNAVAILABLE)

    def lost(self, error: ModelError) -> None:
        """It did not answer, or with an error.

        Its generations are lost if its stub died. Otherwise they may go on: a model that is being unloaded has no
        status, but ends what runs.
        """
        self.status, self.trouble, self.suspicion = None, error, None
        for attempt in tuple(self.attempts):
            attempt.outlived |= self.is_stopping
            if error.outcome is Outcome.STUB_DIED:
                attempt.call.abandon(self.gone)

    @property
    def is_silent(self) -> bool:
        """It or its engine gives no sign of life: gone, stopping, or just busy."""
        return self.trouble is not None and (self.status is None or self.trouble.outcome is Outcome.STALLED)

    @property
    def is_stopping(self) -> bool:
        """Triton answers, but not for the model. What runs there ends with the model, or with Triton."""
        return self.trouble is not None and self.status is None and self.trouble.outcome is not Outcome.STALLED

    @property
    def gone(self) -> ModelError:
        """For generations there. Callers must not learn addresses, which the trouble may have."""
        return ModelError("the model is gone", self.trouble.outcome if self.trouble else Outcome.UNAVAILABLE)

    def showed_life(self, now: float) -> None:
        """It answered a request, even if it is too busy to answer status requests."""
        self.unanswered, self.lived_at = 0.0, now

    def generated(self, now: float) -> None:
        """A request got its first token."""
        self.generated_at, self.suspicion = now, None
        self.can_generate()

    def can_generate(self) -> None:
        """Clears earlier probe failures."""
        self.failed_probes, self.ejected = 0, None

    def fresh_status(self, now: float) -> DecoderStatus | None:
        """The status, unless it is stale."""
        return self.status if now - self.heard_at < FRESH else None

    def candidate(self, ramp: float, now: float) -> Candidate:
        """For routing. `ramp`: seconds of slow start."""
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
            "adapters": sorted(name for name, adapter in self.adapters.items() if adapter.loaded),
            "adapter_troubles": dict(self.adapter_troubles),
        }
