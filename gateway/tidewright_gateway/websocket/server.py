"""uvicorn's WebSocket, with what ASGI has no word for: to cut a connection, and to let it end gently at a shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any, cast

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from tidewright_gateway.config import GatewaySettings

_KEY = "tidewright_transport"


class Transport:
    """What a session knows of its connection. Under another server it does nothing."""

    def __init__(self, transport: asyncio.Transport | None = None) -> None:
        self._transport = transport
        self.is_going_away = False
        """The process ends when its connections have."""

    @classmethod
    def of(cls, scope: MutableMapping[str, Any]) -> Transport:
        return cast(Transport, scope.get("state", {}).get(_KEY) or cls())

    def abort(self) -> None:
        """Cuts the connection; what waits to be sent is dropped. Closing would wait for a client that does not read."""
        if self._transport:
            self._transport.abort()


class StreamProtocol(WebSocketsSansIOProtocol):
    """For uvicorn's `ws` option."""

    _own: Transport | None = None

    async def run_asgi(self) -> None:
        self._own = Transport(self.transport)
        self.scope["state"][_KEY] = self._own
        await super().run_asgi()

    def shutdown(self) -> None:
        if self._own is None or not self.handshake_complete or self.close_sent:
            super().shutdown()
        else:  # uvicorn would close it at once, in the middle of its generations
            self._own.is_going_away = True


def uvicorn_options(settings: GatewaySettings) -> dict[str, Any]:
    return {
        "ws": StreamProtocol,
        "ws_max_size": settings.max_body,
        "ws_ping_interval": settings.ws_ping_interval,
        "ws_ping_timeout": settings.ws_send_timeout,
        "ws_per_message_deflate": False,  # a token is too small to gain by it
    }
