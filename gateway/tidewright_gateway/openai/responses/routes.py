"""The endpoints of responses that are stored, or run already."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import JSONResponse, Response

from tidewright_gateway.context import RequestContext
from tidewright_gateway.http.query import QueryCheck
from tidewright_gateway.openai.errors import ApiError, invalid
from tidewright_gateway.openai.protocol import Body
from tidewright_gateway.openai.responses.shelf import Shelf
from tidewright_gateway.pipeline import Pipeline

_MAX_LISTED = 100  # OpenAI's


_NOT_OFFERED = {
    "/v1/responses/input_tokens": "POST /tokenize counts the tokens of a chat",
    "/v1/responses/compact": 'send truncation: "auto", or fewer items',
}


def make_responses_router(pipeline: Pipeline, shelf: Shelf, query: QueryCheck) -> APIRouter:
    router = APIRouter(dependencies=[Depends(query)])

    for path, instead in _NOT_OFFERED.items():
        router.add_api_route(path, _refuse(path, instead), methods=["POST"], include_in_schema=False)

    @asynccontextmanager
    async def entered(request: Request) -> AsyncIterator[RequestContext]:
        """With the limits of the caller, as any request."""
        context = _context(request)
        async with pipeline.enter(context, Body, b"{}"):
            yield context

    @router.get("/v1/responses/{response_id}")
    async def retrieve(request: Request, response_id: str, stream: bool = False) -> Response:
        """A response of the same key that is stored, or runs in this worker."""
        async with entered(request) as context:
            if stream:
                raise invalid("stream is not supported: a response is streamed only as it is created", "stream")
            return _answer(context, await shelf.response(context.caller.key_id, response_id))

    @router.delete("/v1/responses/{response_id}")
    async def delete(request: Request, response_id: str) -> Response:
        """Deletes a stored response. Responses that continue it keep its items."""
        async with entered(request) as context:
            await shelf.delete(context.caller.key_id, response_id)
            return _answer(context, {"id": response_id, "object": "response", "deleted": True})

    @router.get("/v1/responses/{response_id}/input_items")
    async def list_input_items(
        request: Request,
        response_id: str,
        after: str | None = None,
        limit: int = Query(20, ge=1, le=_MAX_LISTED),
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """The items before the output of a stored response: `limit` of them (20), behind the item `after`."""
        async with entered(request) as context:
            stored = await shelf.stored(context.caller.key_id, response_id)
            return _answer(context, _page(stored.input, after, limit, is_reversed=order == "desc"))

    @router.post("/v1/responses/{response_id}/cancel")
    async def cancel(request: Request, response_id: str) -> Response:
        """Ends a response of the same key that runs in this worker; its stream then ends with response.incomplete."""
        # Outside the limits: what uses them up must not be in the way of ending it.
        context = _context(request)
        return _answer(context, await shelf.cancel(context.caller.key_id, response_id))

    return router


def _refuse(path: str, instead: str) -> Callable[[], Coroutine[Any, Any, None]]:
    """An endpoint of OpenAI's that would else look like a response with this id."""

    async def refuse() -> None:
        raise ApiError(404, f"POST {path} is not offered; {instead}", code="unsupported")

    return refuse


def _context(request: Request) -> RequestContext:
    context = request.scope["state"]["context"]
    assert isinstance(context, RequestContext)
    return context


def _answer(context: RequestContext, content: dict[str, Any]) -> Response:
    return JSONResponse(content, headers=context.headers)


def _page(items: list[dict[str, Any]], after: str | None, limit: int, *, is_reversed: bool) -> dict[str, Any]:
    found = items[::-1] if is_reversed else items
    if after is not None:
        at = next((number for number, item in enumerate(found) if item["id"] == after), None)
        if at is None:
            raise invalid("after is not the id of an input item of this response", "after")
        found = found[at + 1 :]
    page = found[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(found) > len(page),
    }
