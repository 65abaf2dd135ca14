"""The OpenAI-compatible endpoints."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tidewright.schema import SamplingParams
from tidewright_gateway.answers import Answer, ChatAnswer, CompletionAnswer
from tidewright_gateway.cluster import Cluster
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.edge import ClientGoneError, unless_client_leaves
from tidewright_gateway.errors import JSON, ApiError, invalid
from tidewright_gateway.generation import Generator, Prompts, Work, make_work
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy must not wait for more
]
_DEFAULT_COMPLETION = 16  # tokens, as OpenAI's


class EventStream(Response):
    """Server-sent events, the first of which is there already. A client that leaves ends them."""

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__()
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
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
        async with aclosing(self._events):
            await unless_client_leaves(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def make_router(settings: GatewaySettings, cluster: Cluster, prompts: Prompts, metrics: Metrics) -> APIRouter:
    router, generator = APIRouter(), Generator(cluster, metrics)

    def check_model(name: str | None) -> None:
        if name is not None and name != settings.model_name:
            message = f"there is no model {name!r} here; this gateway serves {settings.model_name!r}"
            raise ApiError(404, message, code="model_not_found", param="model")

    def check_size(num_prompts: int, n: int) -> None:
        if n < 1:
            raise invalid("n must be at least 1", "n")
        if num_prompts * n > settings.max_choices:
            raise invalid(f"{num_prompts} prompts times n = {n} is more than {settings.max_choices} (max_choices)", "n")

    def work_of(request: Request, token_ids: list[list[int]], sampling: SamplingParams, n: int) -> Work:
        state = request.scope["state"]
        return make_work(
            state["request_id"],
            token_ids,
            sampling,
            n,
            max_model_len=cluster.max_model_len,
            longest=settings.request_timeout,
            arrived_at=state["arrived_at"],
        )

    async def respond(request: Request, work: Work, answer: Answer, stream: bool) -> Response:
        try:
            if stream:
                return await EventStream.begun(request.receive, generator.stream(work, answer))
            body = await unless_client_leaves(request.receive, generator.whole(work, answer))
            return Response(body, media_type=JSON)
        except ClientGoneError:  # nobody reads it, but the log and the metrics do
            raise ApiError(499, "the client has left", code="cancelled") from None

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """The model's answer to a chat, whole or as server-sent events."""
        check_model(body.model)
        n = 1 if body.n is None else body.n
        check_size(1, n)
        prompt = await prompts.of_chat(body.messages)
        sampling = body.sampling(max(cluster.max_model_len - len(prompt), 1))
        work = work_of(request, [prompt], sampling, n)
        answer = ChatAnswer(
            request.scope["state"]["request_id"], settings.model_name, sampling.logprobs, wants_usage(body)
        )
        return await respond(request, work, answer, bool(body.stream))

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """What the model writes behind a prompt, or behind each of several; a prompt is text or token ids."""
        check_model(body.model)
        texts, n = body.prompts, 1 if body.n is None else body.n
        if not texts:
            raise invalid("prompt is an empty list; send at least one prompt", "prompt")
        check_size(len(texts), n)
        sampling = body.sampling(_DEFAULT_COMPLETION)
        token_ids = [await prompts.of_text(text) for text in texts]
        work = work_of(request, token_ids, sampling, n)
        echoes: list[str] = []
        if body.echo:
            decode = prompts.tokenizer.decode
            shown = [text if isinstance(text, str) else decode(text) for text in texts]
            echoes = [text for text in shown for _ in range(n)]
        answer = CompletionAnswer(
            request.scope["state"]["request_id"],
            settings.model_name,
            sampling.logprobs,
            wants_usage(body),
            echoes=echoes,
        )
        return await respond(request, work, answer, bool(body.stream))

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
        check_model(name)
        return described()

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Token ids of a prompt, or of a chat in the model's template."""
        check_model(body.model)
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
        check_model(body.model)
        return {"prompt": prompts.tokenizer.decode(await prompts.of_text(body.tokens), skip_special_tokens=False)}

    return router


def wants_usage(body: ChatRequest | CompletionRequest) -> bool:
    if body.stream_options and not body.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    return bool(body.stream_options and body.stream_options.include_usage)
