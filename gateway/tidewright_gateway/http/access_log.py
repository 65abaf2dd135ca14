"""The access log: a line of JSON for each request when it has ended, refused ones too. No key, prompt or answer.

Health checks and scrapes that went well are lines of the level debug: they would outnumber the requests.

Its first fields are those of the other logs (docs/logging.md). Every value is bounded.
"""

from __future__ import annotations

import os
import time
from contextvars import ContextVar
from typing import Any

import msgspec

from tidewright import logs
from tidewright_gateway.context import RequestContext
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.probes import is_probe

WEBSOCKET = "WEBSOCKET"
"""The method of what a WebSocket's message asks for."""
_MAX_METHOD, _MAX_ADDRESS, _MAX_PATH = 16, 64, 256  # characters
_CLIENT_GONE = 499

FIELDS = {
    "client": "Address of the client: the connection's; with `trusted_proxies`, the one in X-Forwarded-For.",
    "method": "Of HTTP; `WEBSOCKET` for a generation, or another message, over /v1/stream.",
    "path": "As sent, without the query.",
    "endpoint": "The route, `other` where there is none.",
    "status": "499: the client left before the answer began. 101: a WebSocket, when it has ended.",
    "seconds": "From the request to its end.",
    "error": "Code of the error that it was answered with, or its stream ended with.",
    "limited_by": "The limit or option that refused it, or ended its answer early.",
    "model": "The model that it asked for.",
    "prompt_tokens": "Of all its prompts.",
    "completion_tokens": "Generated, of all its choices.",
    "queue_seconds": "The longest wait for a place of its generations.",
    "first_token_seconds": "Until the first token.",
    "cache": "What the cache did, of each generation: HIT, SHARED, MISS, BYPASS.",
    "served_by": "decoder, smaller (a variant, by load) or fallback.",
    "replicas": "Addresses of the replicas that were tried, in order.",
    "attempts": "How many tries that were, of all generations.",
}
"""Beside those of every record. A field without a value is left out."""

client_address: ContextVar[str | None] = ContextVar("client_address", default=None)
"""Of the WebSocket that this task belongs to."""

_handler: logs.LogHandler | None = None
_pid = 0
_has_debug = False
_encode = msgspec.json.Encoder().encode


def write_to(target: str, has_debug: bool) -> None:
    """
    Args:
        target: a file, which may be moved away while we run; - for standard output; empty for nowhere.
        has_debug: lines of the level debug are written.

    Raises:
        LogFileError: it can't be written.
    """
    global _handler, _pid, _has_debug
    if _handler:
        _handler.close()
    _pid, _has_debug = os.getpid(), has_debug
    _handler = logs.open_handler("" if target == "-" else target, "access_log", fd=1) if target else None
    if _handler:
        _handler.setFormatter(logs.JsonFormatter("gateway"))  # for what the handler says itself


def address_of(client: tuple[str, int] | None) -> str | None:
    """`client`: of an ASGI scope."""
    return client[0][:_MAX_ADDRESS] if client else None


def write(
    context: RequestContext, client: str | None, method: str, path: str, endpoint: str, status: int, seconds: float
) -> None:
    """When it has ended. `seconds`: since it arrived."""
    is_minor = is_probe(endpoint) and status < 400
    if _handler is None or (is_minor and not _has_debug):
        return
    facts = _facts(client, method, path, endpoint, status, seconds) | context.facts
    if is_minor:
        facts["level"] = "debug"
    _handler.write_line(_encode({name: value for name, value in facts.items() if value is not None}).decode())


def write_refused(
    client: str | None,
    method: str,
    path: str,
    error: ApiError,
    seconds: float = 0.0,
    key_id: str | None = None,
    request_id: str | None = None,
) -> None:
    """Refused before it was a request: what can't be parsed, or a message of a WebSocket."""
    if _handler is None:
        return
    facts = _facts(client, method, path, path if method == WEBSOCKET else "other", error.status, seconds)
    more = {"request_id": request_id, "key_id": key_id, "error": error.code, "limited_by": error.limit or None}
    facts |= {name: value for name, value in more.items() if value is not None}
    _handler.write_line(_encode(facts).decode())


def _facts(client: str | None, method: str, path: str, endpoint: str, status: int, seconds: float) -> dict[str, Any]:
    path, method = logs.bounded(path, _MAX_PATH), method[:_MAX_METHOD]
    return {
        "time": logs.timestamp(time.time()),
        "level": "info",
        "process": "gateway",
        "pid": _pid,
        "event": "request_refused" if status >= 400 and status != _CLIENT_GONE else "request",
        "message": f"{method} {path} {status}".strip(),
        "client": client,
        "method": method,
        "path": path,
        "endpoint": endpoint,
        "status": status,
        "seconds": round(seconds, 4),
    }
