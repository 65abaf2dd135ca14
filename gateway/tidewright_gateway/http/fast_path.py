"""Short path for the busiest endpoints: their routes belong to FastAPI and its document, but bypass its layers.

Those took a quarter of the CPU time of a short request: eight nested callables, the route lookup, and a body parsed and
validated in two steps (`python -m benchmarks.gateway throughput`).
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from tidewright_gateway.auth import Authenticator
from tidewright_gateway.http.query import QueryCheck


class FastPath:
    def __init__(
        self, app: ASGIApp, routes: Sequence[BaseRoute], query: QueryCheck, authenticator: Authenticator
    ) -> None:
        """`routes`: POST routes whose endpoints take the request only and return a response."""
        self._app, self._query, self._authenticator = app, query, authenticator
        self._routes = {route.path: route for route in routes if isinstance(route, APIRoute)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError, for whoever calls."""
        route = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            return await self._app(scope, receive, send)
        scope["route"] = route
        self._query.check(scope)
        # The pipeline asks again, once the body is there: nobody without a key has it kept until then.
        await self._authenticator.caller(scope["state"]["context"].credential)
        response = await route.endpoint(Request(scope, receive))
        await response(scope, receive, send)
