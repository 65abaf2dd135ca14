"""The chat page at `/`: three static files, which may load nothing from anywhere else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

_FILES = {"/": "index.html", "/page/chat.js": "chat.js", "/page/chat.css": "chat.css"}
_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # with a new version of the gateway comes a new page
}


def make_page_router() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    for path, name in _FILES.items():
        content = files(__package__).joinpath(name).read_bytes()
        router.add_api_route(path, _endpoint(content, _TYPES[name.rpartition(".")[2]]), methods=["GET"])
    return router


def _endpoint(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def endpoint() -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)

    return endpoint
