"""Access control of all paths outside the pipeline, which authenticates by itself."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from tidewright_gateway.auth import Authenticator, require_admin
from tidewright_gateway.context import RequestContext
from tidewright_gateway.websocket.backend import PATH as WEBSOCKET

# Keys are required by default, also for paths added later.
FOR_ALL = frozenset(
    (
        "/",
        "/docs",
        "/openapi.json",
        "/health",
        "/health/live",
        "/health/ready",
        WEBSOCKET,  # plain HTTP only gets 426; over the WebSocket, the session authenticates
    )
)
_FOR_ALL_BELOW = "/page/"
_FOR_ADMINS = ("/metrics", "/admin/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class Authentication:
    def __init__(self, app: ASGIApp, authenticator: Authenticator) -> None:
        self._app, self._authenticator = app, authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError, for whoever calls."""
        if scope["type"] == "http":
            path, context = scope["path"], scope["state"]["context"]
            assert isinstance(context, RequestContext)
            if path not in FOR_ALL and not path.startswith(_FOR_ALL_BELOW):
                context.caller = await self._authenticator.caller(context.credential)
                if path.startswith(_FOR_ADMINS):
                    require_admin(context.caller)
        await self._app(scope, receive, send)
