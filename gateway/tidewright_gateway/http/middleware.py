"""Around every request: request id, trace, cheap checks, access log, metrics, error responses.

The checks look only at the headers and the length of the body. All error responses are written here.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tidewright import logs
from tidewright_gateway.auth import credential_of
from tidewright_gateway.cache.responses import CachePolicy
from tidewright_gateway.context import RequestContext
from tidewright_gateway.http import access_log
from tidewright_gateway.http.hosts import Hosts
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.openai.errors import JSON, ApiError, internal, invalid
from tidewright_gateway.tracing.context import Tracer
from tidewright_gateway.tracing.traces import Traces

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_OF_ANTHROPIC = "/v1/messages"
_SLASHES = re.compile(r"/{2,}")
_LONGEST_LENGTH = 18  # digits of a body's length
T = TypeVar("T")


REFUSAL = "tidewright_refusal"
"""In the scope of a request: the ApiError that its connection has answered with."""


class ClientGoneError(Exception):
    """The client disconnected."""


class Middleware:
    """Pure ASGI: FastAPI's own middleware costs more than the rest of a request."""

    def __init__(
        self,
        app: ASGIApp,
        hosts: Hosts,
        tracer: Tracer,
        traces: Traces,
        metrics: Metrics,
        max_body: int,
        post_paths: frozenset[str],
        paths: frozenset[str],
    ) -> None:
        """
        Args:
            max_body: of a request, in bytes.
            paths: those of routes without parameters: what is refused before it is routed counts as theirs.
            post_paths: only there is the body of a request checked: elsewhere the answer is 404 or 405, whatever it is.
        """
        self._app, self._hosts, self._tracer, self._metrics = app, hosts, tracer, metrics
        self._max_body, self._post_paths, self._paths, self._traces = max_body, post_paths, paths, traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await self._watch_socket(scope, receive, send)
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        control = headers.get(b"cache-control")
        context = RequestContext(
            _request_id(given),
            self._tracer.begin(scope["headers"]),
            credential_of(headers),
            CachePolicy.of(control.decode("latin-1")) if control else CachePolicy.USE,
        )
        method, path = scope["method"], scope["path"]
        context.record = self._traces.record(path)
        context.is_anthropic = path.startswith(_OF_ANTHROPIC) or b"anthropic-version" in headers
        # A copy: uvicorn must not see that a HEAD is changed to a GET, or it waits for the body.
        given_scope, scope = scope, {**scope, "state": {**scope.get("state", {}), "context": context}}
        exchange = _Exchange(scope, headers, receive, send, context, self._max_body, self._post_paths)
        self._metrics.began()
        try:
            with logs.about_request(context):
                await exchange.run(self._app, self._hosts)
        finally:
            if cut_by := given_scope.get(REFUSAL):  # the connection has answered
                context.error, exchange.status = cut_by, cut_by.status
            seconds = time.monotonic() - context.arrived_at
            # Paths without a route share one series, or a scanner could create any number of them.
            route = getattr(scope.get("route"), "path", scope["path"] if scope["path"] in self._paths else "other")
            self._metrics.ended(route, exchange.status, seconds, *context.end)
            self._traces.ended(context, method, route, exchange.status, seconds)
            client = access_log.address_of(scope.get("client"))
            access_log.write(context, client, method, path, route, exchange.status, seconds)

    async def _watch_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A line for the handshake: when it is refused, or with status 101 when the connection has ended."""
        client = access_log.address_of(scope.get("client"))
        context = RequestContext(secrets.token_hex(12), self._tracer.begin(scope["headers"]))
        status = 403  # uvicorn's answer if nobody takes it
        scope = {**scope, "state": {**scope.get("state", {}), "context": context}}

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "websocket.accept":
                status = 101
            elif message["type"] == "websocket.http.response.start":
                status = message["status"]
            await send(message)

        token = access_log.client_address.set(client)
        try:
            await self._app(scope, receive, note)
        finally:
            access_log.client_address.reset(token)
            seconds = time.monotonic() - context.arrived_at
            route = getattr(scope.get("route"), "path", "other")
            access_log.write(context, client, "GET", scope["path"], route, status, seconds)


def _request_id(given: bytes) -> str:
    """The caller's own, if it is one and no API key: it is logged."""
    text = given.decode("latin-1")
    if _REQUEST_ID.fullmatch(given) and logs.bounded(text, len(text)) == text:
        return text
    return secrets.token_hex(12)


