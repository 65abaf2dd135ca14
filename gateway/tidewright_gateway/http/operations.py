"""Endpoints for operators: health, version, metrics, status."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from tidewright import __version__
from tidewright_gateway.admission.ladder import LoadLadder
from tidewright_gateway.admission.limits import Limiter
from tidewright_gateway.admission.queue import Queue
from tidewright_gateway.auth import Authenticator
from tidewright_gateway.cache.responses import ResponseCache
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.replicas.failover import Failover


@dataclass(frozen=True)
class Parts:
    """The parts of the gateway that report something."""

    authenticator: Authenticator
    limiter: Limiter
    failover: Failover
    queue: Queue
    ladder: LoadLadder
    cache: ResponseCache
    metrics: Metrics

    @property
    def stores(self) -> dict[str, str]:
        """The trouble of each store; empty texts if there is none."""
        return {"keys": self.authenticator.trouble, "limits": self.limiter.trouble}


def make_operations_router(parts: Parts) -> APIRouter:
    router = APIRouter()

    @router.get("/health/live")
    async def live() -> dict[str, str]:
        """200 while the process works."""
        return {"status": "live"}

    @router.get("/health")
    @router.get("/health/ready")
    async def ready() -> dict[str, Any]:
        """200 if a replica can take requests, else 503. Names lost stores (keys, limits); see /admin/status."""
        lost = [name for name, trouble in parts.stores.items() if trouble]
        if parts.failover.trouble:
            raise ApiError(503, "no replica can take requests", code="not_ready", retry_after=1)
        return {"status": "ready", **({"lost_stores": lost} if lost else {})}

    @router.get("/version")
    async def version() -> dict[str, str]:
        """The gateway's version."""
        return {"version": __version__}

    @router.get("/metrics")
    async def show_metrics() -> Response:
        """The gateway's own metrics, for Prometheus."""
        for name, trouble in parts.stores.items():
            parts.metrics.store_lost(name, bool(trouble))
        return Response(parts.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/admin/status")
    async def status() -> dict[str, Any]:
        """Status of the gateway and its replicas; times in seconds. Requires the role admin."""
        return {
            "level": parts.ladder.level.name.lower(),
            "running": parts.queue.num_running,
            "waiting": parts.queue.num_waiting,
            "stores": {name: trouble or "well" for name, trouble in parts.stores.items()},
            "cache": {
                "bytes": parts.cache.num_bytes,
                **{state.value.lower(): count for state, count in parts.cache.counts.items()},
            },
            "replicas": parts.failover.snapshot(),
        }

    return router
