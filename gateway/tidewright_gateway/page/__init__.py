"""Pages for people: the chat at `/`, the API at `/docs`, which load nothing from anywhere else; and `/openapi.json`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import msgspec
from fastapi import APIRouter, FastAPI
from starlette.responses import Response

from tidewright_gateway.page.reference import read

_FILES = {
    "/": "index.html",
    "/page/chat.js": "chat.js",
    "/page/chat.css": "chat.css",
    "/page/reference.css": "reference.css",
}
_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "json": "application/json"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # with a new version of the gateway comes a new page
}


def make_page_router(app: FastAPI) -> APIRouter:
    """`app`: whose API is shown."""
    router = APIRouter(include_in_schema=False)
    for path, name in _FILES.items():
        router.add_api_route(path, _endpoint(_content(name), name), methods=["GET"])

    @cache
    def document() -> dict[str, Any]:
        from tidewright_gateway.document.making import make  # hardly any gateway is asked for it

        return make(app)

    @cache
    def as_json() -> bytes:
        return msgspec.json.encode(document())

    @cache
    def as_page() -> bytes:
        template = jinja2.Environment(autoescape=True).from_string(_content("reference.html").decode())
        return template.render(version=app.version, reference=read(document())).encode()

    for path, content, name in (("/openapi.json", as_json, "openapi.json"), ("/docs", as_page, "reference.html")):
        router.add_api_route(path, _slow_endpoint(content, name), methods=["GET"])
    return router


def _content(name: str) -> bytes:
    return files(__package__).joinpath(name).read_bytes()


def _endpoint(content: bytes, name: str) -> Callable[[], Awaitable[Response]]:
    async def endpoint() -> Response:
        return _response(content, name)

    return endpoint


def _slow_endpoint(content: Callable[[], bytes], name: str) -> Callable[[], Awaitable[Response]]:
    """`content` takes a fifth of a second the first time, in which streams go on."""

    async def endpoint() -> Response:
        return _response(await asyncio.to_thread(content), name)

    return endpoint


def _response(content: bytes, name: str) -> Response:
    return Response(content, headers=_HEADERS, media_type=_TYPES[name.rpartition(".")[2]])
