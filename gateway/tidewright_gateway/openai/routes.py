"""The endpoints of OpenAI's and Anthropic's APIs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from tidewright.schema import AdapterStatus
from tidewright_gateway.anthropic.api import MessagesApi
from tidewright_gateway.anthropic.models import model_info, model_list
from tidewright_gateway.anthropic.protocol import CountTokensRequest
from tidewright_gateway.anthropic.translation import chat_of
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.context import RequestContext
from tidewright_gateway.http.middleware import ClientGoneError
from tidewright_gateway.http.query import QueryCheck
from tidewright_gateway.models import Model, Models
from tidewright_gateway.openai.api import ChatApi, CompletionApi
from tidewright_gateway.openai.chat import TokenizeRequest
from tidewright_gateway.openai.embeddings import Computed, Embeddings
from tidewright_gateway.openai.errors import invalid
from tidewright_gateway.openai.exchange import Exchange
from tidewright_gateway.openai.messages import check_history
from tidewright_gateway.openai.protocol import DetokenizeRequest
from tidewright_gateway.openai.responses.api import ResponsesApi
from tidewright_gateway.openai.responses.shelf import Shelf
from tidewright_gateway.pipeline import Pipeline


def make_pipeline_router(settings: GatewaySettings, pipeline: Pipeline, shelf: Shelf) -> APIRouter:
    """Endpoints that go through the pipeline, which also authenticates."""
    router = APIRouter()
    keep_alive = settings.sse_keep_alive

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """Answers a chat, whole or as server-sent events."""
        return Exchange(pipeline, ChatApi(), await _body(request), keep_alive)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """Continues a prompt, or each of several; a prompt is text or token ids."""
        return Exchange(pipeline, CompletionApi(), await _body(request), keep_alive)

    embeddings = Embeddings(pipeline)

    @router.post("/v1/embeddings")
    async def embed(request: Request) -> Response:
        """Embeds texts, one vector each; needs a server with `--task embed`."""
        return Computed(embeddings.embed, await _body(request))

    @router.post("/v1/score")
    async def score(request: Request) -> Response:
        """Cosine similarities of the embeddings of texts; needs a server with `--task embed`."""
        return Computed(embeddings.score, await _body(request))

    @router.post("/v1/messages")
    async def messages(request: Request) -> Response:
        """Anthropic's Messages API: answers a chat, whole or as server-sent events."""
        return Exchange(pipeline, MessagesApi(), await _body(request), keep_alive)

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        """Anthropic's API: the number of tokens of a prompt, with its system prompt and tools."""
        async with pipeline.enter(_context(request), CountTokensRequest, await _body(request)) as body:
            model = _context(request).served
            prompt = await model.prompts.of_chat(chat_of(body), model.failover.max_model_len)
            return JSONResponse({"input_tokens": len(prompt.token_ids)}, headers=_context(request).headers)

    @router.post("/v1/responses")
    async def responses(request: Request) -> Response:
        """Answers a text or a list of items, whole or as typed server-sent events, and stores the response."""
        return Exchange(pipeline, ResponsesApi(shelf), await _body(request), keep_alive)

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        """Token ids of a prompt, or of a chat in the model's template."""
        async with pipeline.enter(_context(request), TokenizeRequest, await _body(request)) as body:
            if (body.prompt is None) == (body.messages is None):
                raise invalid("send either prompt or messages", "prompt")
            prompts, limit = _context(request).served.prompts, _context(request).served.failover.max_model_len
            if body.messages is not None:
                check_history(body.messages)
                tokens = (await prompts.of_chat(body, limit)).token_ids
            else:
                adds = body.add_special_tokens is not False
                tokens = await prompts.of_text(body.prompt or "", limit, add_special_tokens=adds)
            return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": limit})

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        async with pipeline.enter(_context(request), DetokenizeRequest, await _body(request)) as body:
            prompts = _context(request).served.prompts
            prompts.check_ids(body.tokens, "tokens")
            return JSONResponse({"prompt": prompts.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    return router


def make_model_router(models: Models, query: QueryCheck) -> APIRouter:
    router = APIRouter(dependencies=[Depends(query)])

    def described(request: Request, model: Model, adapter: AdapterStatus | None = None) -> dict[str, Any]:
        name, at = (adapter.name, int(adapter.at) or model.created) if adapter else (model.name, model.created)
        if _context(request).is_anthropic:
            return model_info(name, model.failover.max_model_len, at)
        return {
            "id": name,
            "object": "model",
            "created": at,
            "owned_by": "tidewright",
            "max_model_len": model.failover.max_model_len,
            # Not the whole path: callers need not know the folders of the servers.
            "root": Path(adapter.path).name if adapter else model.name,
            "parent": model.name if adapter else None,
        }

    @router.get("/v1/models")
    async def list_models(
        request: Request,
        limit: int = Query(20, ge=1, le=1000),
        after_id: str | None = None,
        before_id: str | None = None,
    ) -> dict[str, Any]:
        """The served models, each with its LoRA adapters behind it. With the header anthropic-version, in Anthropic's
        shape."""
        found = []
        for model in models:
            loaded = model.failover.adapters.loaded
            # A replica may not know what its models are called here; such a name is for the model.
            adapters = [loaded[name] for name in sorted(loaded.keys() - models.names)]
            found += [described(request, model), *(described(request, model, adapter) for adapter in adapters)]
        if _context(request).is_anthropic:
            return model_list(found, limit, after_id, before_id)
        return {"object": "list", "data": found}

    @router.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        """A served model or a LoRA adapter, by name. With the header anthropic-version, in Anthropic's shape."""
        return described(request, *await models.find(name))

    return router


async def _body(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect:
        raise ClientGoneError from None


def _context(request: Request) -> RequestContext:
    context = request.scope["state"]["context"]
    assert isinstance(context, RequestContext)
    return context
