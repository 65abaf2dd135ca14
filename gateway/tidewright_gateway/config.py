"""Every option of the gateway, validated once at start: flags, then `TIDEWRIGHT_GATEWAY_*`, then the defaults here."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from tidewright.cache import EMBEDDED_MODEL
from tidewright.resilience.config import ResilienceSettings


class GatewaySettings(ResilienceSettings, BaseSettings):
    """Options of `tidewright gateway`."""

    model_config = SettingsConfigDict(env_prefix="TIDEWRIGHT_GATEWAY_", extra="forbid", frozen=True)

    model: str = Field(
        EMBEDDED_MODEL, description="The model that the replicas serve, as they name it: its tokenizer is needed."
    )
    served_model_name: str = Field("", description="Its name in the API; empty for the last part of `model`.")
    host: str = Field("127.0.0.1", description="Address that the gateway listens on, of this machine only.")
    port: int = Field(8080, ge=1, le=65535, description="The gateway's port.")
    replicas: str = Field(
        "127.0.0.1:8001", description="Tritons to send requests to: gRPC addresses HOST:PORT, separated by commas."
    )
    routing: Literal["round_robin", "least_load", "prefix"] = Field(
        "least_load",
        description="How a replica is chosen: in turn, by least load, or one that has the prompt's beginning in its "
        "KV cache unless it has much more load than others.",
    )
    probe_interval: float = Field(0.1, gt=0, le=60, description="Seconds between two questions to a replica.")
    patience: float = Field(
        0.5,
        gt=0,
        le=60,
        description="Seconds without a sign of life from a replica after which its streams go on at another.",
    )
    first_token_timeout: float = Field(
        30.0, gt=0, le=3600, description="Seconds until a request without a token is tried at another replica."
    )
    stall_timeout: float = Field(
        10.0, gt=0, le=3600, description="Seconds without a further token after which a stream goes on at another."
    )
    wait_for_replica: float = Field(
        5.0, ge=0, le=600, description="Seconds that a request waits for a replica when none is well, before a 503."
    )
    request_timeout: float = Field(
        600.0, gt=0, le=86400, description="Longest time of a request, in seconds; its own timeout can be shorter."
    )
    max_body: int = Field(
        2 * 1024 * 1024, ge=1024, le=1 << 30, description="Longest body of a request, in bytes; more is a 413."
    )
    max_choices: int = Field(
        32, ge=1, le=4096, description="Prompts of one request times its n, at most; each is a generation."
    )
    cache_size: int = Field(
        64 * 1024 * 1024,
        ge=0,
        le=1 << 40,
        description="Memory for whole answers that would be the same again, in bytes; 0 keeps none, and lets no two "
        "requests share one generation.",
    )
    cache_ttl: float = Field(600.0, gt=0, le=604_800, description="Seconds that such an answer is kept.")
    trace_sample_ratio: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the requests without a traceparent that the replicas are to trace; the decision in a "
        "traceparent stands.",
    )
    read_timeout: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="Seconds that a request may take to arrive; then its connection is closed, with a 408 if the "
        "headers are there.",
    )
    send_timeout: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="Seconds that a client may leave unread what it was sent; then its connection is closed and its "
        "generation ends.",
    )
    channels: int = Field(4, ge=1, le=64, description="gRPC connections to each replica.")
    shutdown_grace: float = Field(
        10.0, ge=0, description="Seconds that running requests get to finish after Ctrl-C or SIGTERM."
    )
    log_level: Literal["info", "warning", "error"] = Field("warning", description="Lowest level to log.")

    @field_validator("host")
    @classmethod
    def _only_this_machine_comes_in(cls, value: str) -> str:
        try:
            is_loopback = value == "localhost" or ipaddress.ip_address(value).is_loopback
        except ValueError:
            is_loopback = False
        if not is_loopback:
            raise ValueError(
                f"{value} can be reached from other machines, and the gateway can't ask for keys yet; "
                "listen on 127.0.0.1 and put a proxy that asks for them in front"
            )
        return value

    @field_validator("replicas")
    @classmethod
    def _replicas_are_addresses(cls, value: str) -> str:
        addresses = split_addresses(value)
        if not addresses:
            raise ValueError("names no replica; give HOST:PORT, such as 127.0.0.1:8001")
        for address in addresses:
            host, _, port = address.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ValueError(f"{address!r} is not HOST:PORT, such as 127.0.0.1:8001")
        if len(set(addresses)) < len(addresses):
            raise ValueError("names a replica twice")
        return value

    @property
    def model_name(self) -> str:
        return self.served_model_name or Path(self.model).name


def split_addresses(text: str) -> list[str]:
    return [address for part in text.split(",") if (address := part.strip())]
