"""Options of health checks and failure detection."""

from __future__ import annotations

from pydantic import BaseModel, Field


class HealthSettings(BaseModel):
    probe_interval: float = Field(
        0.1, gt=0, le=60, description="Seconds between two status checks of a replica; ten times as many when idle."
    )
    patience: float = Field(
        0.5,
        gt=0,
        le=60,
        description="Seconds without a sign of life before a replica's streams resume on another one, if there is one.",
    )
    first_token_timeout: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="Seconds without a first token before a request is retried on another replica, if there is one.",
    )
    stall_timeout: float = Field(
        10.0,
        gt=0,
        le=3600,
        description="Seconds without a further token before a stream resumes on another replica, if there is one.",
    )
    wait_for_replica: float = Field(
        5.0, ge=0, le=600, description="Seconds that a request waits for a healthy replica before 503."
    )
    generation_probe_interval: float = Field(
        10.0,
        ge=0,
        le=3600,
        description="Seconds without a served request before a replica must generate a probe token. 0: never.",
    )
    generation_probe_timeout: float = Field(10.0, gt=0, le=3600, description="Timeout of such a probe, in seconds.")
    generation_probe_failures: int = Field(
        2,
        ge=1,
        le=100,
        description="Consecutive failed probes before a replica is ejected; one success readmits it.",
    )
