"""uvicorn's WebSocket, with what ASGI has no word for: how a connection is cut, ends gently at a shutdown, and is read.

Until its session is open, the client may have no key: no more of what it sends is read than of a request's headers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping
from typing import Any, cast

from uvicorn._types import ASGIReceiveEvent
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.http.connection import PatientProtocol

_KEY = "tidewright_transport"


BEFORE_OPEN = 64 * 1024
"""Bytes of a connection that are read before it is open: as many as the headers of a request may have."""


class Transport:
    """What a session knows of its connection. Under another server it does nothing."""

    def __init__(self, transport: asyncio.Transport | None = None, opened: Callable[[], None] = lambda: None) -> None:
        """`opened`: to be called once somebody is known to have a key; until then little is read."""
        self._transport, self.opened = transport, opened
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
    _room: int | None = BEFORE_OPEN  # bytes that may still be read before it is open; None once it is

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._held = bytearray()  # what came beyond them: the rest of one read

    def data_received(self, data: bytes) -> None:
        if self._room is not None and self.handshake_initiated:
            self._held += data[self._room :]
            data = data[: self._room]
            self._room -= len(data)
            self._stay_paused()
        if data:
            super().data_received(data)

    async def receive(self) -> ASGIReceiveEvent:
        message = await super().receive()  # which goes on reading
        self._stay_paused()
        return message

    def _stay_paused(self) -> None:
        if self._held:
            self.transport.pause_reading()

    def _opened(self) -> None:
        self._room, held = None, bytes(self._held)
        self._held.clear()
        if held and not self.transport.is_closing():
            if not self.read_paused:
                self.transport.resume_reading()
            self.data_received(held)

    async def run_asgi(self) -> None:
        self._own = Transport(self.transport, self._opened)
        self.scope["state"][_KEY] = self._own
        await super().run_asgi()

    def shutdown(self) -> None:
        PatientProtocol.going_away()
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
