"""Options of the WebSocket endpoint /v1/stream."""

from __future__ import annotations

from pydantic import BaseModel, Field


class WebSocketSettings(BaseModel):
    ws_max_generations: int = Field(
        100, ge=1, le=10_000, description="Maximum concurrent generations of one WebSocket connection."
    )
    ws_idle_timeout: float = Field(
        300.0, gt=0, le=86400, description="Seconds before a connection without messages and generations is closed."
    )
    ws_send_timeout: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="Seconds that a client may leave sent data unread, or a ping unanswered, before it is cut off.",
    )
    ws_ping_interval: float = Field(20.0, gt=0, le=3600, description="Seconds between two protocol pings.")
    ws_resume_grace: float = Field(
        10.0,
        ge=0,
        le=3600,
        description="Seconds that a generation outlives its connection, and its result is kept, to be resumed.",
    )
    ws_unsent_bytes: int = Field(
        16 * 1024 * 1024,
        ge=1024,
        le=1 << 40,
        description="Maximum unsent bytes of one connection; beyond it, the growing generation ends with an error.",
    )
    ws_live_bytes: int = Field(
        256 * 1024 * 1024,
        ge=1024,
        le=1 << 40,
        description="Maximum bytes of all generations together; beyond it, the largest one ends with an error.",
    )
    ws_kept: int = Field(1000, ge=0, le=1_000_000, description="Maximum generations kept without a connection.")
    ws_kept_bytes: int = Field(64 * 1024 * 1024, ge=0, le=1 << 40, description="Their maximum size together, in bytes.")
