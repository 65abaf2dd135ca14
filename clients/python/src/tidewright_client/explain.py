"""What failures mean: exceptions of a connection and answers that are errors, as errors that say what to change."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Container, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from tidewright_client.answers import Answer
from tidewright_client.deadline import Deadline
from tidewright_client.errors import (
    ConnectionFailed,
    Forbidden,
    InvalidRequest,
    NotFound,
    RateLimited,
    TidewrightError,
    TimedOut,
    Unauthenticated,
    Unavailable,
    UnexpectedAnswer,
)
from tidewright_client.retries import seconds_of
from tidewright_client.settings import CONNECT_TIMEOUT, Settings

WHICH_PORT = "give the gateway's port (8080 by default), not one of Triton's (8000 to 8002)"
_BREAKS = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)
_SHOWN = 200  # characters of a body that is no answer
_OF_STATUS: dict[int, type[TidewrightError]] = {
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    408: TimedOut,
    421: Forbidden,
    429: RateLimited,
}
_OF_TYPE: dict[str, type[TidewrightError]] = {
    "authentication_error": Unauthenticated,
    "invalid_request_error": InvalidRequest,
    "rate_limit_error": RateLimited,
}


def type_of(status: int) -> type[TidewrightError]:
    return _OF_STATUS.get(status, Unavailable if status >= 500 else InvalidRequest)


def refusal(
    settings: Settings, status: int, headers: Mapping[str, str], body: bytes, own: Container[str] = ()
) -> TidewrightError:
    """Of an answer with a status of 300 or more. `own`: fields of the request that its caller did not name."""
    request_id = headers.get("x-request-id")
    if status < 400:
        target = urlsplit(headers.get("location", "")).netloc or "another path"
        return UnexpectedAnswer(
            f"{settings.url} redirects to {target}, and redirects are not followed; give the gateway's own address; "
            f"{WHICH_PORT}",
            status=status,
            request_id=request_id,
        )
    retry_after = seconds_of(headers.get("retry-after"), time.time())
    error = error_in(_json(body))
    if error is None:
        message = _of_another_server(settings, status, headers, body)
        message += _advice(settings, status, None, message, retry_after)
        return type_of(status)(
            settings.without_key(message), status=status, request_id=request_id, retry_after=retry_after
        )
    return of_error(settings, error, status, request_id, retry_after, own)


def of_error(
    settings: Settings,
    error: dict[str, Any],
    status: int,
    request_id: str | None,
    retry_after: float | None,
    own: Container[str] = (),
) -> TidewrightError:
    """Of the API's error, as `error_in` gives it."""
    message, code, param = str(error["message"]), _text(error.get("code")), _text(error.get("param"))
    said = settings.without_key(message)
    message += _advice(settings, status, code, message, retry_after)
    if param in own:
        message += (
            "; the client sends this field itself: a server that does not know it is no Tidewright gateway, or one of "
            f"another version ({settings.url}/version tells)"
        )
    return type_of(status)(
        settings.without_key(message),
        status=status,
        code=code,
        param=param,
        request_id=request_id,
        retry_after=retry_after,
        said=said,
    )


def error_in(told: Any) -> dict[str, Any] | None:
    """The API's error; None if this is none."""
    error = told.get("error") if isinstance(told, dict) else None
    return error if isinstance(error, dict) and isinstance(error.get("message"), str) else None


def of_event(settings: Settings, error: dict[str, Any], request_id: str | None) -> TidewrightError:
    """Of an error in a stream."""
    code = _text(error.get("code"))
    made = TimedOut if code == "timeout" else _OF_TYPE.get(str(error.get("type")), Unavailable)
    message = settings.without_key(error["message"])
    return made(message, code=code, param=_text(error.get("param")), request_id=request_id, said=message)


def unexpected(
    settings: Settings, what: str, status: int | None = None, request_id: str | None = None
) -> UnexpectedAnswer:
    """`what`: goes on behind the address, such as "answered ..."."""
    advice = f"is it a Tidewright gateway, and of this client's version? {settings.url}/version tells; {WHICH_PORT}"
    message = settings.without_key(f"{settings.url} {what}: {advice}")
    return UnexpectedAnswer(message, status=status, request_id=request_id)


