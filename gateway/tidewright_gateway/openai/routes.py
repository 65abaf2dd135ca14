"""The OpenAI-compatible endpoints."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tidewright_gateway.cache.responses import CachePolicy
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.http.middleware import ClientGoneError, unless_client_leaves
from tidewright_gateway.openai.answers import ChatAnswer, CompletionAnswer
from tidewright_gateway.openai.errors import JSON, ApiError, invalid
from tidewright_gateway.openai.prompts import Prompts
from tidewright_gateway.openai.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from tidewright_gateway.openai.rendering import stream, whole
from tidewright_gateway.pipeline import Pipeline
from tidewright_gateway.replicas.failover import Failover

_EVENT_STREAM = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # a proxy must not wait for more
}


class EventStream(Response):
    """Server-sent events, the first of which is there already. A client that leaves ends them."""

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers=_EVENT_STREAM)
        del self.headers["content-length"]
        self._first, self._events = first, events

    @classmethod
    async def begun(cls, receive: Receive, events: AsyncGenerator[bytes, None]) -> EventStream:
        """Once the first event is there: until then an error can still have a status of its own."""
        try:
            return cls(await unless_client_leaves(receive, anext(events)), events)
        except BaseException:
            await events.aclose()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events):
            await unless_client_leaves(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def make_router(settings: GatewaySettings, cluster: Failover, prompts: Prompts, service: Pipeline) -> APIRouter:
    router = APIRouter()

    async def respond(
        request: Request, body: ChatRequest | CompletionRequest, kind: type[ChatAnswer] | type[CompletionAnswer]
    ) -> Response:
        state = request.scope["state"]
        with_usage = wants_usage(body)
        policy = CachePolicy.of(request.headers.get("cache-control"))
        work = await service.open(
            body, state["caller"], state["request_id"], state["arrived_at"], state["trace"], policy
        )
        state["work"] = work
        answer = kind(work.request_id, settings.model_name, body.num_logprobs(), with_usage, work.echoes)
        try:
            if body.stream:
                events = await EventStream.begun(request.receive, stream(service, work, answer))
                events.headers.update(work.headers)
                return events
            content = await unless_client_leaves(request.receive, whole(service, work, answer))
            return Response(content, headers=work.headers, media_type=JSON)
        except BaseException as error:
            await service.close(work, 0)  # in case that it had not begun
            if isinstance(error, ClientGoneError):  # nobody reads it, but the log and the metrics do
                raise ApiError(499, "the client has left", code="cancelled") from None
            raise

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """The model's answer to a chat, whole or as server-sent events."""
        return await respond(request, body, ChatAnswer)

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """What the model writes behind a prompt, or behind each of several; a prompt is text or token ids."""
        return await respond(request, body, CompletionAnswer)

    @router.post("/v1/embeddings")
    async def embeddings() -> Response:
        """Refused: the models here generate text."""
        raise ApiError(404, "this server generates text; it has no embeddings", code="unsupported")

    def described() -> dict[str, Any]:
        return {
            "id": settings.model_name,
            "object": "model",
            "created": 0,
            "owned_by": "tidewright",
            "max_model_len": cluster.max_model_len,
        }

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served here."""
        return {"object": "list", "data": [described()]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return described()

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Token ids of a prompt, or of a chat in the model's template."""
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("send either prompt or messages", "prompt")
        if body.messages is not None:
            tokens = await prompts.of_chat(body.messages)
        else:
            tokens = await prompts.of_text(body.prompt or "")
        return {"tokens": tokens, "count": len(tokens), "max_model_len": cluster.max_model_len}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids."""
        service.check_model(body.model)
        return {"prompt": prompts.tokenizer.decode(await prompts.of_text(body.tokens), skip_special_tokens=False)}

    return router


def wants_usage(body: ChatRequest | CompletionRequest) -> bool:
    if body.stream_options and not body.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    return bool(body.stream_options and body.stream_options.include_usage)
