"""What a Response object says of its request."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tidewright_gateway.openai.responses.items import RESPONSE, new_id
from tidewright_gateway.openai.responses.request import FunctionTool, ResponsesRequest


@dataclass(frozen=True)
class Description:
    id: str
    fields: dict[str, Any]
    """Of the object; the answer adds its own."""

    @classmethod
    def of(cls, body: ResponsesRequest, defaults: Mapping[str, Any], *, is_stored: bool) -> Description:
        """`defaults`: sampling parameters of requests that have none of their own."""
        id = new_id(RESPONSE)
        format = body.text.format if body.text else None
        choice = body.tool_choice or "auto"
        given = {
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": is_stored,
            "temperature": _first(body.temperature, defaults.get("temperature"), 1.0),
            "text": {"format": _plain(format) if format else {"type": "text"}, "verbosity": "medium"},
            "tool_choice": choice if isinstance(choice, str) else _plain(choice),
            "tools": [_tool(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": _first(body.top_p, defaults.get("top_p"), 1.0),
            "truncation": body.truncation or "disabled",
            "user": body.user,
        }
        head = {"id": id, "object": "response", "created_at": int(time.time()), "status": "", "background": False}
        return cls(id, {**head, "model": body.model, **given, "max_tool_calls": None, "service_tier": "default"})


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _plain(value: Any) -> Any:
    return value.model_dump(by_alias=True, exclude_none=True)


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": bool(tool.strict),
    }
