"""What may go wrong with a WebSocket, and which of it a new connection does not mend."""

from __future__ import annotations

from tidewright_client import explain, retries
from tidewright_client.errors import TidewrightError
from tidewright_client.settings import Settings

try:
    from websockets.exceptions import InvalidHandshake, InvalidMessage, InvalidStatus, WebSocketException
except ImportError:
    raise ImportError("sessions need websockets: pip install 'tidewright-client[websocket]'") from None

FAILURES = (OSError, TimeoutError, EOFError, WebSocketException)


def refused(settings: Settings, error: Exception) -> TidewrightError | None:
    """The error of a handshake that would be refused again; None for one that may go better."""
    if isinstance(error, InvalidStatus):
        response = error.response
        if response.status_code in retries.STATUSES:
            return None
        headers = {name.lower(): value for name, value in response.headers.raw_items()}
        return explain.refusal(settings, response.status_code, headers, bytes(response.body or b""))
    if isinstance(error, InvalidHandshake) and not isinstance(error, InvalidMessage):  # which a break is, too
        return explain.unexpected(settings, f"did not answer as a WebSocket does ({error})")
    return None
