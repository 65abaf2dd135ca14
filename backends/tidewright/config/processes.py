"""Options of processes: how long they may take, and where their logs and spans go."""

from __future__ import annotations

from pydantic import BaseModel, Field

from tidewright.logs.setup import LogFormat, LogLevel
from tidewright.tracing.endpoint import OtlpEndpoint


class ProcessSettings(BaseModel):
    heartbeat_interval: float = Field(0.2, gt=0, le=60, description="Seconds between two heartbeats of the engine.")
    heartbeat_timeout: float = Field(
        30.0, gt=0, description="Seconds without a heartbeat after which the engine is killed and restarted."
    )
    start_timeout: float = Field(120.0, gt=0, description="Seconds the engine may take to load its model.")
    shutdown_grace: float = Field(
        10.0, ge=0, description="Seconds that running requests get to finish after Ctrl-C or SIGTERM."
    )
    log_level: LogLevel = Field("info", description="Minimum log level; debug has lines for each request.")
    log_format: LogFormat = Field("text", description="Format of log lines: text, or one JSON object each.")
    log_file: str = Field("", description="File for the log, which may be rotated. Empty: standard error.")
    otlp_endpoint: OtlpEndpoint = Field(
        "",
        description="Where spans go: http://HOST:4318, an OTLP/HTTP collector, or file:///PATH. Triton's own spans "
        "go to a collector only. Empty: nowhere.",
    )
