"""Answers for operators."""

from __future__ import annotations

from typing import Literal

from tidewright_gateway.document.base import ABSENT, Shown

Level = Literal["all_features", "short_answers", "fallback_only", "shed"]


class Liveness(Shown):
    status: Literal["live"]


class Readiness(Shown):
    status: Literal["ready"]
    lost_stores: list[str] = ABSENT
    """Stores that can't be reached."""
    key_store_empty: Literal[True] = ABSENT
    """Every API key is refused."""
    replicas_in_trouble: int = ABSENT
    """Replicas that can't take requests."""
    models_in_trouble: list[str] = ABSENT
    """Models that no replica can serve."""


class Version(Shown):
    version: str


class CacheStatus(Shown):
    bytes: int
    hit: int
    shared: int
    miss: int
    bypass: int


class ReplicaStatus(Shown):
    address: str
    weight: float
    takes_requests: bool
    trouble: str
    """Why it takes none; empty if it does."""
    draining: bool
    leaving: bool
    """It is no longer named, and ends what it has."""
    breaker: Literal["closed", "open", "half_open"]
    in_flight: int
    """Of this gateway."""
    others_in_flight: int
    """Of other gateways and workers."""
    load: float | None
    """0 to 1; null if it is not known."""
    status_seconds: float | None
    """Time of its last status request."""
    generation_probe_seconds: float | None
    failed_generation_probes: int
    slow_start_share: float
    adapters: list[str]
    """LoRA adapters that it has."""
    adapter_troubles: dict[str, str]
    """Why it did not load or unload one as it was told."""


class ModelStatus(Shown):
    level: Level
    running: int
    waiting: int
    replicas: list[ReplicaStatus]


class GatewayStatus(Shown):
    level: Level
    """Of the model that is worst off."""
    running: int
    waiting: int
    stores: dict[str, str]
    """`well`, or what is wrong."""
    cache: CacheStatus
    replicas: list[ReplicaStatus]
    """As they serve the first model."""
    models: dict[str, ModelStatus]
    """Those beside the first, by name."""


class LoadedModel(Shown):
    loaded: str
    """The model's name."""


class UnloadedModel(Shown):
    unloaded: str
    """The model's name."""


class Draining(Shown):
    draining: str
    """The replica's address."""