def too_long(settings: Settings, most: int) -> UnexpectedAnswer:
    return UnexpectedAnswer(
        f"{settings.url} answered more than {most} bytes; ask for fewer tokens, or allow more: max_answer_bytes"
    )


def timed_out(settings: Settings, deadline: Deadline, partial: Answer | None = None) -> TimedOut:
    message = f"{settings.url} did not answer within the request's timeout of {deadline.timeout or 0:g} s"
    return TimedOut(message, partial=partial)


def no_connection(settings: Settings, error: Exception) -> ConnectionFailed:
    """Of an exception before the answer."""
    url, text = settings.url, str(error) or type(error).__name__
    for cause in causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            why = cause.verify_message or str(cause)
            return ConnectionFailed(
                f"can't trust the certificate of {url}: {why}; if a CA of your own signed it, name its PEM file in "
                "SSL_CERT_FILE or give tls=ssl.create_default_context(cafile=...)"
            )
        if isinstance(cause, ssl.SSLError):
            return ConnectionFailed(
                f"no TLS with {url}: {text}; if it does not speak TLS, write http:// before its address"
            )
        if isinstance(cause, socket.gaierror):
            return ConnectionFailed(f"can't resolve the host of {url}: {cause.strerror}; check its name")
    if isinstance(error, httpx.ConnectTimeout | TimeoutError):
        return ConnectionFailed(
            f"{url} took no connection within {CONNECT_TIMEOUT:g} s; check host, port and firewalls"
        )
    # An OSError as it is comes from a WebSocket; one that broke is no OSError of connecting.
    if isinstance(error, httpx.ConnectError) or (isinstance(error, OSError) and not isinstance(error, _BREAKS)):
        return ConnectionFailed(
            f"no server at {url} ({text}); check host and port, or start one with `tidewright serve`"
        )
    if isinstance(error, httpx.RemoteProtocolError) and "illegal" in text:  # h11's, of bytes that are not HTTP/1.1
        return no_http(settings, text)
    return _broke(settings, text, "see the server's log")


def no_http(settings: Settings, text: str) -> ConnectionFailed:
    return _broke(
        settings, text, f"no answer of HTTP/1.1 came: see its log, or if it is Triton's gRPC port, {WHICH_PORT}"
    )


def _broke(settings: Settings, text: str, hint: str) -> ConnectionFailed:
    if settings.url.startswith("http:"):
        hint += "; if it speaks TLS, write https:// before its address"
    return ConnectionFailed(f"the connection to {settings.url} broke before an answer: {text}; {hint}")


def is_hopeless(error: Exception) -> bool:
    """A second attempt can't go better."""
    return any(isinstance(cause, ssl.SSLError) for cause in causes(error))


def _of_another_server(settings: Settings, status: int, headers: Mapping[str, str], body: bytes) -> str:
    kind = headers.get("content-type", "no content type").partition(";")[0]
    shown = " ".join(body[:_SHOWN].decode(errors="replace").split())
    said = f" ({kind}: {shown})" if shown else ""
    advice = f"; {WHICH_PORT}" if status in (400, 404, 405) else ""
    if urlsplit(settings.url).path:
        advice += "; give the gateway's URL without a path"
    return f"{settings.url} answered with status {status}, and not as a gateway does{said}{advice}"


def _advice(settings: Settings, status: int, code: str | None, message: str, retry_after: float | None) -> str:
    if status == 401:
        if settings.key is None:
            return "; give a key as key= or in TIDEWRIGHT_KEY"
        return "; the key that was sent is unknown, expired or revoked: give another as key= or in TIDEWRIGHT_KEY"
    if code == "no_such_path":
        return "; give the gateway's URL without a path, and check its version"
    if retry_after is not None and "try again" not in message:
        return f"; try again in {retry_after:g} s"
    return ""


def causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
