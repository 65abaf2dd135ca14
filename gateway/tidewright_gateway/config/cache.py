"""Options of the response cache."""

from __future__ import annotations

from pydantic import BaseModel, Field


class CacheSettings(BaseModel):
    cache_size: int = Field(
        64 * 1024 * 1024,
        ge=0,
        le=1 << 40,
        description="Memory for cached answers, in bytes. 0 disables caching and sharing of identical requests.",
    )
    cache_ttl: float = Field(600.0, gt=0, le=604_800, description="Seconds until a cached answer expires.")
