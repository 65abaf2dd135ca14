"""Pages for people: the chat at `/`, the API at `/docs`. They load nothing from anywhere else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cache
from importlib.resources import files

import jinja2
from fastapi import APIRouter, FastAPI
from starlette.responses import Response

from tidewright_gateway.page.reference import read

_FILES = {
    "/": "index.html",
    "/page/chat.js": "chat.js",
    "/page/chat.css": "chat.css",
    "/page/reference.css": "reference.css",
}
_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
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
        content = _content(name)
        router.add_api_route(path, _endpoint(lambda content=content: content, name), methods=["GET"])  # type: ignore[misc]

    @cache
    def reference() -> bytes:
        template = jinja2.Environment(autoescape=True).from_string(_content("reference.html").decode())
        operations, objects = read(app.openapi())
        return template.render(version=app.version, operations=operations, objects=objects).encode()

    router.add_api_route("/docs", _endpoint(reference, "reference.html"), methods=["GET"])
    return router


def _content(name: str) -> bytes:
    return files(__package__).joinpath(name).read_bytes()


def _endpoint(content: Callable[[], bytes], name: str) -> Callable[[], Awaitable[Response]]:
    media_type = _TYPES[name.rpartition(".")[2]]

    async def endpoint() -> Response:
        return Response(content(), headers=_HEADERS, media_type=media_type)

    return endpoint
