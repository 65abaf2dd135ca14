"""The FastAPI application, put together."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from tidewright import __version__
from tidewright.cache import find_prepared
from tidewright.tokenization import Tokenizer
from tidewright_gateway.admission.ladder import Admission
from tidewright_gateway.admission.limits import make_limiter
from tidewright_gateway.auth import Authenticator
from tidewright_gateway.cache.responses import ResponseCache
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.http.fast_path import FastPath
from tidewright_gateway.http.middleware import Middleware
from tidewright_gateway.http.tracing import Tracer
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.openai.errors import JSON, ApiError, internal, invalid
from tidewright_gateway.openai.prompts import Prompts
from tidewright_gateway.openai.protocol import ChatRequest, CompletionRequest, of_validation
from tidewright_gateway.openai.routes import make_router
from tidewright_gateway.page import make_page_router
from tidewright_gateway.pipeline import Pipeline
from tidewright_gateway.replicas.failover import Failover
from tidewright_gateway.websocket.backend import PipelineBackend
from tidewright_gateway.websocket.hub import Hub
from tidewright_gateway.websocket.routes import make_stream_router


def make_app(settings: GatewaySettings, limits_socket: Path | None = None) -> ASGIApp:
    """Reads the tokenizer; the replicas are asked when the application starts.

    `limits_socket`: of the parent of several workers, which counts for all.
    """
    metrics, tracer = Metrics(), Tracer(settings.trace_sample_ratio)
    authenticator = Authenticator(settings)
    prompts = Prompts(Tokenizer(find_prepared(settings.model)))
    cluster = Failover(settings, metrics, prompts.tokenizer.max_model_len)
    limiter, cache = make_limiter(settings, limits_socket), ResponseCache(settings.cache_size, settings.cache_ttl)
    admission = Admission(settings, cluster, metrics)
    service = Pipeline(settings, cluster, prompts, limiter, admission, cache, metrics)
    hub = Hub(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await authenticator.start()
        await limiter.start()
        await cluster.start()
        hub.start()
        # What there is by now stays: looking through it again and again would stop all requests, 50 ms each time.
        gc.collect()
        gc.freeze()
        yield
        gc.unfreeze()
        await hub.stop()
        await cluster.stop()
        await limiter.close()
        await authenticator.stop()

    app = FastAPI(title="Tidewright", version=__version__, lifespan=lifespan, redoc_url=None)
    router = make_router(settings, cluster, prompts, service)
    app.include_router(router)
    app.include_router(
        make_stream_router(settings, hub, PipelineBackend(service, authenticator, tracer, metrics), metrics)
    )
    app.include_router(make_page_router())

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """200 as long as the gateway's process works."""
        return {"status": "live"}

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        """200 if a replica can take requests, else 503 and why none can."""
        if trouble := cluster.trouble:
            raise ApiError(503, f"no replica can take requests ({trouble})", code="not_ready", retry_after=1)
        return {"status": "ready"}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """The gateway's own metrics, for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/admin/status")
    async def status() -> dict[str, Any]:
        """How the gateway and its replicas are, for people; times in seconds. Needs the role admin."""
        return {
            **admission.snapshot(),
            "cache": {"bytes": cache.num_bytes, **{state.value.lower(): n for state, n in cache.counts.items()}},
            "replicas": cluster.snapshot(),
        }

    @app.exception_handler(ApiError)
    async def of_api(request: Request, error: ApiError) -> Response:
        return Response(error.body, error.status, error.headers, JSON)

    @app.exception_handler(RequestValidationError)
    async def of_body(request: Request, error: RequestValidationError) -> Response:
        return await of_api(request, of_validation(list(error.errors())))

    @app.exception_handler(Exception)
    async def of_bug(request: Request, error: Exception) -> Response:
        return await of_api(request, internal())

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # FastAPI's, of a body that is no text or nested without end
            return await of_api(request, invalid(f"the body is not JSON: {error.detail}", code="invalid_json"))
        made = ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}", code="no_such_path")
        response = await of_api(request, made)
        response.headers.update(error.headers or {})
        return response

    bodies: dict[str, type[BaseModel]] = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}
    return Middleware(FastPath(app, router.routes, bodies), authenticator, tracer, metrics, settings.max_body)
