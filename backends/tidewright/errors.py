"""Errors that a request can end with. Each carries the finish reason; `model.py` maps it to a Triton code."""

from __future__ import annotations

from tidewright.schema import FinishReason


def seconds_text(timeout: float | None) -> str:
    """A timeout for a message, in three digits or whole seconds: a gateway passes on the rest of its caller's."""
    return "inf" if timeout is None else f"{timeout:.3g}" if timeout < 100 else f"{timeout:.0f}"


class RequestError(Exception):
    """A request that ends without (further) text. The message says what the caller can change."""

    reason: FinishReason = "engine_failed"


class InvalidRequestError(RequestError):
    reason: FinishReason = "invalid"


class OverloadedError(RequestError):
    reason: FinishReason = "overloaded"


class TimedOutError(RequestError):
    """The request's timeout passed before its first token."""

    reason: FinishReason = "timeout"


class CancelledError(RequestError):
    reason: FinishReason = "cancelled"


class EngineUnavailableError(RequestError):
    """The engine is starting, restarting, or died under the request; trying again later is right."""

    reason: FinishReason = "engine_failed"
