"""What may go wrong with a WebSocket, and which of it a new connection does not mend."""

from __future__ import annotations

from typing import Any

from tidewright_client import explain, extras, retries
from tidewright_client.errors import ConnectionFailed, TidewrightError
from tidewright_client.settings import Settings

try:
    from websockets.exceptions import (
        ConnectionClosed,
        InvalidHandshake,
        InvalidMessage,
        InvalidStatus,
        WebSocketException,
    )
except ImportError:
    raise extras.missing("sessions", "websockets", "websocket") from None

FAILURES = (OSError, TimeoutError, EOFError, WebSocketException)


def without_redirects(connect: Any) -> Any:
    """Of websockets: it would follow them, whose target is not the address that the caller named."""
    if not isinstance(connect, type):  # the sync one of older versions, which does not
        return connect
    return type("Connect", (connect,), {"process_redirect": lambda _, error: error})


def explained(settings: Settings, error: Exception | None) -> TidewrightError:
    """Of an attempt to connect, or of a connection; None if the gateway closed it."""
    if isinstance(error, TidewrightError):
        return error
    if isinstance(error, InvalidStatus):
        return _status(settings, error)
    if isinstance(error, InvalidMessage):  # also if it broke
        return explain.no_http(settings, f"{error.__cause__ or error}")
    if error is None or isinstance(error, ConnectionClosed):
        what = "the gateway closed it" if error is None else str(error)
        return ConnectionFailed(f"the connection to {settings.url} broke: {what}; see the gateway's log")
    return explain.no_connection(settings, error)


def _status(settings: Settings, error: InvalidStatus) -> TidewrightError:
    response = error.response
    headers = {name.lower(): value for name, value in response.headers.raw_items()}
    return explain.refusal(settings, response.status_code, headers, bytes(response.body or b""))


def refused(settings: Settings, error: Exception) -> TidewrightError | None:
    """The error of a handshake that would be refused again; None for one that may go better."""
    if isinstance(error, InvalidStatus):
        return None if error.response.status_code in retries.STATUSES else _status(settings, error)
    if isinstance(error, InvalidHandshake) and not isinstance(error, InvalidMessage):  # which a break is, too
        return explain.unexpected(settings, f"did not answer as a WebSocket does ({error})")
    return None
