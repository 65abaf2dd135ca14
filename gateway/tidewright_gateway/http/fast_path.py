"""The way of the endpoints that count: their routes are FastAPI's and in its document, but its layers are left out.

They took a quarter of a short request's CPU time: eight callables around each other, a search for the route, and a body
that is parsed and validated in two steps (`python -m benchmarks.gateway throughput`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from tidewright_gateway.http.middleware import ClientGoneError
from tidewright_gateway.openai.protocol import of_validation


class FastPath:
    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute], bodies: Mapping[str, type[BaseModel]]) -> None:
        """`bodies`: of POST requests, by path; their endpoints take the body and the request, and give a response."""
        self._app, self._bodies = app, bodies
        self._routes = {route.path: route for route in routes if isinstance(route, APIRoute) and route.path in bodies}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError, for whoever calls."""
        route = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            return await self._app(scope, receive, send)
        scope["route"] = route
        request = Request(scope, receive)
        try:
            body = self._bodies[route.path].model_validate_json(await request.body())
        except ValidationError as error:
            raise of_validation(list(error.errors())) from None
        except ClientDisconnect:
            raise ClientGoneError from None
        response = await route.endpoint(body, request)
        await response(scope, receive, send)
