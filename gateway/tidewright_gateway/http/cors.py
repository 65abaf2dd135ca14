"""CORS, with a line in the access log for the preflights that it answers by itself."""

from __future__ import annotations

import secrets
import time

from starlette.middleware.cors import CORSMiddleware
from starlette.types import Message, Receive, Scope, Send

from tidewright_gateway.context import RequestContext
from tidewright_gateway.http import access_log
from tidewright_gateway.tracing.context import Tracer

_NEVER = Tracer(0.0)


class LoggedCors(CORSMiddleware):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = {name for name, _ in scope["headers"]} if scope.get("method") == "OPTIONS" else set()
        if not {b"origin", b"access-control-request-method"} <= names:
            return await super().__call__(scope, receive, send)
        began, status = time.monotonic(), 499

        async def note(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await super().__call__(scope, receive, note)
        finally:
            context = RequestContext(secrets.token_hex(12), _NEVER.begin(()))
            client = access_log.address_of(scope.get("client"))
            access_log.write(context, client, "OPTIONS", scope["path"], "other", status, time.monotonic() - began)
