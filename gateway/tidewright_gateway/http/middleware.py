"""What every request goes through, around FastAPI: an id, limits on its body, the access log, metrics, last resorts."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tidewright_gateway.auth import Authenticator, require_admin
from tidewright_gateway.http import access_log
from tidewright_gateway.http.tracing import Tracer
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.openai.errors import JSON, ApiError, internal, invalid

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
T = TypeVar("T")
# Whoever else adds a path need not think of keys: they are asked for.
_FOR_ALL = frozenset(("/", "/docs", "/openapi.json", "/health/live", "/health/ready"))
_FOR_ALL_BELOW = "/page/"
_FOR_ADMINS = ("/metrics", "/admin/")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Middleware:
    """Pure ASGI: FastAPI's own middleware costs more than the rest of a request."""

    def __init__(
        self, app: ASGIApp, authenticator: Authenticator, tracer: Tracer, metrics: Metrics, max_body: int
    ) -> None:
        """`max_body`: of a request, in bytes."""
        self._app, self._authenticator, self._tracer, self._metrics = app, authenticator, tracer, metrics
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        exchange = _Exchange(scope, receive, send, self._authenticator, self._max_body)
        scope["state"]["trace"] = self._tracer.begin(scope["headers"])
        self._metrics.began()
        try:
            await exchange.run(self._app)
        finally:
            seconds = time.monotonic() - scope["state"]["arrived_at"]
            # Whatever has no route is one series, or a scanner could make any number of them.
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self._metrics.ended(path, exchange.status, seconds)
            if access_log.is_on():
                access_log.write(exchange.line(seconds))


class _Exchange:
    def __init__(self, scope: Scope, receive: Receive, send: Send, authenticator: Authenticator, max_body: int) -> None:
        self._scope, self._receive, self._send, self._max_body = scope, receive, send, max_body
        self._authenticator = authenticator
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self._headers.get(b"x-request-id", b"")
        self._id = given.decode() if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        self._received, self._head = 0, b""  # bytes of the body; JSON begins with ASCII, and so says its encoding
        self._refusal: ApiError | None = None
        self._has_begun = self._has_ended = False
        self.status = 499  # if no answer begins, nobody was there to take one
        scope["state"] = {**scope.get("state", {}), "request_id": self._id, "arrived_at": time.monotonic()}

    async def run(self, app: ASGIApp) -> None:
        try:
            await self._authenticate(self._scope["path"])
            self._check()
            await app(self._scope, self.receive, self.send)
        except ApiError as error:
            await self._refuse(error)
        except ClientGoneError:
            pass
        except Exception:
            log.exception("request %s went wrong", self._id)
            if self._has_ended:  # with what FastAPI made of it
                return
            await self._refuse(internal())

    async def _authenticate(self, path: str) -> None:
        if path in _FOR_ALL or path.startswith(_FOR_ALL_BELOW):
            return
        given = self._headers.get(b"authorization")
        caller = await self._authenticator.caller(given.decode("latin-1") if given else None)
        if path.startswith(_FOR_ADMINS):
            require_admin(caller)
        self._scope["state"]["caller"] = caller

    def line(self, seconds: float) -> dict[str, Any]:
        """Of the access log."""
        return {
            "request_id": self._id,
            "trace_id": self._scope["state"]["trace"].trace_id,
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": self.status,
            "seconds": round(seconds, 4),
            **(work.facts if (work := self._scope["state"].get("work")) else {}),
        }

    def _check(self) -> None:
        if self._scope["method"] != "POST":
            return
        kind = self._headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != JSON.encode():
            raise ApiError(
                415, "send the body as JSON, with the header Content-Type: application/json", code="not_json"
            )
        length = self._headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_body:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self._max_body} bytes (max_body)", code="body_too_large")

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            body = message.get("body", b"")
            self._received += len(body)
            self._head = (self._head + body[:2])[:2]
            if self._received > self._max_body:
                self._refusal = self._too_large()
            elif self._head[:1] >= b"\x80" or b"\0" in self._head:
                self._refusal = invalid("the body must be UTF-8, without a byte order mark", code="invalid_json")
            if self._refusal:  # FastAPI makes a 400 of it, which `send` replaces
                raise self._refusal
        return message

    async def send(self, message: Message) -> None:
        if self._refusal:  # instead of what FastAPI made of it
            if message["type"] == "http.response.start":
                await self._refuse(self._refusal)
            return
        await self._emit(message)

    async def _emit(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_begun, self.status = True, message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self._id.encode())]
        await self._send(message)
        self._has_ended = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def _refuse(self, error: ApiError) -> None:
        if self._has_begun:  # it is too late to say so, and half an answer must not look whole
            raise error
        headers = {"content-type": JSON, "content-length": str(len(error.body)), **error.headers}
        if error.status == 413:
            headers["connection"] = "close"  # the rest of the body is not read
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self._emit({"type": "http.response.start", "status": error.status, "headers": encoded})
        await self._emit({"type": "http.response.body", "body": error.body})


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up.

    Raises:
        ClientGoneError: it did.
    """
    job, left = asyncio.ensure_future(work), asyncio.ensure_future(_client_leaves(receive))
    try:
        await asyncio.wait((job, left), return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientGoneError
        return job.result()
    finally:
        left.cancel()
        if not job.done():
            job.cancel()
            await asyncio.wait((job,))


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