class _Exchange:
    def __init__(
        self,
        scope: Scope,
        headers: dict[bytes, bytes],
        receive: Receive,
        send: Send,
        context: RequestContext,
        max_body: int,
        post_paths: frozenset[str],
    ) -> None:
        self._scope, self._headers, self._receive, self._send = scope, headers, receive, send
        self._context, self._max_body, self._post_paths = context, max_body, post_paths
        self._received = 0  # bytes of the body
        self._head = b""  # its first two bytes tell the encoding, since JSON begins with ASCII
        self._has_begun = self._has_ended = False
        self._is_head = scope["method"] == "HEAD"
        self.status = 499  # if no answer begins, the client is gone

    async def run(self, app: ASGIApp, hosts: Hosts) -> None:
        scope = self._scope
        try:
            if not scope["path"].startswith("/health"):  # probes use addresses; there is nothing to steal
                hosts.check(scope["headers"])
            if self._is_head:
                scope["method"] = "GET"
            if "//" in scope["path"] or scope["path"].endswith("/"):
                scope["path"] = _SLASHES.sub("/", scope["path"]).rstrip("/") or "/"
            if scope["method"] == "POST" and scope["path"] in self._post_paths:
                self._check_body()
            await app(scope, self.receive, self.send)
        except ApiError as error:
            await self._refuse(error)
        except ClientGoneError:
            pass
        except Exception:
            log.exception("a request went wrong")
            if not self._has_ended:  # else FastAPI has answered
                await self._refuse(internal())

    def _check_body(self) -> None:
        encoding = self._headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding not in (b"", b"identity"):
            message = "Content-Encoding is not supported; send the body unencoded"
            raise ApiError(415, message, code="unsupported_encoding")
        kind = self._headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != JSON.encode():
            raise ApiError(
                415, "send the body as JSON, with the header Content-Type: application/json", code="not_json"
            )
        length = self._headers.get(b"content-length", b"").lstrip(b"0")  # of which there may be thousands
        if length.isdigit() and (len(length) > _LONGEST_LENGTH or int(length) > self._max_body):
            raise self._too_large()

    def _too_large(self) -> ApiError:
        headers = {"Connection": "close"}  # the rest of the body is not read
        message = f"the body is longer than {self._max_body} bytes (max_body)"
        return ApiError(413, message, code="body_too_large", headers=headers, limit="max_body")

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            body = message.get("body", b"")
            self._received += len(body)
            self._head = (self._head + body[:2])[:2]
            if self._received > self._max_body:
                raise self._too_large()
            if self._head[:1] >= b"\x80" or b"\0" in self._head:
                raise invalid("the body must be UTF-8, without a byte order mark", code="invalid_json")
        return message

    async def send(self, message: Message) -> None:
        """Replaces responses of FastAPI's error handlers, which leave the error in the state."""
        refusal = self._scope["state"].get("refusal")
        if refusal is None:
            await self._emit(message)
        elif message["type"] == "http.response.start":
            await self._refuse(refusal)

    async def _emit(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_begun, self.status = True, message["status"]
            request_id = self._context.request_id.encode()
            trace_id = self._context.trace.trace_id.encode()
            own = ((b"x-request-id", request_id), (b"x-trace-id", trace_id))
            message["headers"] = [*message.get("headers", []), *own]
            if self._context.is_anthropic:
                message["headers"].append((b"request-id", request_id))
        elif self._is_head:
            message = {**message, "body": b""}
        await self._send(message)
        self._has_ended = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def _refuse(self, error: ApiError) -> None:
        self._context.error = error
        if self._has_begun:  # too late: the connection is cut, so that half an answer does not look whole
            raise error
        body = error.anthropic_body(self._context.request_id) if self._context.is_anthropic else error.body
        headers = {**error.headers, "Content-Length": str(len(body))}
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self._emit({"type": "http.response.start", "status": error.status, "headers": encoded})
        await self._emit({"type": "http.response.body", "body": body})


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects.

    Raises:
        ClientGoneError: the client disconnected.
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
