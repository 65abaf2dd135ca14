"""One request of the API, from its arrival to its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tidewright.resilience.degradation import Route, Treatment
from tidewright_gateway.admission.limits import Reservation
from tidewright_gateway.auth.callers import Caller
from tidewright_gateway.cache.responses import CachePolicy, CacheState
from tidewright_gateway.replicas.failover import Generation


@dataclass
class RequestContext:
    """A generation for each prompt and choice."""

    request_id: str
    trace_id: str
    caller: Caller
    tasks: list[Generation]
    num_prompt_tokens: int
    arrived_at: float  # time.monotonic()
    echoes: list[str]
    """Of each task, the text that its answer begins with; empty if that was not asked for."""
    policy: CachePolicy
    is_repeatable: bool
    treatment: Treatment
    is_shortened: bool
    """`treatment` gives less than was asked for."""
    reservation: Reservation
    cache_states: list[CacheState] = field(default_factory=list)
    models: set[str] = field(default_factory=set)
    """Models of Triton that have answered."""
    first_token_after: float | None = None
    """Seconds."""
    num_tokens: int | None = None
    """Generated in all; None until the end."""

    @property
    def served_by(self) -> str:
        return "fallback" if "fallback" in self.models else "decoder"

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer, as far as it is known."""
        found = dict(self.reservation.headers)
        if self.models:
            found["X-Served-By"] = self.served_by
        if self.cache_states:
            # One that had to be generated makes the answer a fresh one.
            worst = max(self.cache_states, key=list(CacheState).index)
            found["X-Cache"] = worst.value
        if self.treatment.route is Route.FALLBACK:
            found["X-Degraded"] = "fallback"
        elif self.is_shortened:
            found["X-Degraded"] = "short-answer"
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """For the access log."""
        return {
            "key_id": self.caller.key_id,
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "first_token_seconds": self.first_token_after and round(self.first_token_after, 4),
            "cache": [state.value for state in self.cache_states],
            "served_by": self.served_by if self.models else None,
            "replicas": [address for task in self.tasks for address in task.served_by],
        }
