"""The way of the endpoints that count: their routes are FastAPI's and in its document, but its layers are left out.

They took a quarter of a short request's CPU time: eight callables around each other, a search for the route, and a body
that is parsed and validated in two steps (`python -m benchmarks.gateway throughput`).
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send


class FastPath:
    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        """`routes`: of POST requests; their endpoints take the request alone, and give a response."""
        self._app = app
        self._routes = {route.path: route for route in routes if isinstance(route, APIRoute)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError, for whoever calls."""
        route = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            return await self._app(scope, receive, send)
        scope["route"] = route
        response = await route.endpoint(Request(scope, receive))
        await response(scope, receive, send)
