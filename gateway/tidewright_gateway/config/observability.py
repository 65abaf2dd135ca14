"""Options of logs and traces."""

from __future__ import annotations

from pydantic import BaseModel, Field

from tidewright.logs.setup import LogFormat, LogLevel
from tidewright.tracing.endpoint import OtlpEndpoint


class ObservabilitySettings(BaseModel):
    access_log: str = Field(
        "", description="File for the access log, one JSON object per request; - for standard output. Empty: none."
    )
    log_level: LogLevel = Field("info", description="Minimum log level; debug has lines for each request.")
    log_format: LogFormat = Field("text", description="Format of log lines: text, or one JSON object each.")
    log_file: str = Field("", description="File for the log, which may be rotated. Empty: standard error.")
    busiest_keys: int = Field(
        20, ge=1, le=1000, description="Maximum number of API keys with metrics of their own; the others are summed."
    )
    trace_sample_ratio: float = Field(
        0.0, ge=0, le=1, description="Share of requests whose trace is kept, however they end."
    )
    trace_callers: bool = Field(
        False, description="Honour the sampled flag of a caller's traceparent instead of `trace_sample_ratio`."
    )
    trace_slow: float = Field(
        30.0, gt=0, description="Seconds to the first token or the end from which on a trace is always kept."
    )
    otlp_endpoint: OtlpEndpoint = Field(
        "",
        description="Where spans go: http://HOST:4318, an OTLP/HTTP collector, or file:///PATH, one JSON object per "
        "span. Empty: nowhere.",
    )
