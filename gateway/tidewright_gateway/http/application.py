"""The application, put together."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from tidewright import __version__, logs
from tidewright.cache import find_prepared, prepared_at
from tidewright.served_models import decoder_of
from tidewright.tokenization import Tokenizer
from tidewright_gateway.admission.ladder import LoadLadder
from tidewright_gateway.admission.limits import make_limiter
from tidewright_gateway.admission.queue import Queue
from tidewright_gateway.admission.smaller_variant import SmallerVariant
from tidewright_gateway.auth import Authenticator
from tidewright_gateway.cache.responses import ResponseCache
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.http import certificates
from tidewright_gateway.http.adapters import make_adapter_router
from tidewright_gateway.http.authentication import Authentication
from tidewright_gateway.http.connection import PatientProtocol
from tidewright_gateway.http.cors import LoggedCors
from tidewright_gateway.http.fast_path import FastPath
from tidewright_gateway.http.hosts import Hosts
from tidewright_gateway.http.middleware import Middleware
from tidewright_gateway.http.operations import make_operations_router
from tidewright_gateway.http.query import QueryCheck
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.metrics.sampling import Sampler
from tidewright_gateway.models import Model, Models
from tidewright_gateway.openai.dialect import Dialect
from tidewright_gateway.openai.errors import ApiError, internal, invalid
from tidewright_gateway.openai.prompts import Prompts
from tidewright_gateway.openai.responses.routes import make_responses_router
from tidewright_gateway.openai.responses.shelf import Shelf
from tidewright_gateway.openai.responses.store import make_store
from tidewright_gateway.openai.routes import make_model_router, make_pipeline_router
from tidewright_gateway.page import make_page_router
from tidewright_gateway.parts import Parts
from tidewright_gateway.pipeline import Pipeline
from tidewright_gateway.replicas.failover import Failover
from tidewright_gateway.replicas.health import Expected
from tidewright_gateway.replicas.replica import DECODER
from tidewright_gateway.tracing.context import Tracer
from tidewright_gateway.tracing.traces import Traces
from tidewright_gateway.websocket.backend import PipelineBackend
from tidewright_gateway.websocket.hub import Hub
from tidewright_gateway.websocket.routes import make_stream_router

_UNKNOWN_CAPACITY = 64  # of a replica that does not report its batch size
_SHOWN_TO_PAGES = ["X-Request-Id", "X-Trace-Id", "X-Cache", "X-Served-By", "X-Degraded", "X-Limited-By", "Retry-After"]


def make_app(
    settings: GatewaySettings, limits_socket: Path | None = None, announce: Callable[[str], None] | None = None
) -> ASGIApp:
    """Loads the tokenizer. Replicas are checked when the application starts.

    Args:
        limits_socket: of the parent of several workers, which counts for all.
        announce: receives a text with address and replicas once it has started.
    """
    metrics, hosts = Metrics(settings.model_name, settings.busiest_keys), Hosts(settings)
    logs.on_dropped(metrics.log_lines_dropped)
    tracer, traces = Tracer(settings.trace_sample_ratio, settings.trace_callers), Traces(settings, metrics)
    authenticator = Authenticator(settings)
    models = _models(settings, metrics)
    limiter, cache = make_limiter(settings, limits_socket), ResponseCache(settings.cache_size, settings.cache_ttl)
    pipeline = Pipeline(settings, authenticator, limiter, models, cache, metrics)
    hub, shelf = Hub(settings), Shelf(make_store(settings, settings.workers), settings.max_body)
    parts = Parts(authenticator, limiter, models, cache, metrics, shelf.store, hub)
    sampler = Sampler(parts, settings.tls_cert)
    PatientProtocol.refused, PatientProtocol.going_away = metrics.refused_connection, pipeline.shut_down

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        traces.start()
        await authenticator.start()
        await limiter.start()
        await models.start()
        hub.start()
        background = (
            models.run_ladders(),
            sampler.run(),
            pipeline.end_revoked(),
            certificates.watch(settings.tls_cert, settings.tls_key),
        )
        jobs = [asyncio.create_task(job) for job in (*background, shelf.store.watch())]
        if announce:
            announce(_greeting(settings, models))
        # Long-lived objects are left out of garbage collection, which would stop all requests for 50 ms each time.
        gc.collect()
        gc.freeze()
        yield
        gc.unfreeze()
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        await hub.stop()
        await models.stop()
        await limiter.close()
        await shelf.store.close()
        await authenticator.stop()
        await asyncio.to_thread(traces.stop)

    app = FastAPI(
        title="Tidewright",
        version=__version__,
        lifespan=lifespan,
        openapi_url=None,  # `page` has the document, and pages that load nothing from a CDN
        redirect_slashes=False,  # redirects would contain the caller's Host header
    )
    fast = make_pipeline_router(settings, pipeline, shelf)
    backend = PipelineBackend(pipeline, authenticator, tracer, traces, metrics)
    query = QueryCheck(ignores_unknown=settings.unknown_fields == "ignore")
    routers = (
        fast,
        make_responses_router(pipeline, shelf, query),
        make_model_router(models, query),
        make_stream_router(settings, hub, backend, hosts, metrics),
        make_operations_router(parts, sampler),
        make_adapter_router(models),
        make_page_router(app),
    )
    for router in routers:
        app.include_router(router)
    _leave_errors_to_the_middleware(app)

    made: ASGIApp = FastPath(Authentication(app, authenticator), fast.routes, query, authenticator)
    made = Middleware(made, hosts, tracer, traces, metrics, settings.max_body, *_paths(routers))
    if origins := [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]:
        made = LoggedCors(
            made,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=_SHOWN_TO_PAGES,
        )
    return made


def _paths(routers: Iterable[APIRouter]) -> tuple[frozenset[str], frozenset[str]]:
    """Of the endpoints that take a body (hidden ones only say what to do instead), and of all without parameters."""
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    of_bodies = (route for route in routes if "POST" in (route.methods or ()) and route.include_in_schema)
    return frozenset(one.path for one in of_bodies), frozenset(one.path for one in routes if "{" not in one.path)


def _greeting(settings: GatewaySettings, models: Models) -> str:
    asked = "with a key" if settings.asks_for_keys else "without a key"
    served = f"model{'s' if len(models.names) > 1 else ''} {', '.join(models.names)}"
    lines = [f"The gateway listens on {settings.url}/v1 (OpenAI's API, {served}, {asked})"]
    lines += [f"  replica {replica.label}: {replica.why_not or 'healthy'}" for replica in models.replicas]
    return "\n".join(lines if models.replicas else [*lines, f"  no replica yet: {models.first.failover.trouble}"])


def _models(settings: GatewaySettings, metrics: Metrics) -> Models:
    """Loads a tokenizer for each."""
    first = _model(settings, metrics, settings.model_name, settings.model, DECODER)
    alone = settings.model_copy(update={"fallback": False})  # the replicas' fallback is the first's
    models = [first, *(_model(alone, metrics, one.name, one.model, decoder_of(one.name)) for one in settings.models)]
    smaller = next((model for model in models[1:] if model.name == settings.smaller_model), None)
    return Models(models, SmallerVariant(settings, first, smaller, metrics) if smaller else None)


def _model(settings: GatewaySettings, metrics: Metrics, name: str, source: str, decoder: str) -> Model:
    folder = find_prepared(source)
    tokenizer = Tokenizer(folder)
    prompts = Prompts(tokenizer, Dialect(tokenizer, settings))
    expected = Expected(folder.name, tokenizer.fingerprint)
    failover = Failover(settings, metrics, expected, tokenizer.max_model_len, decoder)
    share = settings.max_queue_share if settings.asks_for_keys else 1.0  # without keys, all are one caller
    queue = Queue(_capacity(settings, failover), settings.max_queue, share)
    ladder = LoadLadder(settings, failover, queue, metrics, "" if decoder == DECODER else name)
    return Model(name, prepared_at(folder), prompts, failover, queue, ladder)


def _capacity(settings: GatewaySettings, failover: Failover) -> Callable[[], int]:
    """A function that returns the current number of places for generations."""

    def capacity() -> int:
        if not settings.max_running and (known := failover.capacity):
            # Connections are not spread evenly over workers: each may take more than its share.
            return known if settings.workers == 1 else math.ceil(1.5 * known / settings.workers)
        usable = sum(replica.takes_requests for replica in failover.replicas)
        # Without replicas, requests that wait for one take places.
        return (settings.max_running or _UNKNOWN_CAPACITY) * max(usable, 1)

    return capacity


def _leave_errors_to_the_middleware(app: FastAPI) -> None:
    async def of_api(request: Request, error: ApiError) -> Response:
        request.scope["state"]["refusal"] = error
        return Response(status_code=error.status)

    async def of_http(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        if error.status_code == 405:
            message = f"{where}: method not allowed"
            made = ApiError(405, message, code="method_not_allowed", headers=error.headers)
        elif error.status_code == 404:
            made = ApiError(404, f"{where}: no such path", code="no_such_path")
        else:
            made = invalid(f"{where}: {error.detail}")
        return await of_api(request, made)

    async def of_parameters(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        _, *place = map(str, first["loc"])  # behind the part of the request that it is in
        param = ".".join(place) or None
        return await of_api(request, invalid(f"{param}: {first['msg']}" if param else first["msg"], param))

    async def of_bug(request: Request, error: Exception) -> Response:
        return await of_api(request, internal())

    app.add_exception_handler(ApiError, of_api)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, of_http)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, of_parameters)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, of_bug)
