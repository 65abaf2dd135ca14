"""Options of the API: what its fields mean."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ApiSettings(BaseModel):
    unknown_fields: Literal["refuse", "ignore"] = Field(
        "refuse",
        description="What happens to a request with a field that nobody knows: it is refused by name, or the field is "
        "ignored and named in the header X-Ignored-Fields.",
    )
    tool_format: Literal["auto", "hermes", "llama3_json", "mistral", "pythonic"] = Field(
        "auto", description="How the model writes calls of tools. auto: by the words of its chat template."
    )
    reasoning: Literal["auto", "think", "none"] = Field(
        "auto",
        description="What the model thinks before its answer, between <think> and </think>, becomes reasoning_content. "
        "auto: if its chat template has these markers.",
    )
    generation_config: Literal["none", "model"] = Field(
        "none",
        description="Where sampling parameters that a request does not have come from: the API's own defaults "
        "(temperature 1), or the model's generation_config.json.",
    )
    response_store: str = Field(
        "",
        description="Where the responses of /v1/responses are stored: redis://HOST:PORT/DB (rediss:// for TLS), which "
        "several `workers` and gateways share. Empty: in memory if there is one worker, else nowhere.",
    )
    response_ttl: float = Field(
        30 * 86400.0, gt=0, le=3650 * 86400, description="Seconds until a stored response expires."
    )
    response_store_bytes: int = Field(
        64 * 1024 * 1024,
        ge=0,
        le=1 << 40,
        description="Memory for stored responses, in bytes; the least recently used is evicted. 0 stores none. Without "
        "effect with a `response_store`.",
    )
