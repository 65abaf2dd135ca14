"""From what Triton and gRPC say of a failure to this package's errors."""

from __future__ import annotations

import re
from typing import Any

import grpc

from tidewright_client.errors import (
    ConnectionFailed,
    Forbidden,
    Interrupted,
    InvalidRequest,
    NotFound,
    TidewrightError,
    TimedOut,
    Unauthenticated,
    Unavailable,
    UnexpectedAnswer,
)

# How the message of an error ends if it is one of Tidewright's: Triton has one code for several reasons.
_BY_WORD: dict[str, type[TidewrightError]] = {
    "invalid": InvalidRequest,
    "overloaded": Unavailable,
    "timeout": TimedOut,
    "engine_failed": Unavailable,
    "cancelled": Interrupted,
}
_WORD = re.compile(r"(.*) \[([a-z_]+)\]", re.DOTALL)
# Triton's own messages.
_NO_MODEL = re.compile(r"unknown model|model .* is not found", re.IGNORECASE)
_OTHER_INPUTS = re.compile(
    r"unexpected inference input|expected (\d+|number of) inputs|unexpected (shape|datatype)", re.IGNORECASE
)
# gRPC's own, of its resolvers and of a connection that ends before its first frame.
_NO_HOST = ("name resolution", "dns", "lookup failed", "errors resolving")
_NOT_GRPC = ("socket closed", "connection reset", "end of tcp stream", "settings")
_TASK = "runs with --task embed and generates no text"

_BY_CODE: dict[grpc.StatusCode, type[TidewrightError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: Forbidden,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimedOut,
    grpc.StatusCode.UNIMPLEMENTED: UnexpectedAnswer,
    grpc.StatusCode.RESOURCE_EXHAUSTED: UnexpectedAnswer,
}
RETRIED = (ConnectionFailed, Unavailable)


def error_of(message: str, request_id: str | None = None) -> TidewrightError:
    """Of a request, by the message of Triton's error."""
    if (match := _WORD.fullmatch(message)) and (kind := _BY_WORD.get(match[2])):
        text, code = match[1], match[2]
        if _TASK in text:
            text += "; ask embed() of this server, or another server"
        return kind(text, code=code, request_id=request_id)
    if _NO_MODEL.search(message):
        return NotFound(f"{message}; is it a Tidewright server, and is the model loaded?", request_id=request_id)
    if _OTHER_INPUTS.search(message):
        return InvalidRequest(
            f"{message}; the server is older than this client, or not Tidewright's", request_id=request_id
        )
    return Unavailable(message, request_id=request_id)


def broken_line(address: str, code: grpc.StatusCode | None, details: str) -> TidewrightError:
    """The connection, or a stream on it, failed."""
    kind = _BY_CODE.get(code or grpc.StatusCode.UNKNOWN, ConnectionFailed)
    return kind(f"{_hint(address, details)} ({details or code})")


def _hint(address: str, details: str) -> str:
    said = details.lower()
    if "http1" in said or "http/1" in said or "missing expected content-type" in said:
        return f"{address} does not speak gRPC: use Triton's gRPC port (8001 by default), not HTTP's"
    if "ssl" in said or "tls" in said or "handshake" in said or "certificate" in said:
        return f"no TLS connection to {address}: check its certificate and the credentials given"
    if any(word in said for word in _NO_HOST):
        return f"can't resolve the host of {address}: check the host's name"
    if "failed to connect" in said and any(word in said for word in _NOT_GRPC):
        return (
            f"something listens at {address} that does not speak gRPC, or it went away: use Triton's gRPC port "
            "(8001 by default), not HTTP's"
        )
    if "failed to connect" in said or "refused" in said:
        return f"can't reach Triton's gRPC port at {address}: check host and port (8001 by default), and that it runs"
    return f"the connection to {address} failed; see the server's log"


def of_rpc(address: str, error: Any) -> TidewrightError:
    """Of a grpc.RpcError of a call that was one request."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimedOut("the tokenizer did not answer within the timeout")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN):
        if _WORD.fullmatch(details) or "Stub process" in details or _NO_MODEL.search(details):
            return error_of(details)
        return broken_line(address, code, details)
    if code in _BY_CODE and not _WORD.fullmatch(details) and not _NO_MODEL.search(details):
        return _BY_CODE[code](details or str(code))
    return error_of(details)
