"""Errors of the APIs: one place that says which status each has, and how it looks to the clients of each."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome

JSON = "application/json"
MAX_SHOWN = 64  # characters of a caller's value in a message
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_RETRIED = (408, 409, 429, *range(500, 600))  # by the clients of both, unless they are told


class ApiError(Exception):
    """Ends a request; the message says what the caller can change."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
        may_retry: bool = True,
        limit: str = "",
    ) -> None:
        """
        Args:
            may_retry: the same request may go better a second time.
            limit: the limit that refuses the request, as the metrics and the access log name it.
        """
        super().__init__(message)
        self.limit = limit
        self.may_retry = may_retry
        self.status, self.code, self.param = status, code, param
        self.retry_after = retry_after  # seconds
        self._headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's word for the kind."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    @property
    def body(self) -> bytes:
        error = {"message": str(self), "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def anthropic_body(self, request_id: str) -> bytes:
        """The error as Anthropic's API has it; also the data of an `error` event."""
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        error = {"type": kind, "message": str(self), "details": {"error_code": self.code}}
        return msgspec.json.encode({"type": "error", "error": error, "request_id": request_id})

    @property
    def headers(self) -> dict[str, str]:
        found = {"Content-Type": JSON, **self._headers}
        if not self.may_retry and self.status in _RETRIED:
            found["X-Should-Retry"] = "false"
        if self.retry_after is not None:
            found["Retry-After"] = str(max(math.ceil(self.retry_after), 1))
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found


def internal() -> ApiError:
    """A fault of ours; whoever makes it logs what it was."""
    return ApiError(500, "internal error; see the gateway's log", code="internal_error")


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)


def of_model(error: ModelError | ApiError) -> ApiError:
    """What the end of a generation without an answer is to its caller; an ApiError is that already."""
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if error.outcome is Outcome.INVALID:
        return invalid(message)
    if error.outcome is Outcome.REQUEST_TIMEOUT:
        return ApiError(408, message, code="timeout", may_retry=False)
    if error.outcome is Outcome.OVERLOADED:
        return ApiError(503, message, code="overloaded", retry_after=error.expected_wait or 1, limit=error.limit)
    if error.outcome is Outcome.CANCELLED:
        return ApiError(499, message, code="cancelled")
    if error.outcome is Outcome.ENGINE_KILLED:
        return ApiError(503, message, code="engine_failed", may_retry=False)
    code = "unavailable" if error.outcome is Outcome.UNAVAILABLE else "engine_failed"
    return ApiError(503, message, code=code, retry_after=1)
