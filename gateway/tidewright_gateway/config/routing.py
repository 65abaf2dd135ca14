"""Options of the replicas and of routing between them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class RoutingSettings(BaseModel):
    replicas: str = Field(
        "127.0.0.1:8001",
        description="Triton servers: comma-separated gRPC addresses HOST:PORT, with a weight as HOST:PORT*2; or "
        "dns:NAME:PORT for all addresses of a name; or file:PATH for a file with one address per line.",
    )
    discovery_interval: float = Field(
        5.0, gt=0, le=3600, description="Seconds between two lookups of dns:NAME:PORT. A file is read twice a second."
    )
    routing: Literal["round_robin", "least_load", "prefix"] = Field(
        "least_load",
        description="Routing policy: in turn, by least load, or by prefix affinity unless that replica is overloaded.",
    )
    slow_start: float = Field(
        10.0,
        ge=0,
        le=3600,
        description="Seconds in which a new or recovered replica ramps up from a tenth of its share to all of it.",
    )
    channels: int = Field(4, ge=1, le=64, description="gRPC connections per replica.")
    replica_tls: bool = Field(False, description="Use TLS to the replicas and verify their certificates.")
    replica_ca: str = Field(
        "", description="PEM file with the CA certificates that sign the replicas'. Empty: gRPC's default roots."
    )
    replica_cert: str = Field("", description="PEM file with the client certificate for the replicas. Empty: none.")
    replica_key: str = Field("", description="PEM file with the client certificate's private key.")
    fallback: bool = Field(
        True, description="Use the replicas' model `fallback`, if they serve one, when no decoder can answer."
    )
