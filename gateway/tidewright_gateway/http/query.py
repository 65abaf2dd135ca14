"""Query parameters of the JSON endpoints: those that an endpoint does not have are refused by name, as fields are."""

from __future__ import annotations

from urllib.parse import parse_qsl

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.types import Scope

from tidewright_gateway.context import RequestContext
from tidewright_gateway.openai.errors import MAX_SHOWN, invalid

_MOST = 100
_BETA = "beta"  # of Anthropic's clients
_RESPONSES = "/v1/responses/"
_WITHOUT_EFFECT = ("include", "include_obfuscation", "starting_after")  # of OpenAI's clients, for responses


class QueryCheck:
    """Also a dependency of FastAPI's."""

    def __init__(self, *, ignores_unknown: bool) -> None:
        """`ignores_unknown`: they are ignored and named in the answer instead."""
        self._ignores_unknown = ignores_unknown

    async def __call__(self, request: Request) -> None:
        self.check(request.scope)

    def check(self, scope: Scope) -> None:
        """Of a request whose route is known. Raises ApiError."""
        if not scope["query_string"]:
            return
        route, context = scope["route"], scope["state"]["context"]
        assert isinstance(route, APIRoute)
        assert isinstance(context, RequestContext)
        try:
            given = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True, max_num_fields=_MOST)
        except ValueError:
            raise invalid(f"the address has more than {_MOST} query parameters", code="too_many_items") from None
        known = {field.alias for field in route.dependant.query_params}
        for name in dict.fromkeys(name.removesuffix("[]") for name, _ in given):
            if name in known or (name == _BETA and context.is_anthropic):
                continue
            has_no_effect = route.path.startswith(_RESPONSES) and name in _WITHOUT_EFFECT
            if not (has_no_effect or self._ignores_unknown):
                shown = name[:MAX_SHOWN]
                raise invalid(f"unknown or unsupported query parameter: {shown}", shown, "unknown_parameter")
            context.ignored_fields.ignore(name)
