"""One generating HTTP request, from its body to the last byte of its answer, whole or as server-sent events."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tidewright.resilience.errors import ModelError
from tidewright.tokenization import Tokenizer
from tidewright_gateway.context import RequestContext
from tidewright_gateway.http.middleware import ClientGoneError, unless_client_leaves
from tidewright_gateway.openai.answers import Answer, event
from tidewright_gateway.openai.errors import JSON, ApiError, invalid, of_model
from tidewright_gateway.openai.offsets import Offsets
from tidewright_gateway.openai.protocol import ChatRequest, CompletionRequest
from tidewright_gateway.openai.rendering import Events, WholeAnswer
from tidewright_gateway.pipeline import Pipeline

KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which clients ignore
_EVENT_STREAM = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # proxies must not buffer
}

G = TypeVar("G", ChatRequest, CompletionRequest)


@dataclass(frozen=True)
class Styles:
    """Settings of all answers."""

    model: str
    tokenizer: Tokenizer
    keep_alive: float
    """Seconds of silence in a stream after which a comment is sent; 0 for never."""


class Exchange(Response):
    """An ASGI response that runs the pipeline while it is sent. It ends when the client disconnects."""

    def __init__(self, pipeline: Pipeline, kind: type[G], body: bytes, styles: Styles, answers: type[Answer]) -> None:
        self._pipeline, self._body, self._styles, self._answers = pipeline, body, styles, answers
        self._kind: type[ChatRequest] | type[CompletionRequest] = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError: nothing has been sent."""
        context = scope["state"]["context"]
        writer = _Writer(send, self._styles.keep_alive)
        try:
            await unless_client_leaves(receive, self._run(context, writer))
        except ClientGoneError:  # for log and metrics
            if not writer.has_begun:
                raise ApiError(499, "client disconnected", code="cancelled") from None

    async def _run(self, context: RequestContext, writer: _Writer) -> None:
        try:
            async with self._pipeline.admit(context, self._kind, self._body) as request:
                with_usage = _wants_usage(request)
                answer = self._answers(
                    context.request_id,
                    self._styles.model,
                    request.num_logprobs(),
                    with_usage,
                    context.echoes,
                    lambda index: Offsets(self._styles.tokenizer, context.generations[index].prompt),
                )
                run = self._stream if request.stream else self._whole
                last = await run(context, answer, writer)
            # Now it is settled: with the end of this answer, a client may send its next request.
            if request.stream:
                await writer.write(last, context)
                await writer.end()
            else:
                await writer.whole(last, {**context.headers, "Content-Type": JSON})
        except (ApiError, ModelError) as error:
            made = of_model(error)
            if not writer.has_begun:
                raise made from None
            context.error = made
            await writer.write(event(made.body))
            await writer.end()
        finally:
            writer.close()

    async def _whole(self, context: RequestContext, answer: Answer, writer: _Writer) -> bytes:
        whole = WholeAnswer(context, answer)
        async with aclosing(self._pipeline.replies(context)) as replies:
            async for index, reply in replies:
                whole.take(index, reply)
        return whole.body()

    async def _stream(self, context: RequestContext, answer: Answer, writer: _Writer) -> bytes:
        """Returns the last events, which are not written yet."""
        events, last = Events(context, answer), b""
        writer.keep_alive()
        async with aclosing(self._pipeline.replies(context)) as replies:
            async for index, reply in replies:
                last = events.take(index, reply)
                if not events.are_all:
                    await writer.write(last, context)
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


def _wants_usage(body: ChatRequest | CompletionRequest) -> bool:
    if body.stream_options and not body.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    return bool(body.stream_options and body.stream_options.include_usage)
