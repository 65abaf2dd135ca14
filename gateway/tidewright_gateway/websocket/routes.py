"""The endpoint /v1/stream."""

from __future__ import annotations

from urllib.parse import urlsplit

from fastapi import APIRouter
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.http.hosts import Hosts
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.websocket.backend import PATH, Backend
from tidewright_gateway.websocket.hub import Hub
from tidewright_gateway.websocket.session import Session


def make_stream_router(
    settings: GatewaySettings, hub: Hub, backend: Backend, hosts: Hosts, metrics: Metrics
) -> APIRouter:
    router = APIRouter()

    @router.websocket(PATH)
    async def stream(socket: WebSocket) -> None:
        try:
            hosts.check(socket.scope["headers"])
            _refuse_cross_site(socket)
        except ApiError as error:
            if context := socket.scope["state"].get("context"):
                context.error = error  # for the access log
            await socket.send_denial_response(Response(error.body, error.status, error.headers))
            return
        await socket.accept()
        metrics.connected(1)
        try:
            await Session(socket, hub, backend, settings).run()
        except WebSocketDisconnect:  # while it was closed
            pass
        finally:
            metrics.connected(-1)

    @router.api_route(PATH, methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    async def plain() -> Response:
        message = f"{PATH} is a WebSocket; connect with ws:// or wss://. A proxy must pass on Upgrade and Connection"
        headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
        raise ApiError(426, message, code="upgrade_required", headers=headers)

    return router


def _refuse_cross_site(socket: WebSocket) -> None:
    """Browsers let any page connect to any address, also to one of this machine, and only say where it came from."""
    origin, host = socket.headers.get("origin"), socket.headers.get("host", "")
    if origin is None or _host_of(origin) == host.lower():
        return
    message = f"a page of {origin[:200]} may not connect to {host[:200]}; pages of the same host and port may"
    raise ApiError(403, message, code="cross_site")


def _host_of(origin: str) -> str | None:
    """With the port; None if it is no address."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None
