"""Endpoints for operators: health, version, metrics, status, drain."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, StrictStr
from starlette.responses import Response

from tidewright import __version__
from tidewright.logs import event
from tidewright.resilience.errors import ModelError
from tidewright_gateway.metrics.sampling import Sampler
from tidewright_gateway.models import Model
from tidewright_gateway.openai.errors import ApiError, invalid
from tidewright_gateway.parts import Parts
from tidewright_gateway.replicas.failover import Failover
from tidewright_gateway.replicas.replica import Replica

log = logging.getLogger(__name__)


class DrainRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    replica: StrictStr | None = None
    """Its address, as /admin/status has it. Needed unless there is only one."""


class ModelRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: StrictStr
    """Its name, as /v1/models has it."""


def make_operations_router(parts: Parts, sampler: Sampler) -> APIRouter:
    router = APIRouter()

    @router.get("/health/live")
    async def live() -> dict[str, str]:
        """200 while the process works."""
        return {"status": "live"}

    @router.get("/health")
    @router.get("/health/ready")
    async def ready() -> dict[str, Any]:
        """200 if a replica can take requests for one of the models, else 503. Names lost stores and models that no
        replica can serve, says if the key store is empty, and counts replicas that can't take requests; /admin/status
        has more."""
        lost = [name for name, trouble in parts.stores.items() if trouble]
        if parts.models.trouble:
            message = "no replica can take requests"
            if parts.authenticator.has_no_keys:
                message += ", and the key store is empty, so every API key is refused"
            raise ApiError(503, message, code="not_ready", retry_after=1)
        in_trouble = {one.address for one in parts.models.replicas if not (one.takes_requests or one.leaving)}
        away = parts.models.in_trouble
        return {
            "status": "ready",
            **({"lost_stores": lost} if lost else {}),
            **({"key_store_empty": True} if parts.authenticator.has_no_keys else {}),
            **({"replicas_in_trouble": len(in_trouble)} if in_trouble else {}),
            **({"models_in_trouble": away} if away else {}),
        }

    @router.get("/version")
    async def version() -> dict[str, str]:
        """The gateway's version."""
        return {"version": __version__}

    @router.get("/metrics")
    async def show_metrics() -> Response:
        """The gateway's own metrics, for Prometheus."""
        sampler.sample()
        return Response(parts.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/admin/status")
    async def status() -> dict[str, Any]:
        """Status of the gateway and its replicas; times in seconds. Requires the role admin."""
        first, *further = parts.models
        return {
            "level": parts.models.level.name.lower(),
            "running": parts.models.num_running,
            "waiting": parts.models.num_waiting,
            "stores": {name: trouble or "well" for name, trouble in parts.stores.items()},
            "cache": {
                "bytes": parts.cache.num_bytes,
                **{state.value.lower(): count for state, count in parts.cache.counts.items()},
            },
            "replicas": first.failover.snapshot(),
            "models": {model.name: _of_model(model) for model in further},
        }

    @router.post("/admin/drain")
    async def drain(request: Request, body: DrainRequest) -> dict[str, str]:
        """Ends a replica gently: it takes no new requests, finishes those it has, and its `tidewright serve` ends.
        Requires the role admin."""
        replica = _named(body.replica, parts.models.first.failover)
        key_id = request.scope["state"]["context"].caller.key_id
        log.info("drained by %s", key_id, extra=event("replica_drained", replica=replica.address))
        try:
            await parts.models.drain(replica.address)
        except ModelError as error:
            raise ApiError(503, f"{replica.address} can't be drained: {error}", code="not_drained") from None
        return {"draining": replica.address}

    @router.post("/admin/models/load")
    async def load_model(request: Request, body: ModelRequest) -> dict[str, str]:
        """Loads a model on all replicas that were started with it, and answers when they take its requests. Requires
        the role admin."""
        await parts.models.change(body.model, load=True)
        _log_change(request, body.model, "loaded")
        return {"loaded": body.model}

    @router.post("/admin/models/unload")
    async def unload_model(request: Request, body: ModelRequest) -> dict[str, str]:
        """Unloads a model on all replicas: its requests may finish, new ones are refused, and other models are not
        disturbed. Requires the role admin."""
        await parts.models.change(body.model, load=False)
        _log_change(request, body.model, "unloaded")
        return {"unloaded": body.model}

    return router


def _log_change(request: Request, model: str, change: str) -> None:
    key_id = request.scope["state"]["context"].caller.key_id
    log.info("the model %s was %s by %s", model, change, key_id, extra=event("model_changed"))


def _of_model(model: Model) -> dict[str, Any]:
    return {
        "level": model.ladder.level.name.lower(),
        "running": model.queue.num_running,
        "waiting": model.queue.num_waiting,
        "replicas": model.failover.snapshot(),
    }


def _named(address: str | None, failover: Failover) -> Replica:
    """Raises ApiError: it is none of the replicas, or there are several to choose from."""
    known = {replica.address: replica for replica in failover.replicas if not replica.leaving}
    if address is None and len(known) == 1:
        return next(iter(known.values()))
    if address in known:
        return known[address]
    choice = f"the replicas are {', '.join(known)}" if known else "there are no replicas"
    if address is None:
        raise invalid(f"name the replica to drain: {choice}", "replica")
    raise ApiError(404, f"there is no replica {address[:200]!r}: {choice}", code="no_such_replica", param="replica")
