"""One generating HTTP request, from its body to the last byte of its answer, whole or as server-sent events."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tidewright.resilience.errors import ModelError
from tidewright_gateway.context import RequestContext
from tidewright_gateway.http.middleware import ClientGoneError, unless_client_leaves
from tidewright_gateway.openai.answers import Answer
from tidewright_gateway.openai.api import Api
from tidewright_gateway.openai.errors import JSON, ApiError
from tidewright_gateway.openai.rendering import Events, WholeAnswer
from tidewright_gateway.pipeline import Pipeline

KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which clients ignore
_EVENT_STREAM = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # proxies must not buffer
}


class Exchange(Response):
    """An ASGI response that runs the pipeline while it is sent. It ends when the client disconnects."""

    def __init__(self, pipeline: Pipeline, api: Api[Any, Any], body: bytes, keep_alive: float) -> None:
        """`keep_alive`: seconds of silence in a stream after which a comment is sent; 0 for never."""
        self._pipeline, self._api, self._body, self._keep_alive = pipeline, api, body, keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError: nothing has been sent."""
        context = scope["state"]["context"]
        writer = _Writer(send, self._keep_alive)
        try:
            await unless_client_leaves(receive, self._run(context, writer))
        except ClientGoneError:  # for log and metrics
            if not writer.has_begun:
                raise ApiError(499, "client disconnected", code="cancelled") from None

    async def _run(self, context: RequestContext, writer: _Writer) -> None:
        answer: Answer | None = None
        try:
            async with self._pipeline.admit(context, self._api.kind, self._body, self._api.translate) as request:
                answer = self._api.answer(context, request)
                run = self._stream if request.stream else self._whole
                last = await run(context, answer, writer)
            await answer.settle()
            # Now it is settled: with the end of this answer, a client may send its next request.
            if request.stream:
                await writer.write(last, context)
                await writer.end()
            else:
                await writer.whole(last, {**context.headers, "Content-Type": JSON})
        except (ApiError, ModelError) as error:
            made = self._api.as_sent(context.wording.told(error))
            if not writer.has_begun or answer is None:
                raise made from None
            context.error = made
            last = answer.failure(made)
            await answer.settle()
            await writer.write(last)
            await writer.end()
        finally:
            writer.close()

    async def _whole(self, context: RequestContext, answer: Answer, writer: _Writer) -> bytes:
        whole = WholeAnswer(answer, len(context.generations))
        async with aclosing(self._pipeline.execution.replies(context)) as replies:
            async for index, reply in replies:
                whole.take(index, reply)
        return whole.body()

    async def _stream(self, context: RequestContext, answer: Answer, writer: _Writer) -> bytes:
        """Returns the last events, which are not written yet."""
        events, last = Events(answer, len(context.generations)), b""
        writer.keep_alive()
        self._pipeline.metrics.stream("sse", 1)
        try:
            async with aclosing(self._pipeline.execution.replies(context)) as replies:
                async for index, reply in replies:
                    last = events.take(index, reply)
                    if last and not events.are_all:
                        await writer.write(last, context)
        finally:
            self._pipeline.metrics.stream("sse", -1)
        return last


class _Writer:
    """Starts the response with the first event, so that earlier errors get their own status."""

    def __init__(self, send: Send, interval: float) -> None:
        self._send, self._interval = send, interval
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None
        self._written_at = self._loop.time()
        self.has_begun = False

    def keep_alive(self) -> None:
        """Sends comments during silence from now on: proxies cut idle connections."""
        if self._interval:
            self._timer = self._loop.call_later(self._interval, self._look)

    def _look(self) -> None:
        due = self._written_at + self._interval
        if self._loop.time() >= due:
            if self._comment is None or self._comment.done():  # else the client takes nothing, and one waits
                self._comment = self._loop.create_task(self.write(KEEP_ALIVE))
            due = self._loop.time() + self._interval
        self._timer = self._loop.call_at(due, self._look)

    async def write(self, data: bytes, context: RequestContext | None = None) -> None:
        self._written_at = self._loop.time()
        if not self.has_begun:
            await self._begin({**_EVENT_STREAM, **(context.headers if context else {})})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def whole(self, body: bytes, headers: dict[str, str]) -> None:
        await self._begin({**headers, "Content-Length": str(len(body))})
        await self._send({"type": "http.response.body", "body": body})

    async def end(self) -> None:
        self.close()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self, headers: dict[str, str]) -> None:
        self.has_begun = True
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": encoded})

    def close(self) -> None:
        """Stops the comments."""
        if self._timer:
            self._timer.cancel()
        if self._comment:
            self._comment.cancel()
