"""Errors, as the clients of each API know them."""

from __future__ import annotations

from typing import Literal

from tidewright_gateway.document.base import Shown


class ErrorDetails(Shown):
    message: str
    """What is wrong, and what to change."""
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    """The field of the request that is wrong."""
    code: str
    """For programs, such as `invalid_value` or `rate_limited`."""


class ErrorBody(Shown):
    error: ErrorDetails


class AnthropicErrorCode(Shown):
    error_code: str
    """As `code` of OpenAI's API."""


class AnthropicErrorDetails(Shown):
    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "timeout_error",
        "request_too_large",
        "rate_limit_error",
        "overloaded_error",
        "api_error",
    ]
    message: str
    """What is wrong, and what to change."""
    details: AnthropicErrorCode


class AnthropicError(Shown):
    """An error of Anthropic's API; also the data of an event."""

    type: Literal["error"]
    error: AnthropicErrorDetails
    request_id: str
