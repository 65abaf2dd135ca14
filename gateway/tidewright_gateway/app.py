"""The FastAPI application, put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from tidewright import __version__
from tidewright.cache import find_prepared
from tidewright.tokenization import Tokenizer
from tidewright_gateway.cluster import Cluster
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.edge import Edge
from tidewright_gateway.errors import JSON, ApiError, invalid
from tidewright_gateway.generation import Prompts
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.protocol import of_validation
from tidewright_gateway.routes import make_router


def make_app(settings: GatewaySettings) -> ASGIApp:
    """Reads the tokenizer; the replicas are asked when the application starts."""
    metrics = Metrics()
    prompts = Prompts(Tokenizer(find_prepared(settings.model)))
    cluster = Cluster(settings, metrics, prompts.tokenizer.max_model_len)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await cluster.start()
        yield
        await cluster.stop()

    app = FastAPI(title="Tidewright", version=__version__, lifespan=lifespan, redoc_url=None)
    app.include_router(make_router(settings, cluster, prompts, metrics))

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

    @app.exception_handler(ApiError)
    async def of_api(request: Request, error: ApiError) -> Response:
        return Response(error.body, error.status, error.headers, JSON)

    @app.exception_handler(RequestValidationError)
    async def of_body(request: Request, error: RequestValidationError) -> Response:
        return await of_api(request, of_validation(list(error.errors())))

    @app.exception_handler(Exception)
    async def of_bug(request: Request, error: Exception) -> Response:
        return await of_api(request, ApiError(500, "internal error; see the gateway's log", code="internal_error"))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # FastAPI's, of a body that is no text or nested without end
            return await of_api(request, invalid(f"the body is not JSON: {error.detail}", code="invalid_json"))
        made = ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}", code="no_such_path")
        response = await of_api(request, made)
        response.headers.update(error.headers or {})
        return response

    return Edge(app, metrics, settings.max_body)
