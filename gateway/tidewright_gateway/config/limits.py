"""Options of quotas, the queue and degradation under load."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class LimitSettings(BaseModel):
    limits_store: str = Field(
        "",
        description="Where usage is counted: redis://HOST:PORT/DB (rediss:// for TLS) to share it between gateways. "
        "Empty: in this gateway.",
    )
    limits_when_lost: Literal["open", "closed"] = Field(
        "open", description="While that store is unreachable: serve without limits (open), or answer 503 (closed)."
    )
    limit_requests_per_second: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Requests per second of a key without limits of its own. 0: no limit.",
    )
    limit_concurrent: int = Field(0, ge=0, description="Its concurrent requests, running or queued. 0: no limit.")
    limit_tokens_per_minute: int = Field(
        0, ge=0, description="Its tokens per minute, prompt and completion. 0: no limit."
    )
    limit_tokens_per_day: int = Field(0, ge=0, description="Its tokens per day (UTC). 0: no limit.")
    max_running: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Maximum concurrent generations per replica; further ones queue. 0: the batch size of its engine.",
    )
    max_queue: int = Field(1000, ge=0, le=1_000_000, description="Maximum queued generations; beyond it, 503.")
    max_queue_share: float = Field(0.5, gt=0, le=1, description="Maximum share of the queue for one key.")
    queue_timeout: float = Field(60.0, gt=0, le=86400, description="Maximum seconds in the queue; beyond it, 503.")
    degradation: bool = Field(
        False,
        description="Under load, shorten answers, then answer with the fallback, then answer 503: see `degrade_...`.",
    )
