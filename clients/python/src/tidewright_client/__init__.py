"""Client of Tidewright's gateway: `Client` and `AsyncClient`. The package's README shows how they are used."""

from tidewright_client.answers import Answer, Event, Finish, Text, ToolCall, Usage, UsageReport
from tidewright_client.async_client import AsyncClient, AsyncStream
from tidewright_client.client import Client, Stream
from tidewright_client.errors import (
    ConnectionFailed,
    Forbidden,
    Interrupted,
    InvalidRequest,
    NotFound,
    RateLimited,
    TidewrightError,
    TimedOut,
    Unauthenticated,
    Unavailable,
    UnexpectedAnswer,
)
from tidewright_client.hooks import CallInfo, Hooks

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "CallInfo",
    "Client",
    "ConnectionFailed",
    "Event",
    "Finish",
    "Forbidden",
    "Hooks",
    "Interrupted",
    "InvalidRequest",
    "NotFound",
    "RateLimited",
    "Stream",
    "Text",
    "TidewrightError",
    "TimedOut",
    "ToolCall",
    "Unauthenticated",
    "Unavailable",
    "UnexpectedAnswer",
    "Usage",
    "UsageReport",
]
