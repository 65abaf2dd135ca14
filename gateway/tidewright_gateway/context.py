"""State of one request from arrival to end; each phase of the pipeline adds its part."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tidewright.logs import bounded
from tidewright.resilience.degradation import Route
from tidewright.schema import AdapterStatus
from tidewright_gateway.admission.limits import Reservation
from tidewright_gateway.admission.limits.store import LimitName
from tidewright_gateway.auth.callers import ANONYMOUS, Caller
from tidewright_gateway.cache.responses import CachePolicy, CacheState
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.openai.fields import FieldPolicy
from tidewright_gateway.openai.wording import Wording
from tidewright_gateway.replicas.failover import Generation
from tidewright_gateway.replicas.replica import FALLBACK
from tidewright_gateway.replicas.triton import Reply, least_of
from tidewright_gateway.tracing.context import TraceContext
from tidewright_gateway.tracing.record import NO_RECORD, Record

if TYPE_CHECKING:
    from tidewright_gateway.models import Model

_MAX_MODEL, _MAX_REPLICAS = 128, 64


@dataclass(eq=False)
class RequestContext:
    request_id: str
    trace: TraceContext
    credential: str | None = None
    """The key or token of the request, as in the Authorization header."""
    policy: CachePolicy = CachePolicy.USE
    is_anthropic: bool = False
    """Its answer, and an error, have the form of Anthropic's API."""
    record: Record = NO_RECORD
    """For its spans."""
    arrived_at: float = field(default_factory=time.monotonic)

    model: str | None = None
    """That it asks for."""
    adapter: AdapterStatus | None = None
    """The LoRA adapter that this names."""
    served: Model = None  # type: ignore[assignment]
    """The one that it gets; valid once its body is read."""
    caller: Caller = ANONYMOUS
    """Valid once the request is authenticated."""
    reservation: Reservation = field(default_factory=lambda: Reservation(""))
    generations: list[Generation] = field(default_factory=list)
    """One for each prompt and choice."""
    num_prompt_tokens: int = 0
    prompt_end: str = ""
    """The last characters of a chat's rendered prompt."""
    ignored_fields: FieldPolicy = field(default_factory=FieldPolicy)
    is_guided: bool = False
    """A grammar decides what its answer begins with."""
    wording: Wording = field(default_factory=Wording)
    """How errors of the model's side are told."""
    choices_per_prompt: int = 1
    echoes: list[str] = field(default_factory=list)
    """The prompt text of each generation, for `echo`; else empty."""
    is_repeatable: bool = False
    """An identical request would get the same answer."""
    growth: int = 0
    """Tokens by which the reservation grows when it is used up; 0 if it covers the longest answer."""
    is_smaller: bool = False
    """A smaller variant of its model answers, because of the load."""
    route: Route = Route.DECODER
    is_shortened: bool = False
    """The load reduced its max_tokens."""

    num_tokens: int = 0
    """Generated so far, in all."""
    num_cached_tokens: int = 0
    """Of its prompts, those that an engine's prefix cache had."""
    limited_by: LimitName | None = None
    """The limit that ended it early."""
    cache_states: list[CacheState] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    """Of its generations, as they ended."""
    models: set[str] = field(default_factory=set)
    """Triton models that have answered."""
    first_token_after: float | None = None
    """Seconds."""
    last_token_after: float = 0.0
    """Seconds, of the last that has come so far."""
    queued_for: float | None = None
    """Seconds; the longest of its generations."""
    ended_by: ApiError | None = None
    """Why the gateway ended it, if it did."""
    error: ApiError | None = None
    """With which it was answered, or its stream ended."""

    @property
    def adapter_name(self) -> str | None:
        return self.adapter.name if self.adapter else None

    def take(self, index: int, reply: Reply) -> None:
        """Counts a reply of a generation."""
        if reply.num_cached_tokens and index % self.choices_per_prompt == 0:
            self.num_cached_tokens += reply.num_cached_tokens
        self.models.add(reply.served_by)
        self.num_tokens += len(reply.token_ids)
        if reply.finish_reason:
            self.finish_reasons.append(reply.finish_reason)
        if reply.token_ids:
            self.last_token_after = time.monotonic() - self.arrived_at
            if self.first_token_after is None:
                self.first_token_after = self.last_token_after

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds from token to token after the first; with several generations the mean of all. None: there is one."""
        further = self.num_tokens / len(self.generations) - 1 if self.generations else 0
        if further <= 0 or self.first_token_after is None:
            return None
        return (self.last_token_after - self.first_token_after) / further

    @property
    def served_by(self) -> str:
        return least_of(self.models)

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the answer, as far as known."""
        found = dict(self.reservation.headers)
        if self.models:
            found["X-Served-By"] = self.served_by
        if self.cache_states:
            # An answer counts as generated if one of its generations was.
            worst = max(self.cache_states, key=list(CacheState).index)
            found["X-Cache"] = worst.value
        if self.route is Route.FALLBACK and self.served_by == FALLBACK:
            found["X-Degraded"] = "fallback"
        elif self.is_smaller:
            found["X-Degraded"] = "smaller-variant"
        elif self.is_shortened:
            found["X-Degraded"] = "short-answer"
        if self.limited_by:
            found["X-Limited-By"] = self.limited_by
        if self.ignored_fields.ignored:
            found["X-Ignored-Fields"] = ", ".join(self.ignored_fields.ignored)
        return found

    @property
    def end(self) -> tuple[str, str, str]:
        """For the metrics: id of its key, code of its error, limit that refused it; empty if there was none."""
        error = self.error
        return (self.caller.key_id, error.code, error.limit) if error else (self.caller.key_id, "", "")

    @property
    def facts(self) -> dict[str, Any]:
        """For the access log."""
        found: dict[str, Any] = self.log_fields
        if self.model is not None:
            found["model"] = bounded(self.model, _MAX_MODEL)
        if self.generations:
            replicas = [address for generation in self.generations for address in generation.served_by]
            found |= {
                "prompt_tokens": self.num_prompt_tokens,
                "completion_tokens": self.num_tokens,
                "queue_seconds": self.queued_for and round(self.queued_for, 4),
                "first_token_seconds": self.first_token_after and round(self.first_token_after, 4),
                "cache": [state.value for state in self.cache_states],
                "served_by": self.served_by if self.models else None,
                "replicas": replicas,
                "attempts": len(replicas),
            }
            if self.generations[0].embeds or len(replicas) > _MAX_REPLICAS:
                found["replicas"] = sorted(set(replicas))[:_MAX_REPLICAS]
        if limit := self.limited_by or (self.error and self.error.limit):
            found["limited_by"] = limit
        if self.error:
            found["error"] = self.error.code
        return found

    @property
    def log_fields(self) -> dict[str, Any]:
        """For all logs."""
        found: dict[str, Any] = {"request_id": self.request_id, "trace_id": self.trace.trace_id}
        if self.caller is not ANONYMOUS:  # else it is not known, or nobody needs a key
            found["key_id"] = self.caller.key_id
        return found
